namespace Xnbd.Bench;

/// <summary>The result of one run of a workload on one server. A figure that is not known is NaN.</summary>
/// <param name="Rate">Requests, or MiB, in a second.</param>
/// <param name="P50">Median latency in microseconds.</param>
/// <param name="P99">99th percentile of the latency in microseconds.</param>
/// <param name="ServerCpu">Processor time of the server in microseconds for each request.</param>
/// <param name="ClientCpu">Processor time of the client in microseconds for each request.</param>
/// <param name="PeakKibibytes">The server's peak resident size.</param>
/// <param name="SlowestToMedian">As in <see cref="ClientRun"/>.</param>
/// <param name="RateBeside">As in <see cref="ClientRun"/>.</param>
public sealed record Measurement(
    double Rate, double P50, double P99, double ServerCpu, double ClientCpu, double PeakKibibytes,
    double SlowestToMedian, double RateBeside)
{
    /// <summary>Makes it from what a client did and a server used.</summary>
    public static Measurement From(Workload workload, ClientRun run, double serverCpuSeconds, double peakKibibytes)
        => new(
            (workload.Unit == Workload.UnitOfBytes ? run.Bytes / (1 << 20) : run.Requests) / run.Seconds,
            run.P50,
            run.P99,
            (run.ServerCpuSeconds ?? serverCpuSeconds) * 1e6 / run.Requests,
            run.CpuSeconds * 1e6 / run.Requests,
            peakKibibytes,
            run.SlowestToMedian,
            run.RateBeside);

    /// <summary>Each figure is the median of its runs.</summary>
    public static Measurement Median(IReadOnlyCollection<Measurement> runs)
    {
        return new(
            Of(m => m.Rate), Of(m => m.P50), Of(m => m.P99), Of(m => m.ServerCpu), Of(m => m.ClientCpu),
            Of(m => m.PeakKibibytes), Of(m => m.SlowestToMedian), Of(m => m.RateBeside));

        double Of(Func<Measurement, double> figure) => Median(runs.Select(figure));
    }

    /// <summary>The median of figures.</summary>
    public static double Median(IEnumerable<double> figures)
    {
        double[] sorted = [.. figures.Order()];
        return sorted.Length == 0 ? double.NaN : (sorted[(sorted.Length - 1) / 2] + sorted[sorted.Length / 2]) / 2;
    }
}
