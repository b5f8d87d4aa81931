using Xnbd.Storage.Maps;
using Xnbd.Storage.Overlay;
using Xnbd.Storage.Threads;

namespace Xnbd.Storage.Cache;

/// <summary>What a cache has done so far, and is doing.</summary>
/// <param name="AbsentBlocks">Blocks that are not local yet.</param>
/// <param name="FetchedBlocks">Blocks that are local and as the origin has them.</param>
/// <param name="WrittenBlocks">Blocks that were written or zeroed here.</param>
/// <param name="ZeroedBlocks">Those of them that were zeroed.</param>
/// <param name="Hits">Reads, or pieces of reads, that were answered at once from here.</param>
/// <param name="Misses">Reads, or pieces of reads, that had to wait for the origin.</param>
/// <param name="FetchedBytes">Bytes that were read from the origin since the start.</param>
/// <param name="ZeroBytes">
/// Bytes that were made zero here since the start, because the origin says that they are. They were not fetched.
/// </param>
/// <param name="FetchesInFlight">Reads of the origin that are under way.</param>
/// <param name="BytesInFlight">Bytes of these reads.</param>
public readonly record struct CacheStatistics(
    long AbsentBlocks,
    long FetchedBlocks,
    long WrittenBlocks,
    long ZeroedBlocks,
    long Hits,
    long Misses,
    long FetchedBytes,
    long ZeroBytes,
    int FetchesInFlight,
    long BytesInFlight);

/// <summary>Bounds of what a cache has under way.</summary>
/// <param name="Requests">Reads of the origin at once, at least 1.</param>
/// <param name="Bytes">
/// Bytes of these reads, and bytes that have arrived and are not in the file yet; together at least 1 MiB.
/// </param>
public readonly record struct CacheLimits(int Requests, long Bytes);

/// <summary>
/// A disk over a far one, the origin, which is never written: what was read or written once is local.
/// <para>
/// This type puts the parts together. <see cref="FetchQueue"/> reads the origin, and its file shows the way of a cold
/// read. <see cref="FetchStore"/> stores what has arrived. <see cref="ReadAhead"/> knows which readers go on in
/// sequence. <see cref="CacheFill"/> fetches all that is missing. Each of them has its own state; the first three have
/// a lock each. None of them calls another one.
/// </para>
/// <para>
/// Locks, in order: blocks held in <see cref="OverlayDisk.Changing"/>; then one of the parts' own locks. No part's lock
/// is held while another one is taken, or while anything is sent, read, written or called back.
/// </para>
/// What survives: see <see cref="OverlayDisk"/>. A copy that was not made durable is fetched again.
/// </summary>
internal sealed class CachingDisk : OverlayDisk
{
    /// <summary>How long the end of the program waits for what was fetched last to be stored.</summary>
    private static readonly TimeSpan s_maxStoring = TimeSpan.FromSeconds(1);

    /// <summary>How long a command waits for the origin, before it is refused.</summary>
    private static readonly TimeSpan s_maxOriginTime = TimeSpan.FromSeconds(20);

    /// <summary>How many pieces of a client's prefetch are under way, or being stored, at once.</summary>
    private const int MaxPrefetchPieces = 16;

    private readonly Disk _origin;
    private readonly FetchQueue _fetches;
    private readonly FetchStore _store;
    private readonly ReadAhead _readAhead;
    private readonly CacheFill _fill;
    private readonly CopyThrottle _throttle = new(TimeProvider.System);
    private readonly PassedBlocks _passed = new();
    private volatile bool _isIncoming;
    private long _hits;
    private long _misses;

    /// <summary>Composes the disk; it owns its parts from now on.</summary>
    /// <param name="origin">The far disk; it is only read.</param>
    /// <param name="cache">The local file, as long as the origin.</param>
    /// <param name="map">Which blocks the file holds.</param>
    /// <param name="readOnly">Clients do not write the disk; reads fill the cache all the same.</param>
    /// <param name="limits">Bounds of what is under way.</param>
    /// <param name="cannotStore">Told when what was fetched cannot be kept.</param>
    /// <param name="storeLater">
    /// Runs storing on a thread that may wait for the file; the disk threads by default.
    /// </param>
    public CachingDisk(
        Disk origin,
        Disk cache,
        BlockMap map,
        bool readOnly,
        CacheLimits limits,
        Action<DiskException> cannotStore,
        Action<IDiskWork>? storeLater = null)
        : base(cache, map, DiskFeatures.Layered | (readOnly ? DiskFeatures.ReadOnly : DiskFeatures.None))
    {
        _origin = origin;
        _readAhead = new ReadAhead(map.BlockCount);
        _store = new FetchStore(cache, map, Changing, maxHeldUpBytes: limits.Bytes)
        {
            HeldUp = fetch => _fetches!.ReleaseRoom(fetch),
            Ended = fetches => _fetches!.End(fetches),
            CannotStore = cannotStore,
            Flush = FlushAll,
            RunLater = storeLater ?? DiskThreads.NewWriters().Enqueue,
        };
        _fetches = new FetchQueue(origin, map, limits, readLocal: ReadAsync, arrived: _store.Add);
        _fill = new CacheFill(origin, cache, map, Changing, CopyTurnAsync, CopyAsync);
    }

    /// <summary>What it has done so far, and is doing.</summary>
    public CacheStatistics Statistics
    {
        get
        {
            (int requests, long bytes) = _fetches.InFlight;
            long[] blocks = Map.CountAll();
            return new CacheStatistics(
                blocks[(int)BlockState.Absent],
                blocks[(int)BlockState.Fetched],
                blocks[(int)BlockState.Written] + blocks[(int)BlockState.Zero],
                blocks[(int)BlockState.Zero],
                Interlocked.Read(ref _hits),
                Interlocked.Read(ref _misses),
                _fetches.FetchedBytes,
                _fill.ZeroBytes,
                requests,
                bytes);
        }
    }

    /// <summary>How long clients have waited for the origin.</summary>
    public List<LatencyBucket> MissLatency => _fetches.Latency.Buckets;

    /// <summary>Draws what is local, and what is being fetched; see <see cref="MapCells"/>.</summary>
    public string DrawMap(int cells) => MapCells.Draw(Map, cells, _fetches.Ranges);

    /// <inheritdoc/>
    public override bool TryRead(long offset, Span<byte> buffer)
    {
        if (!base.TryRead(offset, buffer))
            return false;
        NoteHit(offset, buffer.Length);
        return true;
    }

    /// <inheritdoc/>
    public override FileRange TryLocate(long offset, int length, bool findHoles)
    {
        FileRange range = base.TryLocate(offset, length, findHoles);
        if (range.Length > 0)
            NoteHit(offset, range.Length);
        return range;
    }

    /// <summary>
    /// The machine that uses the disk is still to come, and the origin changes: reads pass through, and nothing is
    /// kept. It ends with <see cref="Begin"/>, or with the first write.
    /// </summary>
    public bool IsIncoming => _isIncoming;

    /// <summary>Told when the first write has ended <see cref="IsIncoming"/>.</summary>
    public Action? Begun { get; set; }

    /// <summary>Lets reads pass through; see <see cref="IsIncoming"/>. Nothing is local, and nobody uses the disk yet.
    /// </summary>
    internal void PassThrough() => _isIncoming = true;

    /// <summary>What is read from now on is kept. Reads that are under way are not.</summary>
    /// <returns>False if it has begun already.</returns>
    public bool Begin()
    {
        return _isIncoming && Interlocked.Exchange(ref _isIncoming, false);
    }

    /// <inheritdoc/>
    public override bool TryWrite(long offset, ReadOnlySpan<byte> data)
    {
        BeginWithWrite();
        return base.TryWrite(offset, data);
    }

    /// <inheritdoc/>
    public override ValueTask WriteAsync(
        long offset, ReadOnlyMemory<byte> data, bool durable, CancellationToken cancel = default)
    {
        BeginWithWrite();
        return base.WriteAsync(offset, data, durable, cancel);
    }

    /// <inheritdoc/>
    public override ValueTask ZeroAsync(
        long offset, long length, ZeroMode mode, bool durable, CancellationToken cancel = default)
    {
        BeginWithWrite();
        return base.ZeroAsync(offset, length, mode, durable, cancel);
    }

    private void BeginWithWrite()
    {
        if (_isIncoming && Begin())
            Begun?.Invoke();
    }

    /// <summary>Holds back the background copy and the comparison with the origin; clients never.</summary>
    internal CopyThrottle Throttle => _throttle;

    /// <summary>What the line to the origin delivers, in bytes per second; 0 while nothing is known.</summary>
    public long LineRate => _fetches.Rate;

    /// <summary>Fetches what is missing.</summary>
    internal CacheFill Fill => _fill;

    /// <summary>Fetches all that is missing; see <see cref="CacheFill.RunAsync"/>.</summary>
    public Task CacheAll(int maxBlocks, int parallel, CancellationToken cancel)
        => _fill.RunAsync(all: true, maxBlocks, parallel, cancel);

    /// <summary>Compares what was fetched with the origin; see <see cref="CacheVerify.RunAsync"/>.</summary>
    public Task Verify(CacheVerification result, CancellationToken cancel)
        => new CacheVerify(_origin, Local, Map, Changing, CopyTurnAsync, ReadAgainAsync).RunAsync(result, cancel);

    /// <summary>
    /// Takes blocks that are as the origin has them. Blocks that somebody holds are left out. As long as hardly any are
    /// kept, blocks that have passed through tell more.
    /// </summary>
    public DiskSamples TakeSamples()
    {
        DiskSamples kept = CacheSamples.Take(Map, TryCopy, (Map.Header.Flags & MapFlags.MayHoldWrites) != 0);
        DiskSamples passed = _passed.Take();
        return passed.Blocks.Count > kept.Blocks.Count ? passed : kept;
    }

    /// <returns>A block; null if it is not as the origin has it, or if somebody holds it.</returns>
    private byte[]? TryCopy(BlockRange block)
    {
        if (!Changing.TryEnter(block))
            return null; // its holder may wait for the origin
        try
        {
            if (!Map.IsAll(block, BlockState.Fetched))
                return null;
            byte[] data = new byte[block.LengthOn(Length)];
            Local.ReadAsync(block.Offset, data).AsTask().GetAwaiter().GetResult();
            return data;
        }
        catch (DiskException)
        {
            return null;
        }
        finally
        {
            Changing.Leave(block);
        }
    }

    /// <summary>
    /// Gives up what was fetched, because the origin has changed. All is absent again, durably; what is being fetched
    /// reaches those who asked for it, but is not kept. A read that begins when this has ended sees the origin as it
    /// was when this began, or later.
    /// </summary>
    /// <exception cref="DiskException">
    /// Something was written here, which does not belong to other contents of the origin (and a fetched block may hold
    /// a write that a death of the machine has left half done); or the origin does not answer, so that what was fetched
    /// may be the only copy: all is kept. Or the map cannot be written, or somebody writes meanwhile: some of it may be
    /// kept.
    /// </exception>
    public async Task Invalidate()
    {
        RefuseIfWritten();
        try
        {
            if (Length > 0)
            {
                Task read = _origin.ReadAsync(0, new byte[Math.Min(Length, BlockRange.BlockSize)]).AsTask();
                await read.WaitAsync(s_maxOriginTime);
            }
        }
        catch (Exception failure) when (failure is DiskException or TimeoutException)
        {
            string reason = failure is DiskException ? failure.Message : "the remote does not answer";
            throw new DiskException(
                (failure as DiskException)?.Error ?? DiskError.TimedOut,
                $"what was fetched may be the only copy, and is kept: {reason}");
        }

        _fetches.Forget();
        _fill.Forget();
        _passed.Clear();

        // Absent blocks, too: one of them may be being stored, by a thread that has looked at its fetch before.
        using var late = new CancellationTokenSource(s_maxOriginTime);
        try
        {
            await Changing.ForEachAsync(
                Map,
                All,
                state => state is BlockState.Fetched or BlockState.Absent,
                part =>
                {
                    Map.Set(part, BlockState.Absent);
                    return ValueTask.CompletedTask;
                },
                cancel: late.Token);
        }
        catch (OperationCanceledException)
        {
            throw new DiskException(
                DiskError.TimedOut,
                "a client's write waits for the remote: only a part of what was fetched was given up");
        }

        await FlushAll();
        RefuseIfWritten();
    }

    /// <summary>
    /// Writes zeroes to the file where blocks are absent; the map does not change. Blocks that somebody holds are left
    /// out, since the holder may wait for the origin.
    /// </summary>
    public Task ZeroAbsent(CancellationToken cancel)
        => Changing.ForEachAsync(
            Map, All, state => state == BlockState.Absent, ZeroInFile, skipsHeld: true, cancel);

    /// <summary>
    /// Makes sure that the file itself holds zeroes where the map says zero, and says so in the map. If the map is
    /// sealed, no block is zero afterwards. Absent blocks become zeroes of the file, too, if they are given up.
    /// </summary>
    public Task Materialize(bool giveUpAbsent, CancellationToken cancel)
        => Changing.ForEachAsync(
            Map,
            All,
            state => state == BlockState.Zero || (state == BlockState.Absent && giveUpAbsent),
            async part =>
            {
                await ZeroInFile(part);
                Map.Set(part, BlockState.Written);
            },
            skipsHeld: false,
            cancel);

    /// <summary>Nobody waits for the origin any more; see <see cref="FetchQueue.Detach"/>.</summary>
    internal void Detach()
    {
        _fetches.Detach();
        _throttle.IsOpen = true; // nothing is left for a copy that is held back
    }

    /// <summary>The origin is needed again; see <see cref="FetchQueue.Reattach"/>.</summary>
    internal void Reattach()
    {
        _fetches.Reattach();
        _throttle.IsOpen = false;
    }

    /// <summary>
    /// Waits until what has arrived by now is stored, or could not be. It waits for a short time, since storing may
    /// wait for writers.
    /// </summary>
    internal async Task WaitUntilStored()
    {
        try
        {
            await _fetches.WhenArrivedAreStored().WaitAsync(s_maxStoring);
        }
        catch (Exception failure) when (failure is DiskException or TimeoutException)
        {
            // What is not kept is fetched again some day.
        }
    }

    /// <summary>
    /// Ends the storing, and frees memory; see <see cref="FetchStore.Stop"/>. The origin is closed already.
    /// </summary>
    internal void StopStoring()
    {
        _store.Stop();
        _fetches.Dispose();
    }

    /// <inheritdoc/>
    protected override bool IsAbsentSlow => true;

    /// <inheritdoc/>
    protected override bool TryReadAbsent(long offset, Span<byte> buffer) => false;

    /// <inheritdoc/>
    protected override ValueTask ReadAbsentAsync(long offset, Memory<byte> buffer, CancellationToken cancel)
    {
        Interlocked.Increment(ref _misses);
        if (_isIncoming)
            return ReadThrough(offset, buffer, cancel);
        BlockRange ahead = _readAhead.Next(BlockRange.Touching(offset, buffer.Length), _fetches.HasRoomAhead);
        ValueTask read = _fetches.ReadAsync(offset, buffer, cancel); // first of all what is waited for
        _fill.NoteMiss(offset / BlockRange.BlockSize);
        StartAhead(ahead);
        return read;
    }

    private async ValueTask ReadThrough(long offset, Memory<byte> buffer, CancellationToken cancel)
    {
        await _fetches.ReadThroughAsync(offset, buffer, cancel);
        _passed.Note(offset, buffer.Span);
    }

    /// <inheritdoc/>
    protected override FileRange TryLocateAbsent(long offset, int length, bool findHoles) => FileRange.None;

    /// <inheritdoc/>
    protected override async ValueTask PrefetchAbsentAsync(
        long offset, long length, CancellationToken cancel)
    {
        if (_isIncoming)
            return; // nothing is kept
        // A request of any length must not fill the room: it is worked off in pieces, a few at a time.
        var options = new ParallelOptions { MaxDegreeOfParallelism = MaxPrefetchPieces, CancellationToken = cancel };
        await Parallel.ForEachAsync(
            Pieces(BlockRange.Touching(offset, length), _fetches.AheadBlocks),
            options,
            async (piece, end) => await FetchAsync(piece, FetchPurpose.ReadAhead, end));
    }

    private static IEnumerable<BlockRange> Pieces(BlockRange range, int pieceBlocks)
    {
        for (BlockRange left = range; left.Count > 0;)
        {
            BlockRange piece = ReadAhead.FirstPiece(left, pieceBlocks);
            yield return piece;
            left = left.After(piece);
        }
    }

    /// <inheritdoc/>
    protected override ValueTask GetAbsentExtentsAsync(long offset, long length, ExtentList extents)
        => _origin.GetExtentsAsync(offset, length, extents);

    /// <inheritdoc/>
    protected override void SyncHasFailed()
    {
        try
        {
            // The kernel may have dropped what it could not write. The next start goes by what has been made durable,
            // and fetches the rest again.
            Map.ChangeHeader(header => header with { BootId = Guid.Empty });
        }
        catch (DiskException)
        {
            // Then the next start believes the live map, as it does after any other end.
        }
    }

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (!disposing)
            return;
        _origin.Dispose();
        StopStoring();
        Local.Dispose();
    }

    private BlockRange All => new(0, Map.BlockCount);

    private ValueTask ZeroInFile(BlockRange range)
        => Local.ZeroAsync(range.Offset, range.LengthOn(Length), ZeroMode.MayPunch, durable: false);

    /// <summary>A read found all it needed.</summary>
    private void NoteHit(long offset, int length)
    {
        Interlocked.Increment(ref _hits);
        if (_readAhead.IsTriggered(offset))
            StartAhead(_readAhead.Next(BlockRange.Touching(offset, length), _fetches.HasRoomAhead));
    }

    /// <summary>Starts to fetch what a reader in sequence will want.</summary>
    private void StartAhead(BlockRange ahead)
    {
        try
        {
            for (int pieceBlocks = ahead.Count > 0 ? _fetches.AheadBlocks : 0; ahead.Count > 0;)
                ahead = ahead.After(_fetches.Start(ReadAhead.FirstPiece(ahead, pieceBlocks)));
        }
        catch (OutOfMemoryException)
        {
            // Nobody waits for it; and a read that has begun must not be left.
        }
    }

    /// <summary>Fetches what is absent of a range, until it is in the file, and fails if it cannot be.</summary>
    private async Task FetchAsync(BlockRange range, FetchPurpose purpose, CancellationToken cancel = default)
    {
        while (range.Count > 0)
        {
            (BlockRange covered, bool isStored) = await _fetches.FetchAsync(range, purpose, cancel);
            if (isStored)
            {
                range = range.After(covered);
                continue;
            }

            await Changing.EnterAsync(covered, cancel); // when its writers have left, it is asked for again
            Changing.Leave(covered);
        }

        while (_store.StepToWaitFor() is { } step)
            await step.WaitAsync(cancel);
    }

    private Task CopyAsync(BlockRange range)
    {
        _throttle.Charge(range.LengthOn(Length));
        return FetchAsync(range, FetchPurpose.Copy);
    }

    private Task ReadAgainAsync(BlockRange range, Memory<byte> buffer)
    {
        _throttle.Charge(buffer.Length);
        return _fetches.ReadAgainAsync(range, buffer);
    }

    /// <summary>
    /// Waits until the copy, or the comparison, should read another piece of the origin: it is not held back, what was
    /// stored is durable, and the line is free.
    /// </summary>
    /// <returns>How many blocks the piece should have at most.</returns>
    private async Task<int> CopyTurnAsync(CancellationToken cancel)
    {
        await _throttle.WaitAsync(cancel);
        while (_store.StepToWaitFor() is { } step)
            await step.WaitAsync(cancel);
        int blocks = await _fetches.TurnAsync(cancel);
        return Math.Min(blocks, _throttle.MaxBlocks);
    }

    private void RefuseIfWritten()
    {
        if (Map.IsSealed)
        {
            throw new DiskException(
                DiskError.Permission,
                "a switch has failed at its last step, and the map may say that it succeeded: nothing can be given up");
        }

        if ((Map.Header.Flags & MapFlags.MayHoldWrites) != 0)
        {
            throw new DiskException(
                DiskError.Permission,
                "blocks that were fetched may have been written here since: the proxy was switched to a target, or the"
                + " machine has died",
                Remedy.ClearMap);
        }

        if (Map.Count(BlockState.Written) + Map.Count(BlockState.Zero) is var written and > 0)
        {
            throw new DiskException(
                DiskError.Permission,
                $"{written} blocks were written here, and do not belong to other contents of the remote");
        }
    }
}
