using System.Globalization;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>Random operations from four connections against the native server, compared with a byte array.</summary>
public sealed class ModelTests
{
    private const int Size = (16 << 20) + 333;

    private static int Operations
        => int.Parse(
            Environment.GetEnvironmentVariable("XNBD_MODEL_OPERATIONS") ?? "20000", CultureInfo.InvariantCulture);

    private static int Seed
        => int.Parse(Environment.GetEnvironmentVariable("XNBD_SEED") ?? "20261", CultureInfo.InvariantCulture);

    [Theory]
    [InlineData(null)] // the disk's file system
    [InlineData("/dev/shm")]
    public async Task The_disk_equals_the_model(string? root) => await CheckTarget(root, trimUnit: 4096);

    /// <summary>
    /// Operations on a part of a file system's block change nothing else in it, also in replies that have been sent.
    /// </summary>
    [Theory]
    [InlineData("xfs", "-bsize=4096", 4096)]
    [InlineData("xfs", "-bsize=16384", 16384)]
    [InlineData("btrfs", "-q", 4096)]
    public async Task The_disk_equals_the_model_on_other_file_systems(string kind, string option, int blockBytes)
    {
        using var folder = new TempFolder();
        using LoopMount mount = await LoopMount.Create(folder, kind, 512 << 20, option);
        await CheckTarget(mount.Path, blockBytes);
    }

    private static async Task CheckTarget(string? root, int trimUnit)
    {
        using var folder = new TempFolder(root);
        string image = folder.Sparse("disk.img", Size);
        using ServerProcess server = ServerProcess.Start(folder, image);
        TestContext.Current.TestOutputHelper?.WriteLine($"seed {Seed}, {Operations} operations");
        var run = new ModelRun(server.SocketPath, Size, Seed, Operations) { TrimUnit = trimUnit };
        await run.Run();
        Assert.Equal(0, server.Stop());
        Assert.Equal(run.Model, File.ReadAllBytes(image));
    }

    [Theory]
    [InlineData(null)]
    [InlineData("/dev/shm")]
    public async Task The_copy_on_write_disk_equals_the_model_and_the_base_stays(string? root)
    {
        using var folder = new TempFolder(root);
        string image = folder.Random("disk.img", Size);
        byte[] before = File.ReadAllBytes(image);
        string layer = folder.File("layer");
        using ServerProcess server = ServerProcess.StartMode("--cow-target", folder, image, "--cow-layer", layer);
        var run = new ModelRun(server.SocketPath, Size, Seed, Operations) { Initial = before };
        await run.Run();
        Assert.Equal(0, server.Stop());
        Assert.Equal(before, File.ReadAllBytes(image));
        await Tool.Succeed(Layers.Program, "export", layer, folder.File("out"));
        Assert.Equal(run.Model, File.ReadAllBytes(folder.File("out")));
    }

    /// <summary>With cache-all under way from the middle on, and a restart.</summary>
    [Theory]
    [InlineData(null)]
    [InlineData("/dev/shm")]
    public async Task The_proxys_disk_equals_the_model_and_the_origin_stays(string? root)
    {
        using var folder = new TempFolder(root);
        string image = folder.Random("disk.img", Size);
        byte[] before = File.ReadAllBytes(image), model = [.. before];
        using ServerProcess origin = ServerProcess.Start(folder, image, "--readonly");
        for (int life = 0; life < 2; life++)
        {
            using ServerProcess server = Proxies.Start(folder, origin);
            var run = new ModelRun(server.SocketPath, Size, Seed + life, Operations / 2) { Initial = model };
            Task running = run.Run();
            if (life == 1)
                await Tool.Succeed(Proxies.Control, "--cache-all", Proxies.Socket(folder));
            await running;
            model = [.. run.Model];
            if (life == 1)
                await Tool.Succeed(Proxies.Control, "--switch", Proxies.Socket(folder));
            Assert.Equal(0, server.Stop());
        }

        Assert.Equal(before, File.ReadAllBytes(image));
        Assert.Equal(model, File.ReadAllBytes(folder.File("cache.img")));
    }
}
