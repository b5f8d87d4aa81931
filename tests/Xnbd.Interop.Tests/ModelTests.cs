using System.Globalization;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>Random operations from four connections against the native server, compared with a byte array.</summary>
public sealed class ModelTests
{
    [Theory]
    [InlineData(null)] // the disk's file system
    [InlineData("/dev/shm")]
    public async Task The_disk_equals_the_model(string? root)
    {
        int operations = int.Parse(Environment.GetEnvironmentVariable("XNBD_MODEL_OPERATIONS") ?? "20000", CultureInfo.InvariantCulture);
        int seed = int.Parse(Environment.GetEnvironmentVariable("XNBD_SEED") ?? "20261", CultureInfo.InvariantCulture);
        const int size = (16 << 20) + 333;
        using var folder = new TempFolder(root);
        string image = folder.Sparse("disk.img", size);
        using ServerProcess server = ServerProcess.Start(folder, image);
        TestContext.Current.TestOutputHelper?.WriteLine($"seed {seed}, {operations} operations");
        var run = new ModelRun(server.SocketPath, size, seed, operations);
        await run.Run();
        Assert.Equal(0, server.Stop());
        Assert.Equal(run.Model, File.ReadAllBytes(image));
    }
}
