namespace Xnbd.Bench;

/// <summary>A workload over a transport.</summary>
public sealed record Case(Workload Workload, Transport Transport)
{
    public string TransportName => Transport.ToString().ToLowerInvariant();

    public override string ToString() => $"{Workload.Name}, {TransportName}";
}

/// <summary>xNBD's figures, divided by those of another server.</summary>
/// <param name="To">The other server.</param>
/// <param name="Rate">Above 1: xNBD is faster.</param>
/// <param name="ServerCpu">Processor time of the server for each byte. Below 1: xNBD takes less.</param>
/// <param name="ClientCpu">Processor time of the client for each byte.</param>
/// <param name="P99">Latency.</param>
internal sealed record Ratio(Peer To, double Rate, double ServerCpu, double ClientCpu, double P99);

/// <summary>All figures of a run.</summary>
internal sealed class Results
{
    private readonly Dictionary<(Case, Peer), List<Measurement>> _runs = [];

    /// <summary>The cases in which a server was measured, in the order of their first run.</summary>
    public IEnumerable<Case> Cases => _runs.Keys.Select(key => key.Item1).Distinct();

    public void Add(Case @case, Peer peer, Measurement measurement)
    {
        if (!_runs.TryGetValue((@case, peer), out List<Measurement>? list))
            _runs.Add((@case, peer), list = []);
        list.Add(measurement);
    }

    /// <summary>The servers that were measured in a case, in the order of <see cref="Peer.All"/>.</summary>
    public IEnumerable<(Peer Peer, Measurement Measurement)> Servers(Case @case)
        => Peer.All.Where(peer => _runs.ContainsKey((@case, peer)))
            .Select(peer => (peer, Measurement.Median(_runs[(@case, peer)])));

    /// <summary>xNBD to the fastest of the others; null when one of them is missing.</summary>
    public Ratio? ToBestPeer(Case @case)
        => Own(@case, Servers(@case).Where(s => !s.Peer.IsOwn && !s.Peer.IsReference)
            .OrderByDescending(s => s.Measurement.Rate).FirstOrDefault());

    /// <summary>xNBD to its own target mode; null when one of them is missing.</summary>
    public Ratio? ToTargetMode(Case @case) => Own(@case, Servers(@case).FirstOrDefault(s => s.Peer.IsReference));

    /// <summary>Whether any server has a figure in a case.</summary>
    public bool Has(Case @case, Func<Measurement, double> figure)
        => Servers(@case).Any(server => !double.IsNaN(figure(server.Measurement)));

    /// <summary>The latency of a mixed load, divided by that of its small readers alone.</summary>
    public double P99ToAlone(Case @case, Peer peer)
    {
        Case? alone = Cases.FirstOrDefault(
            other => other.Workload == @case.Workload.Alone && other.Transport == @case.Transport);
        return alone is null ? double.NaN : P99(@case) / P99(alone);

        double P99(Case of) => Measurement.Median(
            _runs.GetValueOrDefault((of, peer), []).Select(measurement => measurement.P99));
    }

    private Ratio? Own(Case @case, (Peer? Peer, Measurement M) other)
    {
        (Peer? own, Measurement m) = Servers(@case).FirstOrDefault(s => s.Peer.IsOwn);
        return own is null || other.Peer is null
            ? null
            : new Ratio(
                other.Peer, m.Rate / other.M.Rate, m.ServerCpu / other.M.ServerCpu, m.ClientCpu / other.M.ClientCpu,
                m.P99 / other.M.P99);
    }
}
