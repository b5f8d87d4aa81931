using System.Diagnostics;
using System.Security.Cryptography;
using Microsoft.Extensions.Logging;
using Xnbd.Client;
using Xnbd.Control;
using Xnbd.Server;
using Xnbd.Storage;
using Xnbd.Storage.Cache;
using Xnbd.Storage.Images;

namespace Xnbd.Programs;

/// <summary>
/// The proxy mode: a cache of a remote disk, and its control channel (<see cref="ProxyMethods"/>). After the switch it
/// is the target mode of the cache image.
/// </summary>
internal sealed class ProxyMode : IDisposable
{
    private readonly ProxyOptions _options;
    private readonly RemoteDisk? _remote; // null if the cache was switched before the start
    private readonly OriginCache _cache;
    private volatile OriginCache? _opened; // the cache, once it is open
    private readonly ILogger _log;
    private readonly ProxyEvents _events;
    private readonly ProxyMethods _methods;
    private ControlServer? _control;
    private readonly Lock _switching = new(); // one switch at a time, which is told once
    private long _storeFailures;

    /// <summary>Connects to the remote, if it is needed, and opens the cache.</summary>
    /// <exception cref="FailureException">The remote cannot be used.</exception>
    /// <exception cref="DiskException">The cache cannot be used.</exception>
    /// <exception cref="OperationCanceledException">The server was told to stop while it waited for the
    /// remote.</exception>
    public ProxyMode(ProxyOptions options, bool readOnly, ILogger log, CancellationToken stop)
    {
        _options = options;
        _log = log;
        _events = new ProxyEvents(options, log);
        bool isCleared = (options.Opening & CacheOpening.Clear) != 0;
        using SavedCache? saved = isCleared ? null : SavedCache.Find(options.Map);
        if (saved is { WasSwitched: true })
        {
            _cache = saved.OpenSwitched(options.RemoteNames, options.CacheImage, options.Opening, readOnly);
            log.LogInformation(
                "this proxy was switched before: it is a target of '{Image}', and asks no remote", options.CacheImage);
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
        _cache.Begun = () => _log.LogInformation("a client has written: what is read from now on is kept");
        if (_cache.TryPassThrough())
            _log.LogInformation("reads pass through, and nothing is kept, until a client writes");
        else
            _log.LogInformation("blocks are here already: what is read is kept");
    }

    /// <summary>Told of what the administrator wants to know.</summary>
    public ProxyEvents Events => _events;

    /// <summary>The disk that is served.</summary>
    public Disk Disk => _cache.Disk;

    /// <summary>The cache image after the switch; null before.</summary>
    public ImageFile? Image => _cache.Image;

    /// <summary>The remote's address at present, for people; none if this was a target from the start.</summary>
    public string RemoteName => _remote?.Address.ToString() ?? "none";

    /// <summary>The ids of the proxies that reads pass through; none after the switch.</summary>
    public IReadOnlyList<ulong> Trail => Image is null ? _remote!.Trail : [];

    /// <summary>The cache image's path.</summary>
    public string CacheImagePath => _options.CacheImage;

    /// <summary>How often fetched data could not be cached.</summary>
    public long StoreFailures => Interlocked.Read(ref _storeFailures);

    /// <summary>Tells what clients have moved, for the query.</summary>
    public Func<ServerTraffic> Traffic { get; set; } = () => default;

    /// <summary>Opens the control channel.</summary>
    public void StartControl()
    {
        try
        {
            _control = ControlServer.Start(_options.ControlSocket, _methods.Call);
        }
        catch (Exception failure) when (failure is IOException or ArgumentException)
        {
            throw new FailureException(
                $"cannot listen on the control socket '{_options.ControlSocket}': {failure.Message}");
        }
    }

    /// <summary>Switches as the control channel's <c>switch</c> does. A failure is logged, not thrown.</summary>
    public void SwitchBySignal()
    {
        try
        {
            Switch(force: false);
        }
        catch (Exception failure)
        {
            // This runs on its own thread, so nobody else would catch it.
            string cause = failure is DiskException ? Advice.Describe(failure) : failure.ToString();
            _log.LogError("not switched: {Cause}", cause);
        }
    }

    /// <summary>Makes the cache durable.</summary>
    public Task FlushAll() => _cache.FlushAll();

    /// <inheritdoc/>
    public void Dispose()
    {
        _control?.Dispose();
        _methods.EndJob();
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
            Log = _log,
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
                    _log.LogWarning("waiting for the remote: {Cause}", failure.Message);
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
            _log.LogWarning(
                "the remote cannot be used, and is not needed, since all is cached: {Cause}", failure.Message);
            return true;
        }

        if (_options.RemoteTimeout > TimeSpan.Zero)
            return false;
        _log.LogWarning(
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
            _log.LogError(
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
