using System.Diagnostics;
using System.Text.Json.Nodes;
using Microsoft.Extensions.Logging;
using Xnbd.Storage;
using Xnbd.Storage.Cache;

namespace Xnbd.Programs;

/// <summary>Fetches all that is missing, in the background.</summary>
internal sealed class CacheAllJob
{
    private static readonly TimeSpan s_maxWait = TimeSpan.FromSeconds(30);

    private readonly OriginCache _cache;
    private readonly CancellationTokenSource _cancel = new();
    private readonly Task _task;
    private readonly long _start = Stopwatch.GetTimestamp();
    private string _state = "running";
    private string? _error;

    public CacheAllJob(int id, OriginCache cache, int blocksPerRequest, ILogger log)
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
                double seconds = Stopwatch.GetElapsedTime(_start).TotalSeconds;
                log.LogInformation("caching all: {State}, {Seconds:0.0} s", _state, seconds);
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

    /// <summary>Identifies the job on the control channel.</summary>
    public int Id { get; }

    /// <summary>The job has not ended.</summary>
    public bool IsRunning => !_task.IsCompleted;

    /// <summary>Tells the job to end, without waiting for it.</summary>
    public void End() => _cancel.Cancel();

    /// <summary>Tells the job to end, and waits for that.</summary>
    public void Cancel()
    {
        End();
        _task.Wait(s_maxWait);
    }

    /// <summary>Reports the state, after the job has ended or this time has passed.</summary>
    public JsonObject Status(int waitMilliseconds)
    {
        _task.Wait(TimeSpan.FromMilliseconds(Math.Clamp(waitMilliseconds, 0, s_maxWait.TotalMilliseconds)));
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
