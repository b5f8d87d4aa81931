namespace Xnbd.Programs.Watch;

/// <summary>
/// The reports of the last minutes, and what follows from their differences: rates, percentiles, remaining time. All
/// times are the proxy's own, in seconds since its start. One thread uses it.
/// </summary>
internal sealed class WatchHistory
{
    /// <summary>How much is remembered, in seconds.</summary>
    public const double Span = 180;

    /// <summary>The seconds whose misses count for the percentiles.</summary>
    public const double LatencySpan = 10;

    private const double EtaSpan = 30;
    private const int MaxSamples = 4096; // of a proxy that lies about its time

    private readonly List<Sample> _samples = [];
    private Dictionary<int, long> _received = []; // of each connection to the remote

    /// <summary>The last report; null before the first.</summary>
    public WatchReport? Last => _samples.Count > 0 ? _samples[^1].Report : null;

    /// <summary>The time of the last report.</summary>
    public double Now => _samples.Count > 0 ? _samples[^1].Time : 0;

    /// <summary>Adds a report. One of a proxy that was started anew begins a new history.</summary>
    public void Add(WatchReport report)
    {
        if (report.UptimeMs < Last?.UptimeMs)
        {
            _samples.Clear();
            _received = [];
        }

        double remote = _samples.Count > 0 ? _samples[^1].RemoteBytes : 0;
        var received = new Dictionary<int, long>();
        foreach (WatchConnection connection in report.RemoteConnections)
        {
            // A connection that was made since the last report has received all of it since; of the first report
            // nobody knows when.
            long before = _received.GetValueOrDefault(connection.Id, _samples.Count > 0 ? 0 : connection.ReceivedBytes);
            remote += Math.Max(0, (double)connection.ReceivedBytes - before);
            received[connection.Id] = connection.ReceivedBytes;
        }

        _received = received;
        _samples.Add(new Sample(report.UptimeMs / 1000.0, remote, report));
        int old = _samples.FindIndex(sample => sample.Time >= Now - Span - 1);
        _samples.RemoveRange(0, Math.Max(old - 1, _samples.Count - MaxSamples) is var count and > 0 ? count : 0);
    }

    /// <summary>Something that grows, of a report.</summary>
    public static double ToClients(Sample sample) => sample.Report.ClientReadBytes;

    /// <inheritdoc cref="ToClients"/>
    public static double FromClients(Sample sample) => sample.Report.ClientWrittenBytes;

    /// <inheritdoc cref="ToClients"/>
    public static double FromRemote(Sample sample) => sample.RemoteBytes;

    /// <inheritdoc cref="ToClients"/>
    public static double Hits(Sample sample) => sample.Report.Hits;

    /// <inheritdoc cref="ToClients"/>
    public static double Misses(Sample sample) => sample.Report.Misses;

    /// <summary>How fast something has grown in the last seconds, for each second.</summary>
    /// <param name="what">What grows.</param>
    /// <param name="seconds">How many seconds count at most.</param>
    /// <returns>0 if nothing is known.</returns>
    public double Rate(Func<Sample, double> what, double seconds = 2)
        => RateBetween(what, Now - seconds, Now) ?? (_samples.Count > 1 ? RateSince(what, _samples[0].Time) : 0);

    /// <summary>How many bytes a connection to the remote has received for each second, of late.</summary>
    public double ReceiveRate(int id)
        => Rate(sample => Array.Find(sample.Report.RemoteConnections, c => c.Id == id)?.ReceivedBytes ?? 0);

    /// <summary>Rates over the whole span, the present last.</summary>
    /// <param name="what">What grows.</param>
    /// <param name="columns">How many rates, at least 1.</param>
    /// <returns>A rate for each column; null where nothing is known.</returns>
    public double?[] Rates(Func<Sample, double> what, int columns)
    {
        // Columns begin at multiples of their width: they do not change when they move to the left.
        double width = Math.Max(Span / columns, 0.5), end = Math.Ceiling(Now / width) * width;
        var rates = new double?[columns];
        for (int i = 0; i < columns; i++)
        {
            double from = end - ((columns - i) * width);
            rates[i] = RateBetween(what, from, Math.Min(from + width, Now));
        }

        return rates;
    }

    /// <summary>How long misses took that were answered in the last seconds.</summary>
    /// <param name="median">Half of them took at most this time, in microseconds.</param>
    /// <param name="p99">Of a hundred, 99 took at most this time, in microseconds.</param>
    /// <returns>How many misses there were.</returns>
    public long Latency(out long median, out long p99)
    {
        (median, p99) = (0, 0);
        if (Last is not { } last)
            return 0;
        WatchReport first = (_samples.FindLast(sample => sample.Time <= Now - LatencySpan) ?? _samples[0]).Report;
        var before = new Dictionary<long, long>();
        foreach (WatchLatency bucket in first.MissLatency)
            before[bucket.MaxUs] = bucket.Count;
        List<WatchLatency> buckets =
        [
            .. last.MissLatency.OrderBy(bucket => bucket.MaxUs).Select(
                bucket => bucket with { Count = bucket.Count - before.GetValueOrDefault(bucket.MaxUs) })
                .Where(bucket => bucket.Count > 0),
        ];
        double all = buckets.Sum(bucket => (double)bucket.Count);
        (median, p99) = (At(0.5), At(0.99));
        return (long)Math.Min(all, long.MaxValue / 2);

        long At(double share)
        {
            double passed = 0;
            foreach (WatchLatency bucket in buckets)
            {
                passed += bucket.Count;
                if (passed >= all * share)
                    return bucket.MaxUs;
            }

            return 0;
        }
    }

    /// <summary>When the job's present phase will have ended, as far as its rate tells.</summary>
    /// <returns>Null if no job runs, or if nobody can know.</returns>
    public TimeSpan? Eta()
    {
        if (Last is not { Job: { State: "running" } job } last)
            return null;
        if (job.Kind == ProxyJobs.PrefetchKind)
            return null;
        bool isVerifying = job.Phase == "verify";
        double left = isVerifying ? (double)job.VerifyBlocks - job.VerifiedBlocks : last.MissingBlocks;
        double rate = isVerifying
            ? Rate(sample => sample.Report.Job?.VerifiedBlocks ?? 0, EtaSpan)
            : Rate(sample => -(double)sample.Report.MissingBlocks, EtaSpan);
        double seconds = left / rate;
        return left > 0 && rate > 0 && seconds < TimeSpan.FromDays(9999).TotalSeconds
            ? TimeSpan.FromSeconds(Math.Ceiling(seconds))
            : null;
    }

    private double RateSince(Func<Sample, double> what, double from) => RateBetween(what, from, Now) ?? 0;

    private double? RateBetween(Func<Sample, double> what, double from, double to)
        => to > from && At(what, from) is { } before && At(what, to) is { } after
            ? Math.Max(0, after - before) / (to - from)
            : null;

    /// <summary>What something was at a time between two reports; null outside of all.</summary>
    private double? At(Func<Sample, double> what, double time)
    {
        int next = _samples.FindIndex(sample => sample.Time >= time);
        if (next < 0 || (next == 0 && _samples[0].Time > time))
            return null;
        Sample after = _samples[next];
        if (next == 0 || after.Time <= time)
            return what(after);
        Sample before = _samples[next - 1];
        double share = (time - before.Time) / (after.Time - before.Time);
        return what(before) + (share * (what(after) - what(before)));
    }

    /// <summary>A report.</summary>
    /// <param name="Time">Its time.</param>
    /// <param name="RemoteBytes">Bytes that were received from the remote since the first report.</param>
    /// <param name="Report">The report.</param>
    internal sealed record Sample(double Time, double RemoteBytes, WatchReport Report);
}
