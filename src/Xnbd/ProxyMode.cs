using System.Diagnostics;
using System.Text.Json.Nodes;
using Microsoft.Extensions.Logging;
using Xnbd.Client;
using Xnbd.Control;
using Xnbd.Storage;
using Xnbd.Storage.Cache;
using Xnbd.Storage.Images;

namespace Xnbd.Programs;

/// <summary>
/// The proxy mode: a cache of a remote disk, and the methods of its control channel (docs/control.md). After the switch it is
/// the target mode, of the cache image.
/// </summary>
internal sealed class ProxyMode : IDisposable
{
    private readonly ProxyOptions _options;
    private readonly RemoteDisk _remote;
    private readonly CacheDisk _cache;
    private readonly ILogger _log;
    private readonly Lock _lock = new();
    private readonly Lock _reconnecting = new();
    private ControlServer? _control;
    private CacheAllJob? _job; // the last one
    private int _jobs;
    private long _storeFailures;

    /// <summary>Connects to the remote and opens the cache.</summary>
    /// <exception cref="FailureException">The remote cannot be used.</exception>
    /// <exception cref="DiskException">The cache cannot be used.</exception>
    /// <exception cref="OperationCanceledException">It was told to stop while it waited for the remote.</exception>
    public ProxyMode(ProxyOptions options, bool readOnly, ILogger log, CancellationToken stop)
    {
        _options = options;
        _log = log;
        _remote = Connect(stop);
        _cache = CacheDisk.Open(
            _remote, options.Remote.ToString(), options.CacheImage, options.Map, options.Opening, readOnly, options.FetchLimits, CannotStore);
    }

    /// <summary>What is served.</summary>
    public Disk Disk => _cache.Disk;

    /// <summary>The cache image, once it has been switched to.</summary>
    public ImageFile? Image => _cache.Image;

    /// <summary>Sessions of clients, for the query.</summary>
    public Func<int> CountClients { get; set; } = () => 0;

    /// <summary>Opens the control channel.</summary>
    public void StartControl()
    {
        try
        {
            _control = ControlServer.Start(_options.ControlSocket, Call);
        }
        catch (Exception failure) when (failure is IOException or ArgumentException)
        {
            throw new FailureException($"cannot listen on the control socket '{_options.ControlSocket}': {failure.Message}");
        }
    }

    /// <summary>As the control channel's <c>switch</c>; logged, not thrown.</summary>
    public void SwitchBySignal()
    {
        try
        {
            Switch(force: false);
        }
        catch (Exception failure)
        {
            // Nobody above would catch it: this is a thread of its own.
            _log.LogError("not switched: {Cause}", failure is DiskException ? Advice.Describe(failure) : failure.ToString());
        }
    }

    /// <summary>Makes durable what is cached.</summary>
    public Task FlushAll() => _cache.FlushAll();

    /// <inheritdoc/>
    public void Dispose()
    {
        _control?.Dispose();
        lock (_lock)
            _job?.End();
        _cache.Dispose(); // also waits for a switch that a signal or a client has begun
    }

    private RemoteDisk Connect(CancellationToken stop)
    {
        long start = Stopwatch.GetTimestamp();
        for (bool isFirst = true; ; isFirst = false)
        {
            try
            {
                return RemoteDisk.Connect(_options.Remote, _options.Connections, _log);
            }
            catch (RemoteException failure) when (Stopwatch.GetElapsedTime(start).TotalSeconds < _options.WaitSeconds)
            {
                if (isFirst)
                    _log.LogWarning("waiting for the remote: {Cause}{Hint}", failure.Message, SwitchedHint());
                if (stop.WaitHandle.WaitOne(500))
                    throw new OperationCanceledException(stop);
            }
            catch (RemoteException failure)
            {
                throw new FailureException(failure.Message + SwitchedHint());
            }
        }
    }

    /// <summary>A proxy that was switched needs no remote, but must be started as what it has become.</summary>
    private string SwitchedHint() => CacheDisk.WasSwitched(_options.Map)
        ? $"; this proxy was switched: '{_options.CacheImage}' is complete, and the remote is not needed any more: "
            + $"start xnbd-server --target {_options.CacheImage}"
        : "";

    private void CannotStore(DiskException failure)
    {
        if (Interlocked.Increment(ref _storeFailures) == 1)
            _log.LogError("what was fetched cannot be cached (further failures are counted only): {Cause}", failure.Message);
    }

    private void Switch(bool force)
    {
        if (_cache.Image is not null)
            return;
        _cache.Switch(force);
        _log.LogInformation("switched: this is a target now, of '{Image}'; the remote is no longer used", _options.CacheImage);
    }

    private JsonNode? Call(string method, JsonObject parameters)
    {
        try
        {
            switch (method)
            {
                case "query":
                    return Query();
                case "cache-all":
                    return StartCacheAll(parameters["blocks-per-request"]?.GetValue<int>() ?? 256);
                case "job.status":
                    return Job(parameters).Status(parameters["wait-ms"]?.GetValue<int>() ?? 0);
                case "job.cancel":
                    CacheAllJob job = Job(parameters);
                    job.Cancel();
                    return job.Status(0);
                case "switch":
                    Switch(parameters["force"]?.GetValue<bool>() ?? false);
                    return Query();
                case "reconnect":
                    return Reconnect(parameters);
                case "invalidate":
                    return Invalidate();
                default:
                    throw new ControlException(ControlException.NoSuchMethod, $"there is no method '{method}'");
            }
        }
        catch (Exception failure) when (failure is DiskException or RemoteException)
        {
            throw new ControlException(ControlException.Failed, Advice.Describe(failure));
        }
    }

    private JsonObject Query()
    {
        CacheStatistics figures = _cache.Statistics;
        long blocks = figures.AbsentBlocks + figures.FetchedBlocks + figures.WrittenBlocks, cached = blocks - figures.AbsentBlocks;
        bool isTarget = _cache.Image is not null;
        return new JsonObject
        {
            ["mode"] = isTarget ? "target" : "proxy",
            ["remote"] = isTarget ? null : _remote.Address.ToString(),
            ["remote-connections"] = isTarget ? 0 : _remote.ConnectionCount,
            ["cache-image"] = _options.CacheImage,
            ["size"] = Disk.Length,
            ["block-size"] = BlockRange.BlockSize,
            ["blocks"] = blocks,
            ["cached-blocks"] = cached,
            ["cached-bytes"] = Math.Min(cached * BlockRange.BlockSize, Disk.Length),
            ["fetched-blocks"] = figures.FetchedBlocks,
            ["written-blocks"] = figures.WrittenBlocks,
            ["hits"] = figures.Hits,
            ["misses"] = figures.Misses,
            ["fetched-bytes"] = figures.FetchedBytes,
            ["zero-bytes"] = figures.ZeroBytes,
            ["requests-in-flight"] = figures.FetchesInFlight,
            ["bytes-in-flight"] = figures.BytesInFlight,
            ["store-failures"] = Interlocked.Read(ref _storeFailures),
            ["clients"] = CountClients(),
            ["job"] = _job?.Status(0),
        };
    }

    private JsonObject StartCacheAll(int blocksPerRequest)
    {
        if (blocksPerRequest is < 1 or > 256)
            throw new ControlException(ControlException.InvalidParameters, "blocks-per-request: not a number from 1 to 256");
        lock (_lock)
        {
            if (_job is not { IsRunning: true })
                _job = new CacheAllJob(++_jobs, _cache, blocksPerRequest, _log);
            return _job.Status(0); // the one that is running does the same
        }
    }

    private CacheAllJob Job(JsonObject parameters)
    {
        int id = parameters["job"]?.GetValue<int>() ?? throw new ControlException(ControlException.InvalidParameters, "job: its id is missing");
        lock (_lock)
        {
            return _job?.Id == id ? _job : throw new ControlException(ControlException.Failed, $"there is no job {id} (any more)");
        }
    }

    private JsonObject Invalidate()
    {
        if (_job is { IsRunning: true })
            throw new ControlException(ControlException.Failed, "all is being cached: end that first (xnbd-bgctl --cancel)");
        _cache.Invalidate();
        _log.LogInformation("invalidated: what was fetched is absent again");
        return Query();
    }

    private JsonObject Reconnect(JsonObject parameters)
    {
        if (_cache.Image is not null)
            throw new ControlException(ControlException.Failed, "this is a target now: there is no remote");
        RemoteAddress address;
        try
        {
            string? name = parameters["export-name"]?.GetValue<string>();
            string host = parameters["host"]?.GetValue<string>() ?? "", port = parameters["port"]?.GetValue<string>() ?? "";
            if (parameters["uri"]?.GetValue<string>() is not { } uri)
                address = RemoteAddress.Parse(host, port, name ?? _remote.Address.ExportName);
            else if (host.Length == 0 && port.Length == 0)
                address = RemoteUri.Parse(uri, name);
            else
                throw new FormatException("the remote is named by uri, or by host and port");
            if (!CacheDisk.CanRecord(address.ToString()))
                throw new FormatException("the remote's address is too long to be recorded");
        }
        catch (FormatException failure)
        {
            throw new ControlException(ControlException.InvalidParameters, failure.Message);
        }

        lock (_reconnecting)
            _remote.SwitchTo(address, known => _cache.Rebind(known.ToString()));

        return Query();
    }
}

/// <summary>The fetching of all that is missing, in the background.</summary>
internal sealed class CacheAllJob
{
    private static readonly TimeSpan s_longestWait = TimeSpan.FromSeconds(30);

    private readonly CacheDisk _cache;
    private readonly CancellationTokenSource _cancel = new();
    private readonly Task _task;
    private readonly long _start = Stopwatch.GetTimestamp();
    private string _state = "running";
    private string? _error;

    public CacheAllJob(int id, CacheDisk cache, int blocksPerRequest, ILogger log)
    {
        Id = id;
        _cache = cache;
        log.LogInformation("caching all that is missing");
        _task = Task.Run(async () =>
        {
            try
            {
                await cache.CacheAll(blocksPerRequest, _cancel.Token);
                long absent = cache.Statistics.AbsentBlocks;
                (_state, _error) = absent == 0 ? ("done", null) : ("failed", $"{absent} blocks are still missing");
                log.LogInformation("caching all: {State}, {Seconds:0.0} s", _state, Stopwatch.GetElapsedTime(_start).TotalSeconds);
            }
            catch (OperationCanceledException)
            {
                _state = "cancelled";
                log.LogInformation("caching all: cancelled");
            }
            catch (Exception failure)
            {
                (_error, _state) = (failure is DiskException ? failure.Message : failure.ToString(), "failed");
                log.LogError("caching all: {Cause}", _error);
            }
        });
    }

    public int Id { get; }

    public bool IsRunning => !_task.IsCompleted;

    /// <summary>Ends it soon.</summary>
    public void End() => _cancel.Cancel();

    public void Cancel()
    {
        End();
        _task.Wait(s_longestWait);
    }

    /// <summary>How far it is, after it has ended, or this time.</summary>
    public JsonObject Status(int waitMilliseconds)
    {
        _task.Wait(TimeSpan.FromMilliseconds(Math.Clamp(waitMilliseconds, 0, s_longestWait.TotalMilliseconds)));
        CacheStatistics figures = _cache.Statistics;
        return new JsonObject
        {
            ["job"] = Id,
            ["state"] = IsRunning ? "running" : _state,
            ["error"] = IsRunning ? null : _error,
            ["blocks"] = figures.AbsentBlocks + figures.FetchedBlocks + figures.WrittenBlocks,
            ["missing-blocks"] = figures.AbsentBlocks,
            ["fetched-bytes"] = figures.FetchedBytes,
            ["zero-bytes"] = figures.ZeroBytes,
        };
    }
}
