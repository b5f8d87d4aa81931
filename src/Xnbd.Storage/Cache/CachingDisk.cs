using Xnbd.Storage.Maps;
using Xnbd.Storage.Overlay;
using Xnbd.Storage.Threads;

namespace Xnbd.Storage.Cache;

/// <summary>What a cache has done so far, and is doing.</summary>
/// <param name="AbsentBlocks">Blocks that are not local yet.</param>
/// <param name="FetchedBlocks">Blocks that are local and as the origin has them.</param>
/// <param name="WrittenBlocks">Blocks that were written or zeroed here.</param>
/// <param name="Hits">Reads that found all they needed here.</param>
/// <param name="Misses">Reads, or parts of reads, that did not.</param>
/// <param name="FetchedBytes">Read from the origin since the start.</param>
/// <param name="ZeroBytes">Made zero here since the start, because the origin says that they are: they were not
/// fetched.</param>
/// <param name="FetchesInFlight">Reads of the origin under way.</param>
/// <param name="BytesInFlight">Bytes of them.</param>
public readonly record struct CacheStatistics(
    long AbsentBlocks,
    long FetchedBlocks,
    long WrittenBlocks,
    long Hits,
    long Misses,
    long FetchedBytes,
    long ZeroBytes,
    int FetchesInFlight,
    long BytesInFlight);

/// <summary>
/// A disk over a far one, the origin: what was read or written once is local. The origin is never written.
/// <para>
/// An absent block is fetched once, whoever asks and how many ask: a fetch that is under way stands in a list until what it
/// brought is in the file and in the map, and who misses a block in the meantime joins it. A reader gets its data when it has
/// arrived; the file is written afterwards. It is written while the blocks are held, and only where they are still absent: so
/// a fetch never overwrites what was written since it started. A reader that goes on in sequence is read ahead of.
/// </para>
/// <para>
/// Fetched bytes in memory are bounded: from when a fetch is let in until it is stored. A fetch that must wait for a
/// writer, to be stored, counts no more, as that writer may wait for a fetch itself: such ones have a bound of their own, beyond
/// which they are not kept.
/// </para>
/// Locks: <c>_fetching</c> guards the lists, the budget and the streams. Inside it nothing is held: the map is only read. Blocks
/// are held in <see cref="OverlayDisk.Changing"/>; <c>_fetching</c> may be taken while they are, never the other way round.
/// <para>
/// The type's other files: <c>CachingDisk.Fetching.cs</c>, <c>CachingDisk.Storing.cs</c>, <c>CachingDisk.Following.cs</c> (reading ahead),
/// <c>CachingDisk.Filling.cs</c>.
/// </para>
/// </summary>
internal sealed partial class CachingDisk : OverlayDisk
{
    /// <summary>The most that is fetched at once, in bytes: what is missing side by side goes out as one request.</summary>
    public const int MaxFetchBytes = 1 << 20;

    /// <summary>A failure within this time, in milliseconds, is what the origin says; later it is that it says nothing.</summary>
    private const int QuickFailure = 5000;

    private const int MaxFetchBlocks = MaxFetchBytes / BlockRange.BlockSize;

    private readonly Disk _origin;
    private readonly Action<DiskException> _cannotStore;
    private readonly BufferPool _buffers = new(MaxFetchBytes * 8);
    private readonly object _fetching = new();
    private readonly List<Fetch> _fetches = []; // all of them
    private readonly Queue<Fetch> _waiting = new(); // for room
    private readonly Queue<Fetch> _toSend = new();
    private readonly Queue<Fetch> _toStore = new();
    private readonly long _mostBytes;
    private readonly int _mostFetches;
    private int _running; // fetches that were let in, and that the origin has not answered yet
    private long _bytesInFlight; // of them
    private long _bytesToStore; // of those that have arrived
    private long _bytesHeldUp; // of those that wait for writers, to be stored
    private long _hits;
    private long _misses;
    private long _fetchedBytes;
    private long _zeroBytes;

    /// <summary>Composes the disk; it owns its parts from now on.</summary>
    /// <param name="origin">The far disk; it is only read.</param>
    /// <param name="cache">The local file, as long as the origin.</param>
    /// <param name="map">Which blocks it holds.</param>
    /// <param name="readOnly">The disk is not to be written by clients; reads fill the cache all the same.</param>
    /// <param name="limits">Of reads of the origin, and of bytes that were read and are not stored yet.</param>
    /// <param name="cannotStore">Told when what was fetched cannot be kept.</param>
    /// <param name="runStoring">Runs all storing, at any later time; by default it is done at once, or on a disk thread.</param>
    public CachingDisk(
        Disk origin, Disk cache, BlockMap map, bool readOnly, CacheLimits limits, Action<DiskException> cannotStore, Action<IDiskWork>? runStoring = null)
        : base(cache, map, DiskFeatures.Layered | (readOnly ? DiskFeatures.ReadOnly : DiskFeatures.Trim))
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(limits.Requests, 1);
        ArgumentOutOfRangeException.ThrowIfLessThan(limits.Bytes, MaxFetchBytes);
        _origin = origin;
        _mostFetches = limits.Requests;
        _mostBytes = limits.Bytes;
        _cannotStore = cannotStore;
        _runStoring = runStoring;
        _storeHere = () => StartStoring(isHere: true);
        _storeLast = () => Batch.TryPutOff(_storeHere); // there is a batch: it has put off this
        _sendFetches = SendFetches;
    }

    /// <summary>What it has done so far, and is doing.</summary>
    public CacheStatistics Statistics
    {
        get
        {
            (int fetches, long bytes) inFlight;
            lock (_fetching)
                inFlight = (_running, _bytesInFlight);
            long[] blocks = Map.CountAll();
            return new CacheStatistics(
                blocks[(int)BlockState.Absent],
                blocks[(int)BlockState.Fetched],
                blocks[(int)BlockState.Written] + blocks[(int)BlockState.Zero],
                Interlocked.Read(ref _hits),
                Interlocked.Read(ref _misses),
                Interlocked.Read(ref _fetchedBytes),
                Interlocked.Read(ref _zeroBytes),
                inFlight.fetches,
                inFlight.bytes);
        }
    }

    /// <inheritdoc/>
    public override bool TryRead(long offset, Span<byte> buffer)
    {
        if (!base.TryRead(offset, buffer))
            return false;
        Hit(offset, buffer.Length);
        return true;
    }

    /// <inheritdoc/>
    public override FileRange TryLocate(long offset, int length, bool findHoles)
    {
        FileRange range = base.TryLocate(offset, length, findHoles);
        if (range.Length > 0)
            Hit(offset, range.Length);
        return range;
    }

    /// <summary>
    /// Gives up what was fetched, because the origin has changed: all is absent again, durably, and what is being fetched
    /// reaches those who asked for it, but is not kept. A read that begins when this has ended sees the origin as it was when
    /// this began, or later.
    /// </summary>
    /// <exception cref="DiskException">
    /// Something was written here, which does not belong to other contents of the origin (and a fetched block may hold a write
    /// that a death of the machine has left half done); or the origin does not answer, so that what was fetched may be the only
    /// copy: all is kept. Or the map cannot be written, or somebody writes meanwhile: some of it may be kept.
    /// </exception>
    public async Task Invalidate()
    {
        RefuseIfWritten();
        try
        {
            if (Length > 0)
                await _origin.ReadAsync(0, new byte[Math.Min(Length, BlockRange.BlockSize)]);
        }
        catch (DiskException failure)
        {
            throw new DiskException(failure.Error, $"what was fetched may be the only copy, and is kept: {failure.Message}");
        }

        lock (_fetching)
        {
            foreach (Fetch fetch in _fetches)
                fetch.IsStale = true;
            _fetches.Clear(); // nobody joins them any more
            _invalidations++;
        }

        // Absent blocks, too: one of them may be being stored, by somebody who has looked at its fetch before.
        await ForEachHeld(All, state => state is BlockState.Fetched or BlockState.Absent, part =>
        {
            Map.Set(part, BlockState.Absent);
            return ValueTask.CompletedTask;
        });
        await FlushAll();
        RefuseIfWritten();
    }

    /// <inheritdoc/>
    protected override void SyncHasFailed()
    {
        try
        {
            // The kernel may have dropped what it could not write. The next start goes by what has been made durable: the rest is fetched again.
            Map.ChangeHeader(header => header with { BootId = Guid.Empty });
        }
        catch (DiskException)
        {
            // Then the next start believes the live map, as it does after any other end.
        }
    }

    private void RefuseIfWritten()
    {
        if (Map.IsSealed)
        {
            throw new DiskException(
                DiskError.Permission, "a switch has failed at its last step, and the map may say that it succeeded: nothing can be given up");
        }

        if ((Map.Header.Flags & MapFlags.MayHoldWrites) != 0)
        {
            throw new DiskException(
                DiskError.Permission,
                "blocks that were fetched may have been written here since: the disk was switched to, or the machine has died",
                Remedy.ClearMap);
        }

        if (Map.Count(BlockState.Written) + Map.Count(BlockState.Zero) is var written and > 0)
            throw new DiskException(DiskError.Permission, $"{written} blocks were written here, and do not belong to other contents of the remote");
    }

    /// <summary>
    /// Writes zeroes to the file where blocks are absent; the map does not change. Blocks that somebody holds are
    /// passed over:
    /// who holds them may wait for the origin.
    /// </summary>
    public Task ZeroAbsent(CancellationToken cancel)
        => ForEachHeld(All, state => state == BlockState.Absent, ZeroInFile, skipsHeld: true, cancel);

    /// <summary>
    /// Makes sure that the file itself holds zeroes where the map says zero, and says so in the map. If the map is
    /// sealed, no block is zero afterwards. Absent blocks become zeroes of the file, too, if they are to be given up.
    /// </summary>
    public Task Materialize(bool giveUpAbsent, CancellationToken cancel)
        => ForEachHeld(
            All,
            state => state == BlockState.Zero || (state == BlockState.Absent && giveUpAbsent),
            async part =>
            {
                await ZeroInFile(part);
                Map.Set(part, BlockState.Written);
            },
            skipsHeld: false,
            cancel);

    private ValueTask ZeroInFile(BlockRange range)
        => Local.ZeroAsync(range.Offset, range.LengthOn(Length), ZeroMode.MayPunch, durable: false);

    private BlockRange All => new(0, Map.BlockCount);

    /// <summary>Works on a range's blocks of some states, while they are held: nobody stores or writes there meanwhile.</summary>
    /// <param name="range">The blocks.</param>
    /// <param name="isMeant">The states.</param>
    /// <param name="work">What is done.</param>
    /// <param name="skipsHeld">Blocks that somebody else holds are passed over; else they are waited for.</param>
    /// <param name="cancel">Ends it.</param>
    private async Task ForEachHeld(
        BlockRange range,
        Func<BlockState, bool> isMeant,
        Func<BlockRange, ValueTask> work,
        bool skipsHeld = false,
        CancellationToken cancel = default)
    {
        for (BlockRange left = range; left.Count > 0;)
        {
            cancel.ThrowIfCancellationRequested();
            BlockRange run = Map.Run(left with { Count = Math.Min(left.Count, 16 * 1024) }, out BlockState state);
            left = new BlockRange(run.End, left.End - run.End);
            if (!isMeant(state))
                continue;
            if (!Changing.TryEnter(run))
            {
                if (skipsHeld)
                    continue;
                await Changing.EnterAsync(run);
            }

            try
            {
                for (BlockRange inside = run; inside.Count > 0;)
                {
                    BlockRange part = Map.Run(inside, out BlockState now);
                    inside = new BlockRange(part.End, inside.End - part.End);
                    if (isMeant(now))
                        await work(part);
                }
            }
            finally
            {
                Changing.Leave(run);
            }
        }
    }

    /// <inheritdoc/>
    protected override bool IsAbsentSlow => true;

    /// <inheritdoc/>
    protected override bool TryReadAbsent(long offset, Span<byte> buffer) => false;

    /// <inheritdoc/>
    protected override async ValueTask ReadAbsentAsync(long offset, Memory<byte> buffer)
    {
        Interlocked.Increment(ref _misses);
        long end = offset + buffer.Length;
        BlockRange wanted = Follow(offset, buffer.Length, out BlockRange ahead);
        Fetch? first = Join(wanted, mayGrow: true, out BlockRange covered);
        if (first is not null && (covered.End * BlockRange.BlockSize) >= end)
        {
            ReadAhead(ahead);
            await CopyFrom(first, offset, buffer);
            return;
        }

        // It takes more than one: all are asked for before any is waited for.
        var parts = new List<(Fetch? Fetch, BlockRange Range)> { (first, covered) };
        while (covered.End * BlockRange.BlockSize < end)
        {
            Fetch? next = Join(new BlockRange(covered.End, wanted.End - covered.End), mayGrow: true, out covered);
            parts.Add((next, covered));
        }

        ReadAhead(ahead);
        Exception? failure = null;
        foreach ((Fetch? fetch, BlockRange range) in parts)
        {
            long start = Math.Max(offset, range.Offset), partEnd = Math.Min(end, range.End * BlockRange.BlockSize);
            Memory<byte> part = buffer[(int)(start - offset)..(int)(partEnd - offset)];
            try
            {
                await (fetch is null ? ReadAsync(start, part) : CopyFrom(fetch, start, part)); // null: it has become local meanwhile
            }
            catch (DiskException caught)
            {
                failure ??= caught; // the others are waited for all the same: each holds its buffer
            }
        }

        if (failure is not null)
            throw failure;
    }

    /// <inheritdoc/>
    protected override FileRange TryLocateAbsent(long offset, int length, bool findHoles) => FileRange.None;

    /// <inheritdoc/>
    protected override async ValueTask PrefetchAbsentAsync(long offset, long length)
    {
        // A request of any length must not fill the budget: it is worked off piece by piece.
        for (BlockRange left = BlockRange.Touching(offset, length); left.Count > 0;)
        {
            var part = left with { Count = Math.Min(left.Count, MaxFetchBlocks) };
            await Bring(part);
            left = new BlockRange(part.End, left.End - part.End);
        }
    }

    /// <inheritdoc/>
    protected override ValueTask GetAbsentExtentsAsync(long offset, long length, ExtentList extents)
        => _origin.GetExtentsAsync(offset, length, extents);

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (!disposing)
            return;
        _origin.Dispose();
        StopStoring();
        Local.Dispose();
    }

    /// <summary>Fetches what is absent of a range, until it is in the file, and fails if it cannot be.</summary>
    private async Task Bring(BlockRange range)
    {
        while (range.Count > 0)
        {
            if (Join(range, mayGrow: false, out BlockRange covered) is { } fetch)
            {
                try
                {
                    await fetch.Stored.Task;
                }
                finally
                {
                    Release(fetch);
                }

                if (fetch.IsSkipped)
                {
                    await Changing.EnterAsync(covered); // when its writers have gone,
                    Changing.Leave(covered);
                    continue; // it is looked for anew
                }
            }

            range = new BlockRange(covered.End, Math.Max(0, range.End - covered.End));
        }

        while (StepToWaitFor() is { } step)
            await step;
    }

    /// <summary>Takes a part of what a fetch brings, and gives the fetch up.</summary>
    private async ValueTask CopyFrom(Fetch fetch, long offset, Memory<byte> buffer)
    {
        try
        {
            await fetch.Arrived.Task;
            fetch.Buffer!.Slice((int)(offset - fetch.Range.Offset), buffer.Length).CopyTo(buffer.Span);
            return;
        }
        catch (DiskException failure) when (failure.Error != DiskError.Replaced
            && MayHaveFailedForOthers(fetch, BlockRange.Touching(offset, buffer.Length)))
        {
            // A bad sector among what was fetched with it must not fail a good one: it is asked for once more, alone.
        }
        finally
        {
            Release(fetch);
        }

        byte[] alone = new byte[BlockRange.Touching(offset, buffer.Length).LengthOn(Length)];
        long start = BlockRange.Touching(offset, buffer.Length).Offset;
        try
        {
            await _origin.ReadAsync(start, alone).AsTask().WaitAsync(LettingGo);
        }
        catch (OperationCanceledException)
        {
            throw Replaced();
        }

        alone.AsMemory((int)(offset - start), buffer.Length).CopyTo(buffer);
    }

    /// <summary>The fetch was of more than is needed; and its failure was no time-out, which would only be repeated.</summary>
    private static bool MayHaveFailedForOthers(Fetch fetch, BlockRange needed)
        => fetch.Range.Count > needed.Count && Environment.TickCount64 - fetch.SentAt < QuickFailure;
}
