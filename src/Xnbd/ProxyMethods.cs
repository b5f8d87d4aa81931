using System.Text.Json;
using System.Text.Json.Nodes;
using Microsoft.Extensions.Logging;
using Xnbd.Client;
using Xnbd.Control;
using Xnbd.Programs.Watch;
using Xnbd.Storage;
using Xnbd.Storage.Access;
using Xnbd.Storage.Cache;

namespace Xnbd.Programs;

/// <summary>
/// The methods of a proxy's control channel (docs/control.md). Each client of the channel calls them on a thread of its
/// own.
/// </summary>
internal sealed class ProxyMethods
{
    private readonly ProxyMode _proxy;
    private readonly OriginCache _cache;
    private readonly RemoteDisk? _remote; // null if this was a target from the start
    private readonly ILogger _log;
    private readonly ProxyJobs _jobs;
    private readonly ProxyWatch _watch;
    private readonly Lock _reconnecting = new();

    public ProxyMethods(ProxyMode proxy, OriginCache cache, RemoteDisk? remote, ILogger log)
    {
        (_proxy, _cache, _remote, _log) = (proxy, cache, remote, log);
        _jobs = new ProxyJobs(proxy, cache, log);
        _watch = new ProxyWatch(proxy, cache, remote, _jobs);
    }

    /// <summary>Carries out a method.</summary>
    /// <exception cref="ControlException">It failed; the message says why.</exception>
    public JsonNode? Call(string method, JsonObject parameters)
    {
        try
        {
            switch (method)
            {
                case "watch":
                    return JsonSerializer.SerializeToNode(
                        _watch.Report(Number(parameters, "cells", OriginCache.MaxCells) ?? ProxyWatch.DefaultCells),
                        WatchJson.Default.WatchReport);
                case "cache-all":
                    return _jobs.CacheAll(BlocksPerRequest(parameters)).Status(0);
                case "verify":
                    return _jobs.Verify().Status(0);
                case "move":
                    bool isVerified = parameters["verify"]?.GetValue<bool>() ?? true;
                    return _jobs.Move(BlocksPerRequest(parameters), isVerified).Status(0);
                case "job.status":
                    return FindJob(parameters).Status(parameters["wait-ms"]?.GetValue<int>() ?? 0);
                case "job.cancel":
                    ProxyJob job = FindJob(parameters);
                    _jobs.Cancel(job);
                    return job.Status(0);
                case "prefetch":
                    return _jobs.Prefetch(ReadList(parameters)).Status(0);
                case "set-rate":
                    return SetRate(parameters);
                case "pause":
                    return Pause(true);
                case "resume":
                    return Pause(false);
                case "switch":
                    _proxy.Switch(parameters["force"]?.GetValue<bool>() ?? false);
                    return Query();
                case "reconnect":
                    return Reconnect(parameters);
                case "begin":
                    bool hasBegun = _cache.Begin();
                    if (hasBegun)
                        _log.LogInformation("what is read from now on is kept");
                    JsonObject state = Query();
                    state["begun"] = hasBegun;
                    return state;
                case "invalidate":
                    return Invalidate();
                default:
                    throw new ControlException(ControlException.NoSuchMethod, $"there is no method '{method}'");
            }
        }
        catch (RemoteException failure)
        {
            throw new ControlException(ControlException.Failed, Advice.Describe(failure));
        }
    }

    /// <summary>The state.</summary>
    public JsonObject Query()
    {
        CacheStatistics figures = _cache.Statistics;
        long cached = figures.FetchedBlocks + figures.WrittenBlocks, blocks = cached + figures.AbsentBlocks;
        bool isTarget = _cache.Image is not null;
        return new JsonObject
        {
            ["mode"] = _proxy.Mode,
            ["remote"] = isTarget ? null : _remote!.Address.ToString(),
            ["remote-connections"] = isTarget ? 0 : _remote!.ConnectionCount,
            ["cache-image"] = _proxy.FilePath,
            ["size"] = _proxy.Disk.Length,
            ["block-size"] = BlockRange.BlockSize,
            ["blocks"] = blocks,
            ["cached-blocks"] = cached,
            ["cached-bytes"] = Math.Min(cached * BlockRange.BlockSize, _proxy.Disk.Length),
            ["fetched-blocks"] = figures.FetchedBlocks,
            ["written-blocks"] = figures.WrittenBlocks,
            ["incoming"] = _cache.IsIncoming,
            ["hits"] = figures.Hits,
            ["misses"] = figures.Misses,
            ["fetched-bytes"] = figures.FetchedBytes,
            ["zero-bytes"] = figures.ZeroBytes,
            ["requests-in-flight"] = figures.FetchesInFlight,
            ["bytes-in-flight"] = figures.BytesInFlight,
            ["max-copy-rate"] = _cache.MaxCopyRate is > 0 and var rate ? rate : null,
            ["copy-paused"] = _cache.IsCopyPaused,
            ["line-rate"] = _cache.LineRate,
            ["store-failures"] = _proxy.StoreFailures,
            ["clients"] = _proxy.Traffic().Connections,
            ["snapshot"] = _proxy.Snapshots.LastStatus,
            ["job"] = _jobs.Last?.Status(0),
        };
    }

    private static int BlocksPerRequest(JsonObject parameters)
        => Number(parameters, "blocks-per-request", 256) ?? 256;

    /// <returns>A parameter that is a number from 1 to <paramref name="max"/>; null if it was not given.</returns>
    private static int? Number(JsonObject parameters, string name, int max)
        => parameters[name]?.GetValue<int>() is not { } number ? null
            : number >= 1 && number <= max ? number
            : throw new ControlException(ControlException.InvalidParameters, $"{name}: not a number from 1 to {max}");

    private IReadOnlyList<BlockRange> ReadList(JsonObject parameters)
        => parameters["file"]?.GetValue<string>() is { } path && Path.IsPathFullyQualified(path)
            ? AccessList.Read(path, _proxy.Disk.Length)
            : throw new ControlException(ControlException.InvalidParameters, "file: its full path is wanted");

    private JsonObject SetRate(JsonObject parameters)
    {
        if (parameters["bytes-per-second"]?.GetValue<long>() is not (>= 0 and var rate))
        {
            throw new ControlException(
                ControlException.InvalidParameters, "bytes-per-second: not a number, or less than 0");
        }

        _cache.MaxCopyRate = rate;
        if (rate == 0)
            _log.LogInformation("the background copy is not limited any more");
        else
            _log.LogInformation("the background copy is limited to {Rate} bytes per second", rate);
        return Query();
    }

    private JsonObject Pause(bool isPaused)
    {
        if (_cache.IsCopyPaused != isPaused)
            _log.LogInformation("the background copy {Act}", isPaused ? "is paused" : "goes on");
        _cache.IsCopyPaused = isPaused;
        return Query();
    }

    private ProxyJob FindJob(JsonObject parameters)
        => _jobs.Find(parameters["job"]?.GetValue<int>()
            ?? throw new ControlException(ControlException.InvalidParameters, "job: its id is missing"));

    private JsonObject Invalidate()
    {
        _jobs.RefuseIfRunning();
        _cache.Invalidate();
        _log.LogInformation("invalidated: all fetched blocks are absent again");
        return Query();
    }

    private JsonObject Reconnect(JsonObject parameters)
    {
        RemoteAddress address;
        try
        {
            string? name = parameters["export-name"]?.GetValue<string>();
            string host = parameters["host"]?.GetValue<string>() ?? "";
            string port = parameters["port"]?.GetValue<string>() ?? "";
            if (parameters["uri"]?.GetValue<string>() is not { } uri)
                address = RemoteAddress.Parse(host, port, name ?? _remote?.Address.ExportName ?? "");
            else if (host.Length == 0 && port.Length == 0)
                address = RemoteUri.Parse(uri, name);
            else
                throw new FormatException("the remote is named by uri, or by host and port");
            if (!OriginCache.CanRecord(address.ToString()))
                throw new FormatException("the remote's address is too long to be recorded");
        }
        catch (FormatException failure)
        {
            throw new ControlException(ControlException.InvalidParameters, failure.Message);
        }

        if (_cache.Image is not null)
            return Query(); // its mode says that there is no remote any more
        lock (_reconnecting)
            _remote!.SwitchTo(address);

        return Query();
    }

    /// <summary>Ends a job that is running, and waits for that.</summary>
    public void EndJob() => _jobs.End();
}
