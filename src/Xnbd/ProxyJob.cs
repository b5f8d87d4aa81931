using System.Diagnostics;
using System.Text.Json.Nodes;
using Microsoft.Extensions.Logging;
using Xnbd.Programs.Watch;
using Xnbd.Storage;
using Xnbd.Storage.Cache;

namespace Xnbd.Programs;

/// <summary>
/// Long work of a proxy: one step or several, one after the other, in the background.
/// <para>
/// States: running; then done, failed or cancelled. The job's own task alone changes the fields; any thread reads them,
/// the result after the task has ended.
/// </para>
/// What survives: nothing of the job itself. What it has fetched stays, so that the same job goes on from there.
/// </summary>
internal sealed class ProxyJob
{
    private static readonly TimeSpan s_maxWait = TimeSpan.FromSeconds(30);

    private readonly OriginCache _cache;
    private readonly CancellationTokenSource _cancel = new();
    private readonly Task _task;
    private readonly long _start = Stopwatch.GetTimestamp();
    private volatile string _phase;
    private volatile bool _isEnding;
    private volatile CacheVerification? _verification;
    private string _state = "running";
    private string? _error;

    /// <summary>Starts a job.</summary>
    /// <param name="id">Identifies the job.</param>
    /// <param name="kind">What it does, as the method of the control channel is called.</param>
    /// <param name="cache">The cache.</param>
    /// <param name="log">Told of the start and the end.</param>
    /// <param name="steps">At least one; each one's name, and its work.</param>
    public ProxyJob(int id, string kind, OriginCache cache, ILogger log, params ProxyJobStep[] steps)
    {
        (Id, Kind, _cache, _phase) = (id, kind, cache, steps[0].Phase);
        Phases = [.. steps.Select(step => step.Phase)];
        log.LogInformation("{Job} begins", kind);
        _task = Task.Run(() => Run(steps, log));
    }

    /// <summary>Identifies the job on the control channel.</summary>
    public int Id { get; }

    /// <summary>What it does, as the method of the control channel is called.</summary>
    public string Kind { get; }

    /// <summary>The names of its steps.</summary>
    public IReadOnlyList<string> Phases { get; }

    /// <summary>The job has not ended.</summary>
    public bool IsRunning => !_task.IsCompleted;

    /// <summary>It will do no more than it has begun: no other work joins it.</summary>
    public bool IsEnding
    {
        get => _isEnding || _cancel.IsCancellationRequested;
        set => _isEnding = value;
    }

    /// <summary>Tells the job to end, without waiting for it.</summary>
    public void End() => _cancel.Cancel();

    /// <summary>Waits for the end of a job that ends soon.</summary>
    public void WaitUntilEnded() => _task.Wait(s_maxWait);

    /// <summary>Tells the job to end, and waits for that.</summary>
    public void Cancel()
    {
        End();
        WaitUntilEnded();
    }

    /// <summary>The comparison with the remote is under way, or is over.</summary>
    public void Show(CacheVerification verification) => _verification = verification;

    /// <summary>Reports the state, after the job has ended or this time has passed.</summary>
    public JsonObject Status(int waitMilliseconds)
    {
        _task.Wait(TimeSpan.FromMilliseconds(Math.Clamp(waitMilliseconds, 0, s_maxWait.TotalMilliseconds)));
        CacheStatistics figures = _cache.Statistics;
        bool isList = Kind == ProxyJobs.PrefetchKind;
        return new JsonObject
        {
            ["job"] = Id,
            ["kind"] = Kind,
            ["state"] = IsRunning ? "running" : _state,
            ["phase"] = _phase,
            ["error"] = IsRunning ? null : _error,
            ["blocks"] = isList
                ? _cache.PreferredTotal
                : figures.AbsentBlocks + figures.FetchedBlocks + figures.WrittenBlocks,
            ["missing-blocks"] = isList ? _cache.PreferredBlocks : figures.AbsentBlocks,
            ["paused"] = IsRunning && _cache.IsCopyPaused,
            ["fetched-bytes"] = figures.FetchedBytes,
            ["zero-bytes"] = figures.ZeroBytes,
            ["verification"] = _verification is { } verification ? Describe(verification) : null,
        };
    }

    /// <summary>Reports the state at once, in short.</summary>
    public WatchJob Report()
    {
        bool isRunning = IsRunning;
        bool isList = Kind == ProxyJobs.PrefetchKind;
        CacheVerification? verification = _verification;
        return new WatchJob(
            Kind,
            _phase,
            isRunning ? "running" : _state,
            isRunning ? null : _error,
            isList ? _cache.PreferredTotal : 0,
            isList ? _cache.PreferredBlocks : 0,
            verification?.Blocks ?? 0,
            verification?.DoneBlocks ?? 0,
            verification?.DifferentBlocks ?? 0);
    }

    private JsonObject Describe(CacheVerification verification) => new()
    {
        ["blocks"] = verification.Blocks,
        ["done-blocks"] = verification.DoneBlocks,
        ["written-blocks"] = verification.WrittenBlocks,
        ["different-blocks"] = verification.DifferentBlocks,
        ["read-bytes"] = verification.ReadBytes,
        ["may-hold-writes"] = verification.MayHoldWrites,
        ["differences"] = new JsonArray(
        [
            .. verification.Differences(_cache.Disk.Length).Select(
                range => new JsonObject { ["offset"] = range.Offset, ["length"] = range.Length }),
        ]),
    };

    private async Task Run(ProxyJobStep[] steps, ILogger log)
    {
        try
        {
            foreach (ProxyJobStep step in steps)
            {
                _phase = step.Phase;
                await _cache.WaitWhilePaused(_cancel.Token); // also a step that has nothing to read
                _error = await step.Work(this, _cancel.Token);
                if (_error is not null)
                    break;
            }

            _state = _error is null ? "done" : "failed";
        }
        catch (OperationCanceledException)
        {
            _state = "cancelled";
        }
        catch (Exception failure)
        {
            (_error, _state) = (failure is DiskException ? Advice.Describe(failure) : failure.ToString(), "failed");
        }

        string cause = _error is null ? "" : $": {_error}";
        log.Log(
            _error is null ? LogLevel.Information : LogLevel.Error,
            "{Job}: {State} after {Seconds:0.0} s{Cause}",
            Kind,
            _state,
            Stopwatch.GetElapsedTime(_start).TotalSeconds,
            cause);
    }
}

/// <summary>A step of a job.</summary>
/// <param name="Phase">Its name on the control channel.</param>
/// <param name="Work">Its work; the result says why it has failed, and is null if it has not.</param>
internal sealed record ProxyJobStep(string Phase, Func<ProxyJob, CancellationToken, Task<string?>> Work);
