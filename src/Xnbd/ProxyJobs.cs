using System.Diagnostics;
using Microsoft.Extensions.Logging;
using Xnbd.Control;
using Xnbd.Storage;
using Xnbd.Storage.Cache;

namespace Xnbd.Programs;

/// <summary>
/// The jobs of a proxy, of which one runs at a time. The last one is remembered.
/// <para>Any thread may call anything; <c>_lock</c> is held while a job is started or ended.</para>
/// </summary>
internal sealed class ProxyJobs(ProxyMode proxy, OriginCache cache, ILogger log)
{
    public const string CacheAllKind = "cache-all", VerifyKind = "verify", MoveKind = "move", PrefetchKind = "prefetch";

    private const string FetchPhase = "fetch", VerifyPhase = "verify";

    private readonly ProxyMode _proxy = proxy;
    private readonly OriginCache _cache = cache;
    private readonly ILogger _log = log;
    private readonly Lock _lock = new(); // held to change the two fields below; _last is also read without it
    private volatile ProxyJob? _last;
    private int _count;

    /// <summary>The last job; null if there was none.</summary>
    public ProxyJob? Last => _last;

    /// <summary>
    /// Fetches all that is missing. If that is under way, also as a part of a move, nothing new begins.
    /// </summary>
    /// <param name="blocksPerRequest">How many blocks one request fetches at most, 1 to 256.</param>
    public ProxyJob CacheAll(int blocksPerRequest)
        => Start(CacheAllKind, joins: [MoveKind], replaces: [PrefetchKind], null, [FetchStep(blocksPerRequest)]);

    /// <summary>
    /// Fetches what is missing of some ranges, in their order. A copy of all, or a move, that is under way, or is
    /// started before these are fetched, fetches them before the rest.
    /// </summary>
    /// <param name="ranges">Ranges inside the disk.</param>
    /// <returns>The job that fetches them; its kind tells which.</returns>
    /// <exception cref="ControlException">The disk is being compared with the remote.</exception>
    public ProxyJob Prefetch(IReadOnlyList<BlockRange> ranges)
    {
        var fetch = new ProxyJobStep(FetchPhase, async (job, cancel) =>
        {
            do
                await _cache.CachePreferred(cancel);
            while (!TryEnd(job));
            return null;
        });
        return Start(
            PrefetchKind, joins: [CacheAllKind, MoveKind], replaces: [], () => _cache.Prefer(ranges), [fetch]);
    }

    /// <summary>A job has fetched its lists: it ends, unless another one has joined meanwhile.</summary>
    private bool TryEnd(ProxyJob job)
    {
        lock (_lock)
        {
            if (_cache.PreferredBlocks > 0)
                return false;
            job.IsEnding = true;
            return true;
        }
    }

    /// <summary>Ends a job, waits for that, and forgets the lists that it had to fetch, and no later ones.</summary>
    public void Cancel(ProxyJob job)
    {
        lock (_lock)
        {
            if (job.IsRunning)
                job.End(); // from now on nobody joins it
            if (_last == job)
                _cache.PreferNothing();
        }

        job.Cancel();
    }

    /// <summary>Compares what was fetched with the remote.</summary>
    /// <exception cref="ControlException">This is a target, or another job is under way.</exception>
    public ProxyJob Verify()
        => _cache.Image is null
            ? Start(VerifyKind, joins: [], replaces: [], null, [VerifyStep()])
            : throw new ControlException(
                ControlException.Failed, "this is a target now: there is no remote to compare with");

    /// <summary>Fetches all that is missing, compares it with the remote, and switches.</summary>
    /// <param name="blocksPerRequest">How many blocks one request fetches at most, 1 to 256.</param>
    /// <param name="isVerified">Whether it is compared.</param>
    /// <exception cref="ControlException">Another job is under way, or a move that does not compare.</exception>
    public ProxyJob Move(int blocksPerRequest, bool isVerified)
    {
        ProxyJobStep fetch = FetchStep(blocksPerRequest);
        var end = new ProxyJobStep("switch", (_, cancel) =>
        {
            cancel.ThrowIfCancellationRequested();
            _proxy.Switch(force: false);
            return Task.FromResult<string?>(null);
        });
        return Start(
            MoveKind,
            joins: [],
            replaces: [CacheAllKind, PrefetchKind],
            null,
            isVerified ? [fetch, VerifyStep(), end] : [fetch, end],
            mustVerify: isVerified);
    }

    /// <summary>Finds a job.</summary>
    /// <exception cref="ControlException">It is not the last one.</exception>
    public ProxyJob Find(int id)
        => _last is { } job && job.Id == id
            ? job
            : throw new ControlException(ControlException.Failed, $"there is no job {id} (any more)");

    /// <summary>Refuses what makes no sense while a job runs.</summary>
    /// <exception cref="ControlException">A job runs.</exception>
    public void RefuseIfRunning()
    {
        if (_last is { IsRunning: true } job)
            throw Busy(job);
    }

    /// <summary>Ends a job that is running, and waits for that.</summary>
    public void End()
    {
        ProxyJob? last;
        lock (_lock)
            last = _last;
        last?.Cancel();
    }

    /// <param name="kind">The job that is wanted.</param>
    /// <param name="joins">Kinds that do the same and more: one that runs is the answer.</param>
    /// <param name="replaces">Kinds that are a part of it: one that runs is ended.</param>
    /// <param name="prepare">Done when it is certain that the job begins, or another one does its work.</param>
    /// <param name="steps">What the job does.</param>
    /// <param name="mustVerify">A job that does not compare with the remote does not do this one's work.</param>
    private ProxyJob Start(
        string kind,
        string[] joins,
        string[] replaces,
        Action? prepare,
        ProxyJobStep[] steps,
        bool mustVerify = false)
    {
        if (kind != VerifyKind)
            _cache.RefuseIfIncoming();
        if (_last is { IsRunning: true } last)
        {
            if (replaces.Contains(last.Kind))
                last.Cancel(); // this may take a while
            else if (last.IsEnding)
                last.WaitUntilEnded();
        }

        lock (_lock)
        {
            if (_last is { IsRunning: true } running)
            {
                if (running.IsEnding
                    || (running.Kind != kind && !joins.Contains(running.Kind))
                    || (mustVerify && !running.Phases.Contains(VerifyPhase)))
                {
                    throw Busy(running);
                }

                prepare?.Invoke();
                return running;
            }

            prepare?.Invoke();
            return _last = new ProxyJob(++_count, kind, _cache, _log, steps);
        }
    }

    private static ControlException Busy(ProxyJob job)
    {
        string work = job.Kind == CacheAllKind ? "all is being cached"
            : job.Kind == PrefetchKind ? "a list is being fetched"
            : job.Kind == VerifyKind ? "what was fetched is being verified" : "the disk is being moved";
        return new ControlException(ControlException.Failed, $"{work}: stop that first (xnbd-bgctl --cancel)");
    }

    private ProxyJobStep FetchStep(int blocksPerRequest) => new(FetchPhase, async (_, cancel) =>
    {
        long start = Stopwatch.GetTimestamp();
        CacheStatistics before = _cache.Statistics;
        await _cache.CacheAll(blocksPerRequest, cancel);
        CacheStatistics after = _cache.Statistics;
        if (after.AbsentBlocks > 0)
            return $"{after.AbsentBlocks} blocks are still missing";
        _proxy.Events.Copied(before, after, Stopwatch.GetElapsedTime(start));
        return null;
    });

    private ProxyJobStep VerifyStep() => new(VerifyPhase, async (job, cancel) =>
    {
        if (_cache.Image is not null)
            return null; // a switch has overtaken the move
        var result = new CacheVerification();
        job.Show(result);
        long start = Stopwatch.GetTimestamp();
        await _cache.Verify(result, cancel);
        _proxy.Events.Verified(result, Stopwatch.GetElapsedTime(start));
        if (result.DifferentBlocks == 0)
            return null;
        (long offset, _) = result.Differences(_cache.Disk.Length)[0];
        string hint = result.MayHoldWrites
            ? " (the machine has died since, so that they may hold what clients wrote before that)"
            : "";
        return $"{result.DifferentBlocks} blocks of {BlockRange.BlockSize} bytes are not as the remote has them, the"
            + $" first at byte {offset}{hint}";
    });
}
