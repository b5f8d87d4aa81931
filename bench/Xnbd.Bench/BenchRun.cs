using System.Net.Sockets;
using Xnbd.Bench.Clients;
using Xnbd.TestKit;

namespace Xnbd.Bench;

/// <summary>
/// Runs the chosen workloads round by round, workload by workload, server by server: a drift of the machine hits all.
/// </summary>
internal sealed class BenchRun(
    BenchOptions options, IReadOnlyList<Case> cases, Network network, Images images, CancellationToken stop)
{
    /// <summary>A server's start and end, and the client's, in seconds.</summary>
    private const double SetUpSeconds = 0.4;
    private const double FillSeconds = 0.5;

    /// <summary>A client that takes longer than planned by this, in seconds, hangs.</summary>
    private const double MaxDelaySeconds = 60;

    /// <summary>The servers of a mode that are here, and that are chosen.</summary>
    public IReadOnlyList<Peer> Peers(Mode mode)
        => [.. Peer.All.Where(peer => peer.Modes.Contains(mode) && peer.IsPresent && options.Includes(peer))];

    /// <summary>A server did not start, or a client could not work with it: the others are still measured.</summary>
    public static bool IsOfServer(Exception failure) => failure
        is InvalidOperationException or IOException or InvalidDataException or SocketException or TimeoutException;

    private IReadOnlyList<Peer> Peers(Workload workload)
        => [.. Peers(workload.Mode).Where(peer => workload.Suits(peer))];

    /// <summary>How long it is expected to take, without the making of images.</summary>
    public TimeSpan Expected => TimeSpan.FromSeconds(
        (options.Rounds * cases.Sum(ExpectedSeconds))
        + (options.HasFootprints ? Footprints.ExpectedSeconds(this, options) : 0));

    public async Task<Results> Run()
    {
        var results = new Results();
        for (int round = 0; round < options.Rounds; round++)
        {
            foreach (Case @case in cases)
            {
                IReadOnlyList<Peer> peers = Peers(@case.Workload);
                for (int i = 0; i < peers.Count; i++)
                {
                    Peer peer = peers[(i + round) % peers.Count];
                    string what = $"{@case}: {peer.Name}";
                    Progress.Show($"round {round + 1} of {options.Rounds}: {what}");
                    try
                    {
                        results.Add(@case, peer, await Measure(@case, peer));
                    }
                    catch (Exception failure) when (IsOfServer(failure))
                    {
                        Progress.Say($"{what}: {failure.Message.Split('\n')[0]}");
                    }
                }
            }
        }

        return results;
    }

    private double ExpectedSeconds(Case @case) => Peers(@case.Workload).Count
        * (options.Seconds + SetUpSeconds + (@case.Workload.IsFilled ? FillSeconds : 0));

    private async Task<Measurement> Measure(Case @case, Peer peer)
    {
        stop.ThrowIfCancellationRequested();
        Workload workload = @case.Workload;
        string image = await images.Get(workload.Medium);
        using var empty = new TempFolder(Images.MemoryFolder);
        if (workload.IsOfFreshFile && peer.IsReference)
            image = empty.Sparse("empty", new FileInfo(image).Length);
        using Stage stage = Start(peer, workload.Mode, @case.Transport, image);
        RunningPeer server = stage.Server;
        using var deadline = CancellationTokenSource.CreateLinkedTokenSource(stop);
        deadline.CancelAfter(TimeSpan.FromSeconds(options.Seconds + MaxDelaySeconds));
        var job = new Job(server, image, options.Seconds, deadline.Token);
        try
        {
            if (workload.IsFilled)
                await FioClient.Fill(job);
            double cpu = server.CpuSeconds;
            ClientRun run = await workload.Run(job);
            return Measurement.From(workload, run, server.CpuSeconds - cpu, server.Kibibytes("VmHWM"));
        }
        catch (OperationCanceledException) when (!stop.IsCancellationRequested)
        {
            throw new InvalidOperationException($"the client hung for {MaxDelaySeconds} s");
        }
    }

    /// <summary>Starts a server with new files of its own, and of a proxy the origin.</summary>
    public Stage Start(Peer peer, Mode mode, Transport transport, string image)
    {
        var files = new TempFolder(Images.MemoryFolder); // for a layer, a cache, an overlay
        RunningPeer? origin = null;
        try
        {
            Setting At(string socket, Endpoint? origin)
                => new(image, network.Free(transport, files.Path, socket), files.Path, origin);
            if (mode == Mode.Proxy)
                origin = RunningPeer.Start(peer.Origin, At("origin", null));
            return new Stage(RunningPeer.Start(peer, At("socket", origin?.Endpoint)), origin, files);
        }
        catch
        {
            origin?.Dispose();
            files.Dispose();
            throw;
        }
    }
}

/// <summary>A running server, and what goes with it.</summary>
internal sealed record Stage(RunningPeer Server, RunningPeer? Origin, TempFolder Files) : IDisposable
{
    public void Dispose()
    {
        Server.Dispose();
        Origin?.Dispose();
        Files.Dispose();
    }
}
