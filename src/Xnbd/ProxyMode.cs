using System.Diagnostics;
using System.Security.Cryptography;
using System.Text.Json.Nodes;
using Microsoft.Extensions.Logging;
using Xnbd.Client;
using Xnbd.Linux;
using Xnbd.Programs.Serving;
using Xnbd.Server;
using Xnbd.Storage;
using Xnbd.Storage.Cache;
using Xnbd.Storage.Images;

namespace Xnbd.Programs;

/// <summary>
/// The proxy mode: a cache of a remote disk, and its control channel (<see cref="ProxyMethods"/>). After the switch it
/// is the target mode of the cache image.
/// </summary>
internal sealed class ProxyMode : ServedDisk
{
    private readonly ProxyOptions _options;
    private readonly RemoteDisk? _remote; // null if the cache was switched before the start
    private readonly OriginCache _cache;
    private volatile OriginCache? _opened; // the cache, once it is open
    private readonly ProxyEvents _events;
    private readonly ProxyMethods _methods;
    private readonly bool _readOnly;
    private volatile Thread? _signalled; // the last switch by SIGUSR2
    private readonly Lock _switching = new(); // one switch at a time, which is told once
    private long _storeFailures;

    /// <summary>Connects to the remote, if it is needed, and opens the cache.</summary>
    /// <exception cref="FailureException">The remote cannot be used.</exception>
    /// <exception cref="DiskException">The cache cannot be used.</exception>
    /// <exception cref="OperationCanceledException">The server was told to stop while it waited for the
    /// remote.</exception>
    public ProxyMode(ProxyOptions options, bool readOnly, ILogger log, CancellationToken stop)
        : base(log, stop)
    {
        _options = options;
        _readOnly = readOnly;
        _events = new ProxyEvents(options, log);
        bool isCleared = (options.Opening & CacheOpening.Clear) != 0;
        using SavedCache? saved = isCleared ? null : SavedCache.Find(options.Map);
        if (saved is { WasSwitched: true })
        {
            _cache = saved.OpenSwitched(options.RemoteNames, options.CacheImage, options.Opening, readOnly);
            log.LogInformation(
                "this proxy was switched before: it is a target of '{Image}', and asks no remote", options.CacheImage);
            if (_cache.ExcessBytes > 0)
            {
                log.LogWarning(
                    "the cache image '{Image}' is {Excess} bytes longer than the disk that was switched, and these are"
                        + " not served; if it was enlarged on purpose, serve it with --target from now on",
                    options.CacheImage,
                    _cache.ExcessBytes);
            }

            foreach (string abandoned in readOnly ? [] : _cache.Image!.RemoveAbandonedSnapshots())
                log.LogWarning("removed an unfinished snapshot that a killed server left: {Path}", abandoned);
        }
        else
        {
            _remote = Connect(saved, stop);
            _cache = OriginCache.Open(
                _remote,
                [_remote.Address.ToString(), .. options.RemoteNames],
                options.CacheImage,
                options.Map,
                options.Opening,
                readOnly,
                options.FetchLimits,
                CannotStore,
                saved);
            _opened = _cache;
            if (options.Incoming)
                WaitForTheMachine();
        }

        _cache.MaxCopyRate = options.MaxCopyRate;
        _methods = new ProxyMethods(this, _cache, _remote, log);
    }

    /// <summary>Keeps nothing before a client has written, unless one has written in an earlier life.</summary>
    private void WaitForTheMachine()
    {
        _cache.Begun = () => Log.LogInformation("a client has written: what is read from now on is kept");
        if (_cache.TryPassThrough())
            Log.LogInformation("reads pass through, and nothing is kept, until a client writes");
        else
            Log.LogInformation("blocks are here already: what is read is kept");
    }

    /// <summary>Told of what the administrator wants to know.</summary>
    public ProxyEvents Events => _events;

    /// <inheritdoc/>
    public override string Mode => Image is null ? "proxy" : "target";

    /// <inheritdoc/>
    public override Disk Disk => _cache.Disk;

    /// <summary>The cache image after the switch; null before.</summary>
    public override ImageFile? Image => _cache.Image;

    /// <inheritdoc/>
    public override string FilePath => _options.CacheImage;

    /// <inheritdoc/>
    public override string Description
    {
        get
        {
            string origin = Image is null ? $"a cache of {_remote!.Address}" : "to which a proxy was switched";
            return $"'{FilePath}', {origin}, {Disk.Length} bytes, {(_readOnly ? "read-only" : "read-write")}";
        }
    }

    /// <summary>The ids of the proxies that reads pass through; none after the switch.</summary>
    public override IReadOnlyList<ulong> Trail => Image is null ? _remote!.Trail : [];

    /// <inheritdoc/>
    public override RequestLimits Limits => _options.ClientLimits;

    /// <summary>How much of the disk is cached, in percent.</summary>
    public double CachedPercent
    {
        get
        {
            CacheStatistics figures = _cache.Statistics;
            long cached = figures.FetchedBlocks + figures.WrittenBlocks, blocks = cached + figures.AbsentBlocks;
            return blocks == 0 ? 100 : Math.Floor(1000.0 * cached / blocks) / 10; // 100 only if nothing is missing
        }
    }

    /// <summary>How often fetched data could not be cached.</summary>
    public long StoreFailures => Interlocked.Read(ref _storeFailures);

    /// <summary>
    /// Starts a switch as the control channel's <c>switch</c> does it, on a thread of its own, since it may take a
    /// while. A failure is logged.
    /// </summary>
    public override void SwitchBySignal()
    {
        if (_signalled is { IsAlive: true })
            Log.LogWarning("it is being switched already; the signal is ignored");
        else if ((_signalled = LinuxThread.TryStart("switch", SwitchAndLog)) is null)
            Log.LogError("not switched: the system has no thread to spare");
    }

    /// <inheritdoc/>
    public override void WaitUntilEnded()
    {
        base.WaitUntilEnded();
        _signalled?.Join();
    }

    private void SwitchAndLog()
    {
        try
        {
            Switch(force: false);
        }
        catch (Exception failure)
        {
            // This runs on its own thread, so nobody else would catch it.
            string cause = failure is DiskException ? Advice.Describe(failure) : failure.ToString();
            Log.LogError("not switched: {Cause}", cause);
        }
    }

    /// <inheritdoc/>
    public override Task FlushAll() => _cache.FlushAll();

    /// <inheritdoc/>
    protected override JsonObject Query() => _methods.Query();

    /// <inheritdoc/>
    protected override JsonNode? CallOwn(string method, JsonObject parameters) => _methods.Call(method, parameters);

    /// <inheritdoc/>
    protected override void EndJobs() => _methods.EndJob();

    /// <inheritdoc/>
    protected override void Close()
    {
        _cache.Dispose(); // this also waits for a switch that a signal or a client has started
        _events.Dispose();
    }

    private RemoteDisk Connect(SavedCache? saved, CancellationToken stop)
    {
        DiskSamples samples = saved?.TakeSamples(_options.CacheImage) ?? DiskSamples.None;
        var remote = new RemoteOptions
        {
            Servers = _options.Remotes,
            LastServer = _options.Remotes.FirstOrDefault(server => server.ToString() == saved?.OriginName),
            TakeSamples = () => _opened?.TakeSamples() ?? samples,
            Record = Record,
            ExpectedLength = saved?.Length,
            ProxyId = BitConverter.ToUInt64(RandomNumberGenerator.GetBytes(sizeof(ulong))),
            MaxConnections = _options.Connections,
            Patience = _options.RemoteTimeout,
            Log = Log,
            Changed = _events.Remote,
        };
        long start = Stopwatch.GetTimestamp();
        bool? isComplete = null; // this reads the whole map
        for (bool isFirst = true; ; isFirst = false)
        {
            try
            {
                return RemoteDisk.Connect(remote);
            }
            catch (RemoteException failure)
            {
                isComplete ??= saved?.IsComplete() == true;
                if (saved is not null && !failure.IsOtherDisk && CanStartWithout(isComplete.Value, failure))
                    return ConnectLater(remote, saved.Length);
                if (Stopwatch.GetElapsedTime(start).TotalSeconds >= _options.WaitSeconds)
                    throw new FailureException(failure.Message);
                if (isFirst)
                    Log.LogWarning("waiting for the remote: {Cause}", failure.Message);
                if (stop.WaitHandle.WaitOne(500))
                    throw new OperationCanceledException(stop);
            }
        }
    }

    /// <summary>Records the server that is used from now on.</summary>
    /// <exception cref="DiskException">That failed, or the cache is still being opened, which records it.</exception>
    private void Record(RemoteAddress server)
    {
        if (_opened is not { } cache)
            throw new DiskException(DiskError.InUse, "the cache is still being opened");
        cache.Rebind(server.ToString());
    }

    /// <summary>Whether clients can be served although the remote is away; it is logged why.</summary>
    private bool CanStartWithout(bool isComplete, RemoteException failure)
    {
        if (isComplete)
        {
            Log.LogWarning(
                "the remote cannot be used, and is not needed, since all is cached: {Cause}", failure.Message);
            return true;
        }

        if (_options.RemoteTimeout > TimeSpan.Zero)
            return false;
        Log.LogWarning(
            "the remote cannot be used; reads of missing blocks fail until it is there: {Cause}", failure.Message);
        return true;
    }

    private static RemoteDisk ConnectLater(RemoteOptions remote, long length)
    {
        try
        {
            return RemoteDisk.ConnectLater(remote, length);
        }
        catch (RemoteException failure)
        {
            throw new FailureException(failure.Message);
        }
    }

    private void CannotStore(DiskException failure)
    {
        if (Interlocked.Increment(ref _storeFailures) == 1)
        {
            Log.LogError(
                "fetched data cannot be cached (further failures are only counted): {Cause}", failure.Message);
        }
    }

    /// <summary>Makes this a target of the cache image; nothing happens if it is one already.</summary>
    /// <param name="force">Even if blocks are missing: they become zeroes.</param>
    /// <exception cref="DiskException">It failed, and this is a proxy as before.</exception>
    public void Switch(bool force)
    {
        lock (_switching)
        {
            if (_cache.Image is not null)
                return;
            long start = Stopwatch.GetTimestamp(), missing = _cache.Statistics.AbsentBlocks;
            _cache.Switch(force);
            _events.Switched(missing, Stopwatch.GetElapsedTime(start));
        }
    }
}
