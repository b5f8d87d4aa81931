using System.Globalization;
using System.Net.Sockets;
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

    /// <summary>
    /// One move after the other, each from the image that the last one has made. The proxy is killed again and again
    /// while it caches all, and its remote is lost at two of five kills. Then it caches all, verifies and switches.
    /// </summary>
    [Fact]
    public async Task A_move_survives_kills_of_the_proxy_and_losses_of_the_remote()
    {
        const int killsOfMove = 5;
        using var first = new TempFolder();
        string image = first.Random("disk.img", Size);
        byte[] model = File.ReadAllBytes(image);
        int underWay = 0, unfinished = 0, losses = 0;
        for (int move = 0; move < Kills / killsOfMove; move++)
        {
            using var folder = new TempFolder();
            string remote = folder.File("remote"), control = Proxies.Socket(folder);
            ServerProcess origin = Serve();
            try
            {
                // The whole disk needs a second, and a proxy lives for 30 ms.
                using var line = new SlowLink(new UnixDomainSocketEndPoint(remote), 4_000_000, TimeSpan.Zero);
                var random = new Random(Seed + move);
                Task losing = Task.CompletedTask;
                int life = 0;
                var run = new KillRun(Start, model, Seed + move) { ComparesAfterEachKill = false };
                run.Run(killsOfMove);
                underWay += run.KilledUnderWay;
                await losing;

                using ServerProcess last = Proxies.Start(folder, "127.0.0.1", $"{line.Port}");
                await Tool.Succeed(Proxies.Control, "--cache-all", control);
                await Tool.Succeed(Proxies.Control, "--verify", control);
                await Tool.Succeed(Proxies.Control, "--switch", control);
                Assert.Equal(0, last.Stop());

                ServerProcess Start()
                {
                    losing.Wait(TimeSpan.FromSeconds(30)); // a proxy does not start without its remote
                    unfinished += line.Bytes < Size ? 1 : 0;
                    ServerProcess proxy = Proxies.Start(folder, "127.0.0.1", $"{line.Port}");
                    Tool.Succeed(Proxies.Control, "--cache-all", "--detach", control).Wait();
                    if (++life is 2 or 4)
                    {
                        int delay = random.Next(30);
                        losing = Task.Run(() =>
                        {
                            Thread.Sleep(delay); // at a random moment of the proxy's life
                            origin.Kill();
                            origin.Dispose();
                            origin = Serve();
                            losses++;
                        });
                    }

                    return proxy;
                }
            }
            finally
            {
                origin.Dispose();
            }

            File.Move(folder.File("cache.img"), image, overwrite: true);
            int same = File.ReadAllBytes(image).AsSpan().CommonPrefixLength(model);
            Assert.True(same == Size, $"seed {Seed}, move {move}: byte {same} is not as in the model");

            ServerProcess Serve() => ServerProcess.Start(remote, ["--target", "--readonly", "--unix", remote, image]);
        }

        TestContext.Current.TestOutputHelper?.WriteLine(
            $"seed {Seed}: {Kills} kills, {underWay} of them amid writes, {losses} losses of the remote, "
                + $"{unfinished} starts amid the copy");
        Assert.True(underWay > Kills / 2, "hardly any proxy was killed amid writes: the test tests nothing");
        Assert.True(unfinished > Kills / 2, "hardly any proxy was killed amid the copy: the test tests nothing");
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
