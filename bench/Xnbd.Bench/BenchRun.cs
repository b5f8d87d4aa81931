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

    /// <summary>How long it is expected to take.</summary>
    public TimeSpan Expected => TimeSpan.FromSeconds(options.Rounds * cases.Sum(ExpectedSeconds));

    public async Task<Results> Run()
    {
        var results = new Results();
        for (int round = 0; round < options.Rounds; round++)
        {
            foreach (Case @case in cases)
            {
                IReadOnlyList<Peer> peers = Peers(@case.Workload.Mode);
                for (int i = 0; i < peers.Count; i++)
                {
                    Peer peer = peers[(i + round) % peers.Count];
                    string what = $"{@case}: {peer.Name}";
                    Progress.Show($"round {round + 1} of {options.Rounds}: {what}");
                    try
                    {
                        results.Add(@case, peer, await Measure(@case, peer));
                    }
                    catch (InvalidOperationException failure)
                    {
                        Progress.Say($"{what}: {failure.Message.Split('\n')[0]}");
                    }
                }
            }
        }

        return results;
    }

    private double ExpectedSeconds(Case @case) => Peers(@case.Workload.Mode).Count
        * (options.Seconds + SetUpSeconds + (@case.Workload.IsFilled ? FillSeconds : 0));

    private async Task<Measurement> Measure(Case @case, Peer peer)
    {
        stop.ThrowIfCancellationRequested();
        Workload workload = @case.Workload;
        string image = await images.Get(workload.Medium);
        using var files = new TempFolder(Images.MemoryFolder); // a layer, an overlay: new for each run
        if (workload.IsOfFreshFile && peer.IsReference)
            image = files.Sparse("empty", new FileInfo(image).Length);
        Endpoint endpoint = network.Free(@case.Transport, files.Path, "socket");
        using RunningPeer? origin = workload.Mode == Mode.Proxy ? Origin(@case.Transport, image, files) : null;
        using RunningPeer server = RunningPeer.Start(peer, new Setting(image, endpoint, files.Path, origin?.Endpoint));
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

    private RunningPeer Origin(Transport transport, string image, TempFolder files)
        => RunningPeer.Start(
            Peer.Origin, new Setting(image, network.Free(transport, files.Path, "origin"), files.Path, null));
}
