using System.Diagnostics;
using Xnbd.Client;
using Xnbd.Server;
using Xnbd.Storage.Cache;

namespace Xnbd.Programs.Watch;

/// <summary>
/// Makes the reports of a proxy. A report reads counters; the longest work is to sum up one number for each 64 MiB of
/// the disk, which takes a fraction of a millisecond for 16 TiB, and to read at most two pages of the map for each
/// cell. Locks of the proxy are held for no longer than a client's miss holds them. Nothing is changed, and nothing is
/// waited for. Any thread may call this.
/// </summary>
internal sealed class ProxyWatch(ProxyMode proxy, OriginCache cache, RemoteDisk? remote, ProxyJobs jobs)
{
    /// <summary>How many cells the map has, unless the client says so.</summary>
    public const int DefaultCells = 1024;

    private static readonly RemoteState s_noRemote = new(0, [], 0, null, null);

    private readonly ProxyMode _proxy = proxy;
    private readonly OriginCache _cache = cache;
    private readonly RemoteDisk? _remote = remote; // null if this was a target from the start
    private readonly ProxyJobs _jobs = jobs;
    private readonly long _start = Stopwatch.GetTimestamp();

    /// <summary>Reports what the proxy is doing.</summary>
    /// <param name="cells">How many cells the map has, 1 to <see cref="OriginCache.MaxCells"/>.</param>
    public WatchReport Report(int cells)
    {
        bool isTarget = _cache.Image is not null;
        RemoteState state = isTarget ? s_noRemote : _remote!.State;
        CacheStatistics figures = _cache.Statistics;
        ServerTraffic clients = _proxy.Traffic();
        return new WatchReport
        {
            UptimeMs = (long)Stopwatch.GetElapsedTime(_start).TotalMilliseconds,
            Mode = isTarget ? "target" : "proxy",
            Remote = isTarget ? null : _remote!.Address.ToString(),
            RemoteWanted = state.WantedConnections,
            RemoteConnections =
            [
                .. state.Connections.Select(connection => new WatchConnection(
                    connection.Id,
                    connection.Requests,
                    (long)connection.Silence.TotalMilliseconds,
                    connection.ReceivedBytes)),
            ],
            RemoteLostMs = state.Lost is { } lost ? (long)lost.TotalMilliseconds : null,
            RemoteFailure = state.Reason,
            RemoteWaitingReads = state.WaitingReads,
            Incoming = _cache.IsIncoming,
            CacheImage = _proxy.FilePath,
            Size = _proxy.Disk.Length,
            Blocks = figures.AbsentBlocks + figures.FetchedBlocks + figures.WrittenBlocks,
            MissingBlocks = figures.AbsentBlocks,
            FetchedBlocks = figures.FetchedBlocks,
            WrittenBlocks = figures.WrittenBlocks,
            ZeroedBlocks = figures.ZeroedBlocks,
            FetchedBytes = figures.FetchedBytes,
            ZeroBytes = figures.ZeroBytes,
            RequestsInFlight = figures.FetchesInFlight,
            BytesInFlight = figures.BytesInFlight,
            Hits = figures.Hits,
            Misses = figures.Misses,
            MissLatency =
            [
                .. _cache.MissLatency.Select(bucket => new WatchLatency(bucket.MaxMicroseconds, bucket.Count)),
            ],
            Clients = clients.Connections,
            ClientReadBytes = clients.ReadBytes,
            ClientWrittenBytes = clients.WrittenBytes,
            StoreFailures = _proxy.StoreFailures,
            CopyPaused = _cache.IsCopyPaused,
            Job = _jobs.Last?.Report(),
            Map = _cache.DrawMap(cells),
        };
    }
}
