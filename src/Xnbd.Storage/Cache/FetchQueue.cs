using System.Diagnostics;
using Xnbd.Linux;
using Xnbd.Storage.Maps;
using Xnbd.Storage.Threads;

namespace Xnbd.Storage.Cache;

/// <summary>
/// The reads of the origin. Whoever needs an absent block joins the fetch of that block, or makes one.
/// <para>
/// The way of a cold read, from top to bottom of this file: <see cref="ReadAsync"/> joins fetches (<c>Join</c>), and
/// waits; a fetch is let in when there is room (<c>LetIn</c>), and sent (<c>Send</c>); <c>Run</c> reads the origin,
/// lets the readers go on, and hands the data over to be stored; when that is done, <see cref="End"/> takes the fetch
/// from the list.
/// </para>
/// <para>
/// Invariants. A block that is absent and in no fetch of the list may be fetched; so a fetch leaves the list only after
/// the map was changed. At most <c>limits.Requests</c> fetches are in flight. Bytes in flight and bytes that have
/// arrived and are not stored are at most <c>limits.Bytes</c> together. Fetches of one purpose are let in in the order
/// in which they were made: first all misses, then what is read ahead, then the copy. What is no miss also waits for
/// its turn: <see cref="FetchPace"/> tells how much may be in flight.
/// </para>
/// <para>
/// Threads and locks: any thread may call anything. <c>_lock</c> guards the lists, the counts and the states of the
/// fetches. While it is held, nothing is sent, nobody's continuation runs, and no other lock is taken; the map is only
/// read, which takes none. Callers may hold blocks in <c>BlockLocks</c>.
/// </para>
/// Nothing here survives the process: what was not stored is fetched again. The type's other
/// files: <c>FetchQueue.Order.cs</c> (who is let in next), <c>FetchQueue.Detaching.cs</c> (the end of fetches when the
/// origin changes, or is not needed any more).
/// </summary>
internal sealed partial class FetchQueue : IDisposable
{
    private readonly Disk _origin;
    private readonly BlockMap _map;
    private readonly long _length;
    private readonly long _maxBytes;
    private readonly int _maxRequests;
    private readonly Func<long, Memory<byte>, CancellationToken, ValueTask> _readLocal;
    private readonly Action<Fetch> _arrived;
    private readonly TimeProvider _time;
    private readonly Action _send;
    private readonly BufferPool _buffers = new(Fetch.MaxBytes * 8);

    private readonly Lock _lock = new();
    private readonly List<Fetch> _fetches = []; // those that may be joined
    private readonly Queue<Fetch> _toSend = new();
    private int _requestsInFlight; // let in, and not answered by the origin
    private long _bytesInFlight; // of those; other threads read it without the lock, as an estimate
    private long _bytesArrived; // of fetches that are to be stored; read as an estimate, too
    private CancellationTokenSource _detaching = new(); // cancelled when nobody is to wait for the origin any more
    private bool _isDetached;
    private long _fetchedBytes;

    /// <summary>
    /// The queue whose fetches this thread is sending: they may be answered at once, and let others in.
    /// </summary>
    [ThreadStatic]
    private static FetchQueue? t_sending;

    /// <summary>Makes an empty queue.</summary>
    /// <param name="origin">The disk that is read; it is the caller's.</param>
    /// <param name="map">Which blocks are local.</param>
    /// <param name="limits">How much is under way at most.</param>
    /// <param name="readLocal">Reads what has become local after a reader has missed it.</param>
    /// <param name="arrived">
    /// Takes a fetch whose data have arrived; <see cref="End"/> is called when it is over.
    /// </param>
    /// <param name="time">The clock of the pace; the system's unless given.</param>
    public FetchQueue(
        Disk origin,
        BlockMap map,
        CacheLimits limits,
        Func<long, Memory<byte>, CancellationToken, ValueTask> readLocal,
        Action<Fetch> arrived,
        TimeProvider? time = null)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(limits.Requests, 1);
        ArgumentOutOfRangeException.ThrowIfLessThan(limits.Bytes, Fetch.MaxBytes);
        _origin = origin;
        _map = map;
        _length = map.Header.Source.Length;
        _maxRequests = limits.Requests;
        _maxBytes = limits.Bytes;
        _readLocal = readLocal;
        _arrived = arrived;
        _time = time ?? TimeProvider.System;
        _send = Send;
    }

    /// <summary>How long readers have waited.</summary>
    public MissLatency Latency { get; } = new();

    /// <summary>The ranges that are being fetched, up to the moment when they are stored.</summary>
    public List<BlockRange> Ranges
    {
        get
        {
            lock (_lock)
                return _fetches.ConvertAll(static fetch => fetch.Range);
        }
    }

    /// <summary>Bytes that were read from the origin so far.</summary>
    public long FetchedBytes => Interlocked.Read(ref _fetchedBytes);

    /// <summary>Reads of the origin that are under way, and their bytes.</summary>
    public (int Requests, long Bytes) InFlight
    {
        get
        {
            lock (_lock)
                return (_requestsInFlight, _bytesInFlight);
        }
    }

    /// <summary>Reads blocks that were absent. All fetches have been asked for when this returns.</summary>
    /// <param name="offset">Offset in bytes.</param>
    /// <param name="buffer">At least one byte.</param>
    /// <param name="cancel">Ends the waiting; nothing of a fetch is copied into the buffer afterwards.</param>
    /// <exception cref="DiskException">The origin failed, or is detached.</exception>
    public async ValueTask ReadAsync(long offset, Memory<byte> buffer, CancellationToken cancel = default)
    {
        long since = Stopwatch.GetTimestamp();
        BlockRange left = BlockRange.Touching(offset, buffer.Length);
        Fetch? first = Join(left, FetchPurpose.Miss, out BlockRange covered);
        left = left.After(covered);
        if (left.Count == 0)
        {
            await ReadPart(first, offset, buffer, cancel);
            Latency.Note(since);
            return;
        }

        // It takes more than one fetch: all are asked for before any is waited for.
        var parts = new List<(Fetch? Fetch, BlockRange Range)> { (first, covered) };
        while (left.Count > 0)
        {
            Fetch? next = Join(left, FetchPurpose.Miss, out covered);
            parts.Add((next, covered));
            left = left.After(covered);
        }

        Exception? failure = null;
        foreach ((Fetch? fetch, BlockRange range) in parts)
        {
            long start = Math.Max(offset, range.Offset);
            long end = Math.Min(offset + buffer.Length, range.End * BlockRange.BlockSize);
            try
            {
                await ReadPart(fetch, start, buffer[(int)(start - offset)..(int)(end - offset)], cancel);
            }
            catch (Exception caught) when (caught is DiskException or OperationCanceledException)
            {
                failure ??= caught; // the others are waited for all the same: each holds its buffer
            }
        }

        cancel.ThrowIfCancellationRequested();
        if (failure is not null)
            throw failure;
        Latency.Note(since);
    }

    /// <summary>Fetches the start of a range, until it is in the file and in the map.</summary>
    /// <param name="range">At least one block.</param>
    /// <param name="purpose">Who wants it.</param>
    /// <param name="cancel">Ends the waiting.</param>
    /// <returns>
    /// The start of the range; and false if some of it was not stored, because writers hold it: then it is to be asked
    /// for again when they have left.
    /// </returns>
    /// <exception cref="DiskException">The origin failed, or the data cannot be stored.</exception>
    public async Task<(BlockRange Covered, bool IsStored)> FetchAsync(
        BlockRange range, FetchPurpose purpose, CancellationToken cancel = default)
    {
        if (Join(range, purpose, out BlockRange covered) is not { } fetch)
            return (covered, true);
        try
        {
            await fetch.Stored.Task.WaitAsync(cancel);
            return (covered, !fetch.IsSkipped);
        }
        catch (OperationCanceledException)
        {
            GiveUp(fetch);
            throw;
        }
        finally
        {
            Release(fetch);
        }
    }

    /// <summary>Starts to read ahead the start of a range, and waits for nothing.</summary>
    /// <returns>The start of the range.</returns>
    public BlockRange Start(BlockRange range)
    {
        if (Join(range, FetchPurpose.ReadAhead, out BlockRange covered) is { } fetch)
            Release(fetch);
        return covered;
    }

    /// <summary>Joins the fetch of a range's first block, or makes one.</summary>
    /// <param name="range">At least one block.</param>
    /// <param name="purpose">
    /// Who wants it. What is missed next to a miss at the same time goes out with it.
    /// </param>
    /// <param name="covered">The start of the range, as far as the fetch has it, or as it is local.</param>
    /// <returns>A fetch, to be released; null when the blocks are local by now.</returns>
    private Fetch? Join(BlockRange range, FetchPurpose purpose, out BlockRange covered)
    {
        Fetch fetch;
        lock (_lock)
        {
            // A fetch leaves the list after the map was changed: what is neither local nor in the list must be fetched.
            BlockRange run = _map.Run(range, out BlockState state);
            if (state != BlockState.Absent)
            {
                covered = run;
                return null;
            }

            long end = Math.Min(run.End, run.First + Fetch.MaxBlocks);
            Fetch? before = null, behind = null, present = null;
            foreach (Fetch other in _fetches)
            {
                if (other.Range.First <= range.First && range.First < other.Range.End)
                    (end, present) = (Math.Min(run.End, other.Range.End), other);
                else if (other.Range.First > range.First && other.Range.First <= end)
                    (end, behind) = (other.Range.First, other);
                else if (other.Range.End == range.First)
                    before = other;
                if (present is not null)
                    break;
            }

            covered = range with { Count = end - range.First };
            if (present is not null)
            {
                present.References++;
                if (present.Place is not { } place || purpose >= present.Purpose)
                    return present;
                fetch = present;
                Promote(fetch, place, purpose);
            }
            else
            {
                if (purpose == FetchPurpose.Miss && before is not null && TryGrow(before, covered, before.Range.First))
                    return before;
                if (purpose == FetchPurpose.Miss && behind is not null && TryGrow(behind, covered, range.First))
                    return behind;
                fetch = new Fetch(covered, purpose);
                if (_isDetached)
                {
                    fetch.References = 1; // nobody will end it
                    fetch.Fail(Replaced());
                    return fetch;
                }

                _fetches.Add(fetch);
                Enqueue(fetch);
            }

            LetIn();
            if (_toSend.Count == 0)
                return fetch; // it is sent when others have made room
        }

        SendSoon();
        return fetch;
    }

    /// <summary>Adds blocks next to a fetch, if it has not been sent and has room. The lock is held.</summary>
    private bool TryGrow(Fetch fetch, BlockRange added, long first)
    {
        var grown = new BlockRange(first, fetch.Range.Count + added.Count);
        long bytes = added.LengthOn(_length);
        if (!fetch.MayGrow || grown.Count > Fetch.MaxBlocks || (fetch.IsCounted && !HasRoom(bytes)))
            return false;
        fetch.Range = grown;
        if (fetch.IsCounted)
            _bytesInFlight += bytes;
        fetch.References++;
        return true;
    }

    private bool HasRoom(long bytes) => _bytesInFlight + _bytesArrived + bytes <= _maxBytes;

    private long BytesOf(Fetch fetch) => fetch.Range.LengthOn(_length);

    /// <summary>Sends fetches at the end of this thread's batch: until then their neighbours may be added.</summary>
    private void SendSoon()
    {
        if (!DeferredWork.TryDefer(WorkPhase.Send, _send))
            Send();
    }

    private void Send()
    {
        if (ReferenceEquals(t_sending, this))
            return; // the loop that sends on this thread goes on with them
        FetchQueue? outer = t_sending;
        t_sending = this;
        try
        {
            while (true)
            {
                Fetch? fetch;
                lock (_lock)
                {
                    if (!_toSend.TryDequeue(out fetch))
                        return;
                    fetch.MayGrow = false;
                }

                _ = Run(fetch);
            }
        }
        finally
        {
            t_sending = outer;
        }
    }

    /// <summary>Reads the origin, lets the readers go on, and hands the data over to be stored.</summary>
    private async Task Run(Fetch fetch)
    {
        int length = (int)BytesOf(fetch);
        DiskException? failure = null;
        try
        {
            if (fetch.Arrived.Task.IsCompleted)
                throw Replaced(); // the queue was detached before it was sent
            fetch.Buffer = _buffers.Rent(length);
            await _origin.ReadAsync(fetch.Range.Offset, fetch.Buffer.Memory[..length]);
            Interlocked.Add(ref _fetchedBytes, length);
        }
        catch (Exception caught)
        {
            failure = caught as DiskException ?? new DiskException(DiskError.NoMemory, caught.Message);
        }

        lock (_lock)
        {
            Answered(fetch, length, isSuccess: failure is null);
            if (failure is null)
                _bytesArrived += length;
            else
                fetch.IsCounted = false;
            LetIn();
        }

        if (failure is null)
        {
            _arrived(fetch); // it is stored when the replies have gone out, and ends then
            fetch.Arrived.TrySetResult(); // unless the queue was detached
        }
        else
        {
            EndOne(fetch, failure);
            fetch.Fail(failure);
        }

        SendSoon();
    }

    /// <summary>Waits for a fetch, takes a part of its data, and releases it.</summary>
    private async ValueTask ReadPart(Fetch? fetch, long offset, Memory<byte> buffer, CancellationToken cancel)
    {
        if (fetch is null)
        {
            await _readLocal(offset, buffer, cancel);
            return;
        }

        BlockRange needed = BlockRange.Touching(offset, buffer.Length);
        try
        {
            await fetch.Arrived.Task.WaitAsync(cancel);
            fetch.Buffer!.Slice((int)(offset - fetch.Range.Offset), buffer.Length).CopyTo(buffer.Span);
            return;
        }
        catch (OperationCanceledException)
        {
            GiveUp(fetch);
            throw;
        }
        catch (DiskException failure) when (fetch.Range.Count > needed.Count
            && failure.Error is not (DiskError.Replaced or DiskError.TimedOut or DiskError.Unreachable))
        {
            // A bad sector among what was fetched with it must not fail a good one: it is read once more, alone.
        }
        finally
        {
            Release(fetch);
        }

        byte[] alone = new byte[needed.LengthOn(_length)];
        await ReadOrigin(needed.Offset, alone, cancel);
        alone.AsMemory((int)(offset - needed.Offset), buffer.Length).CopyTo(buffer);
    }

    /// <summary>
    /// Gives the room of a fetch to others: it waits for writers, who may wait for a fetch themselves.
    /// </summary>
    public void ReleaseRoom(Fetch fetch)
    {
        lock (_lock)
        {
            Uncount(fetch);
            LetIn();
        }

        Send();
    }

    /// <summary>Ends fetches: their data are in the file and in the map, or will not be.</summary>
    public void End(IReadOnlyList<(Fetch Fetch, DiskException? Failure)> fetches)
    {
        foreach ((Fetch fetch, DiskException? failure) in fetches)
            EndOne(fetch, failure);
        lock (_lock)
            LetIn();
        Send();
    }

    private void EndOne(Fetch fetch, DiskException? failure)
    {
        lock (_lock)
        {
            _fetches.Remove(fetch);
            Uncount(fetch);
        }

        if (failure is null)
            fetch.Stored.TrySetResult();
        else
            fetch.FailStoring(failure);
        Release(fetch);
    }

    /// <summary>Takes the bytes of a fetch that has arrived from the count. The lock is held.</summary>
    private void Uncount(Fetch fetch)
    {
        if (fetch.IsCounted)
            _bytesArrived -= BytesOf(fetch);
        fetch.IsCounted = false;
    }

    private void Release(Fetch fetch)
    {
        NativeBuffer? buffer;
        lock (_lock)
        {
            if (--fetch.References > 0)
                return;
            buffer = fetch.Buffer;
            fetch.Buffer = null;
        }

        if (buffer is not null)
            _buffers.Return(buffer);
    }

    /// <summary>Frees the buffers that nobody uses; the others are freed when they come back.</summary>
    public void Dispose() => _buffers.Dispose();
}
