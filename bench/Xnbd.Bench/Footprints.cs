using Xnbd.TestKit;

namespace Xnbd.Bench;

/// <summary>How long a server takes to start, and how much memory it holds.</summary>
/// <param name="StartMilliseconds">Time to its first greeting: the median of several starts.</param>
/// <param name="Idle">Resident size in MiB at first.</param>
/// <param name="Used">Resident size in MiB after some use; NaN when the server cannot be used so.</param>
/// <param name="RestartMilliseconds">
/// Time to its first greeting after it was used and killed, with the files that it had; NaN for the peers.
/// </param>
internal sealed record Footprint(double StartMilliseconds, double Idle, double Used, double RestartMilliseconds);

/// <summary>The footprints of all servers, over Unix sockets.</summary>
internal sealed class Footprints
{
    /// <summary>Number of clients that wait.</summary>
    public const int Clients = 1000;

    /// <summary>Number of writes to the big disk.</summary>
    public const int Writes = 2000;

    private const int WriteBytes = 4096;

    // How long a server takes, about, in seconds.
    private const double StartSeconds = 0.15;
    private const double UseSeconds = 0.5;
    private const long BigDiskBytes = 16L << 40;

    private readonly List<(Peer Peer, Footprint Footprint)> _idle = [];
    private readonly List<(Mode Mode, Peer Peer, Footprint Footprint)> _ofBigDisk = [];

    /// <summary>In the target mode; used: with many clients that wait.</summary>
    public IReadOnlyList<(Peer Peer, Footprint Footprint)> Idle => _idle;

    /// <summary>With a sparse image of 16 TiB; used: after some random writes.</summary>
    public IReadOnlyList<(Mode Mode, Peer Peer, Footprint Footprint)> OfBigDisk => _ofBigDisk;

    /// <summary>How long that is expected to take.</summary>
    public static double ExpectedSeconds(BenchRun run, BenchOptions options)
    {
        int stages = ModesOf(options).Sum(mode => run.Peers(mode).Count * (mode == Mode.Target ? 2 : 1));
        return stages * ((Starts(options) * StartSeconds) + UseSeconds);
    }

    private static IEnumerable<Mode> ModesOf(BenchOptions options) => options.Modes.Where(mode => mode != Mode.Crowd);

    private static int Starts(BenchOptions options) => options.IsQuick ? 3 : 7;

    public static async Task<Footprints> Measure(BenchRun run, BenchOptions options, CancellationToken stop)
    {
        var footprints = new Footprints();
        using var folder = new TempFolder(Images.MemoryFolder);
        string small = folder.Sparse("small", 512 << 20), big = folder.Sparse("big", BigDiskBytes);
        int starts = Starts(options);
        await Task.Run(() =>
        {
            foreach (Mode mode in ModesOf(options))
            {
                foreach (Peer peer in run.Peers(mode))
                {
                    if (mode == Mode.Target && Measure(peer, mode, small, Crowd) is { } idle)
                        footprints._idle.Add((peer, idle));
                    if (Measure(peer, mode, big, Write) is { } ofBigDisk)
                        footprints._ofBigDisk.Add((mode, peer, ofBigDisk));
                }
            }
        }, CancellationToken.None);
        return footprints;

        Footprint? Measure(Peer peer, Mode mode, string image, Func<RunningPeer, double> use)
        {
            string what = $"start and size of {peer.Name}, {mode}, {new FileInfo(image).Length >> 20} MiB";
            Progress.Show(what);
            try
            {
                var milliseconds = new List<double>();
                for (int i = 0; ; i++)
                {
                    stop.ThrowIfCancellationRequested();
                    using Stage stage = run.Start(peer, mode, Transport.Unix, image);
                    milliseconds.Add(stage.Server.StartMilliseconds);
                    if (i == starts - 1)
                    {
                        double idle = Resident(stage.Server), used = use(stage.Server);
                        return new Footprint(Measurement.Median(milliseconds), idle, used, Restart(stage.Server));
                    }
                }
            }
            catch (Exception failure) when (BenchRun.IsOfServer(failure))
            {
                Progress.Say($"{what}: {failure.Message.Split('\n')[0]}");
                return null;
            }
        }
    }

    private static double Restart(RunningPeer server)
    {
        if (!server.Peer.IsOwn)
            return double.NaN;
        server.Dispose();
        using RunningPeer next = server.Again();
        return next.StartMilliseconds;
    }

    private static double Resident(RunningPeer server) => server.Kibibytes("VmRSS") / 1024.0;

    private static double Crowd(RunningPeer server)
    {
        var clients = new List<NbdTestClient>();
        try
        {
            for (int i = 0; i < Clients; i++)
                clients.Add(Open(server));
            return Resident(server);
        }
        catch (Exception failure) when (BenchRun.IsOfServer(failure))
        {
            return double.NaN; // it does not accept so many
        }
        finally
        {
            clients.ForEach(client => client.Dispose());
        }
    }

    private static double Write(RunningPeer server)
    {
        using NbdTestClient client = Open(server);
        var random = new Random(1);
        byte[] data = new byte[WriteBytes];
        random.NextBytes(data);
        for (int i = 0; i < Writes; i++)
            client.Write((ulong)random.NextInt64((long)client.Size / WriteBytes) * WriteBytes, data);
        return Resident(server);
    }

    private static NbdTestClient Open(RunningPeer server)
        => NbdTestClient.Open(server.Endpoint.Remote, structured: false, server.Peer.ExportName);
}
