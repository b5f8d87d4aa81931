using System.Globalization;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>Servers that are killed at random moments under load lose nothing that was acknowledged.</summary>
public sealed class KillTests
{
    private const int Size = (4 << 20) + 777;

    private static int Kills
        => int.Parse(Environment.GetEnvironmentVariable("XNBD_KILLS") ?? "25", CultureInfo.InvariantCulture);

    private static int Seed
        => int.Parse(Environment.GetEnvironmentVariable("XNBD_SEED") ?? "20262", CultureInfo.InvariantCulture);

    [Fact]
    public void A_killed_target_loses_no_acknowledged_write()
    {
        using var folder = new TempFolder();
        string image = folder.Sparse("disk.img", Size);
        Run(() => ServerProcess.Start(folder, image), new byte[Size]);
    }

    [Fact]
    public void A_killed_copy_on_write_target_loses_no_acknowledged_write()
    {
        using var folder = new TempFolder();
        string image = folder.Random("disk.img", Size), layer = folder.File("layer");
        byte[] before = File.ReadAllBytes(image);
        Run(() => ServerProcess.StartMode("--cow-target", folder, image, "--cow-layer", layer), [.. before]);
        Assert.Equal(before, File.ReadAllBytes(image));
    }

    [Fact]
    public async Task A_killed_proxy_loses_no_acknowledged_write_and_shows_no_block_that_it_has_not()
    {
        using var folder = new TempFolder();
        string image = folder.Random("disk.img", Size);
        byte[] before = File.ReadAllBytes(image);
        using ServerProcess origin = ServerProcess.Start(folder, image, "--readonly");
        Run(() => Proxies.Start(folder, origin), [.. before]);
        Assert.Equal(before, File.ReadAllBytes(image));
        using ServerProcess last = Proxies.Start(folder, origin);
        await Tool.Succeed(Proxies.Control, "--cache-all", Proxies.Socket(folder));
    }

    private static void Run(Func<ServerProcess> start, byte[] initial)
    {
        var run = new KillRun(start, initial, Seed);
        run.Run(Kills);
        TestContext.Current.TestOutputHelper?.WriteLine(
            $"seed {Seed}: {Kills} kills, {run.KilledUnderWay} of them amid writes, "
                + $"{run.Acknowledged} writes acknowledged");
        Assert.True(run.KilledUnderWay > Kills / 2, "hardly any server was killed amid writes: the test tests nothing");
    }
}
