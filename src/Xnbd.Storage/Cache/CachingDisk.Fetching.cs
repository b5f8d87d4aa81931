using Xnbd.Linux;
using Xnbd.Storage.Maps;
using Xnbd.Storage.Threads;

namespace Xnbd.Storage.Cache;

/// <content>Fetches: joined, started, bounded.</content>
internal sealed partial class CachingDisk
{
    private readonly Action _sendFetches;
    private CancellationTokenSource _lettingGo = new(); // cancelled when nobody is to wait for the origin any more
    private bool _hasLetGo;

    /// <summary>The disk whose fetches this thread is sending: they may be answered at once, and let others in.</summary>
    [ThreadStatic]
    private static CachingDisk? t_isSending;

    /// <summary>
    /// A read of the origin. States: waiting for room, or to be sent; sent; arrived, and to be stored; stored. Everybody who
    /// waits for it, and the storing, holds a reference; the last one gives the buffer back.
    /// </summary>
    private sealed class Fetch(BlockRange range, bool mayGrow)
    {
        public readonly TaskCompletionSource Arrived = new(); // its readers go on at once, where the data arrived
        public readonly TaskCompletionSource Stored = new(TaskCreationOptions.RunContinuationsAsynchronously);
        public NativeBuffer? Buffer;
        public int References = 2; // whoever makes it, and its own
        public long SentAt; // in milliseconds of the system's clock
        public bool IsCounted; // among the bytes that are under way, or to be stored
        public bool IsHeldUp; // uncounted, but among the bytes that wait for writers to be stored
        public volatile bool IsSkipped; // some of it was not stored: writers held it, and too much waited already
        public volatile bool IsStale; // the origin may have changed since: it is not to be stored

        /// <summary>What it brings; until it is sent, neighbours that are missed as well may be added on both sides.</summary>
        public BlockRange Range { get; set; } = range;

        /// <summary>It has not been sent, and is one of those to which neighbours are added.</summary>
        public bool MayGrow { get; set; } = mayGrow;
    }

    /// <summary>Joins the fetch that brings a range's first block, or makes one.</summary>
    /// <param name="range">At least one block.</param>
    /// <param name="mayGrow">It is missed by a reader: what its neighbours miss at the same time goes out with it.</param>
    /// <param name="covered">The range's beginning, as far as the fetch brings it, or as it is local.</param>
    /// <returns>A fetch, to be released; null when the blocks are local by now.</returns>
    private Fetch? Join(BlockRange range, bool mayGrow, out BlockRange covered)
    {
        Fetch fetch;
        lock (_fetching)
        {
            // A fetch leaves the list after the map has been changed: what is neither there nor local must be fetched.
            BlockRange run = Map.Run(range, out BlockState state);
            if (state != BlockState.Absent)
            {
                covered = run;
                return null;
            }

            long end = Math.Min(run.End, run.First + MaxFetchBlocks);
            Fetch? before = null, behind = null;
            foreach (Fetch other in _fetches)
            {
                if (other.Range.First <= range.First && range.First < other.Range.End)
                {
                    covered = range with { Count = Math.Min(run.End, other.Range.End) - range.First };
                    other.References++;
                    return other;
                }

                if (other.Range.First > range.First && other.Range.First <= end)
                    (end, behind) = (other.Range.First, other);
                else if (other.Range.End == range.First)
                    before = other;
            }

            covered = range with { Count = end - range.First };
            if (mayGrow && before is not null && TryGrow(before, covered, before.Range.First))
                return before;
            if (mayGrow && behind is not null && TryGrow(behind, covered, range.First))
                return behind;

            fetch = new Fetch(covered, mayGrow);
            if (_hasLetGo)
            {
                fetch.References = 1;
                GiveUp(fetch);
                return fetch;
            }

            _fetches.Add(fetch);
            _waiting.Enqueue(fetch);
            LetWaitingIn();
            if (_toSend.Count == 0)
                return fetch; // it is sent when others have made room
        }

        SendSoon();
        return fetch;
    }

    /// <summary>Adds neighbouring blocks to a fetch, if it has not been sent; <c>_fetching</c> is held.</summary>
    private bool TryGrow(Fetch fetch, BlockRange added, long first)
    {
        var grown = new BlockRange(first, fetch.Range.Count + added.Count);
        long more = added.LengthOn(Length);
        if (!fetch.MayGrow || grown.Count > MaxFetchBlocks || (fetch.IsCounted && !HasRoom(more)))
            return false;
        fetch.Range = grown;
        if (fetch.IsCounted)
            _bytesInFlight += more;
        fetch.References++;
        return true;
    }

    /// <summary>Fetched, or being fetched, and not given up yet, in bytes.</summary>
    internal long BytesHeld
    {
        get
        {
            lock (_fetching)
                return _fetches.Where(fetch => fetch.Buffer is not null).Sum(BytesOf);
        }
    }

    private long BytesOf(Fetch fetch) => fetch.Range.LengthOn(Length);

    private bool HasRoom(long bytes) => _bytesInFlight + _bytesToStore + bytes <= _mostBytes;

    /// <summary>Lets in those that wait for room, as far as there is room; <c>_fetching</c> is held, and they are to be sent.</summary>
    private void LetWaitingIn()
    {
        while (_waiting.TryPeek(out Fetch? next) && _running < _mostFetches && HasRoom(BytesOf(next)))
        {
            _waiting.Dequeue();
            _running++;
            _bytesInFlight += BytesOf(next);
            next.IsCounted = true;
            _toSend.Enqueue(next);
        }
    }

    /// <summary>Sends fetches at the end of this thread's batch: till then neighbours may be added.</summary>
    private void SendSoon()
    {
        if (!Batch.TryPutOff(_sendFetches))
            SendFetches();
    }

    private void SendFetches()
    {
        if (ReferenceEquals(t_isSending, this))
            return; // who is sending on this thread goes on with them
        CachingDisk? outer = t_isSending;
        t_isSending = this;
        try
        {
            while (true)
            {
                Fetch? fetch;
                lock (_fetching)
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
            t_isSending = outer;
        }
    }

    /// <summary>
    /// Fails all that waits for the origin, and all that will, as <see cref="DiskError.Replaced"/>. Reads of the
    /// origin that are under way go on until it is closed; what they bring is not kept.
    /// </summary>
    internal void LetGo()
    {
        List<Fetch> left;
        CancellationTokenSource lettingGo;
        lock (_fetching)
        {
            _hasLetGo = true;
            left = [.. _fetches.Where(fetch => !fetch.Arrived.Task.IsCompleted)];
            foreach (Fetch fetch in left)
            {
                fetch.IsStale = true;
                _fetches.Remove(fetch); // nobody joins it any more
            }

            lettingGo = _lettingGo;
        }

        left.ForEach(GiveUp); // outside of the lock: who waits goes on here
        lettingGo.Cancel();
    }

    /// <summary>The origin is needed again, since the disk is not replaced after all.</summary>
    internal void TakeUpAgain()
    {
        lock (_fetching)
        {
            _hasLetGo = false;
            _lettingGo = new CancellationTokenSource();
        }
    }

    private CancellationToken LettingGo
    {
        get
        {
            lock (_fetching)
                return _lettingGo.Token;
        }
    }

    private static DiskException Replaced()
        => new(DiskError.Replaced, "the remote is not waited for any more, since the disk is being switched");

    /// <summary>Fails those who wait for a fetch, or will, as <see cref="DiskError.Replaced"/>.</summary>
    private static void GiveUp(Fetch fetch)
    {
        fetch.Arrived.TrySetException(Replaced());
        fetch.Stored.TrySetException(Replaced());
        _ = fetch.Arrived.Task.Exception; // seen, also if nobody waits
        _ = fetch.Stored.Task.Exception;
    }

    private async Task Run(Fetch fetch)
    {
        int length = (int)BytesOf(fetch);
        fetch.SentAt = Environment.TickCount64;
        DiskException? failure = null;
        try
        {
            if (fetch.Arrived.Task.IsCompleted)
                throw Replaced(); // it was given up before it was sent
            fetch.Buffer = _buffers.Rent(length);
            await _origin.ReadAsync(fetch.Range.Offset, fetch.Buffer.Memory[..length]);
            Interlocked.Add(ref _fetchedBytes, length);
        }
        catch (Exception caught)
        {
            failure = caught as DiskException ?? new DiskException(DiskError.NoMemory, caught.Message);
        }

        // The origin has answered: others may ask it.
        lock (_fetching)
        {
            _running--;
            _bytesInFlight -= length;
            if (_isClosed)
                failure ??= Closed();
            if (failure is null)
            {
                _bytesToStore += length;
                _toStore.Enqueue(fetch);
            }

            LetWaitingIn();
        }

        if (failure is null)
        {
            fetch.Arrived.TrySetResult(); // unless it has been given up
        }
        else
        {
            fetch.IsCounted = false;
            fetch.Arrived.TrySetException(failure);
            End(fetch, failure);
        }

        SendSoon();
        StoreSoon(); // when the replies have gone out, and nobody waits for this thread
    }

    /// <summary>A fetch is over; what it brought is in the file and in the map, or will not be.</summary>
    private void End(Fetch fetch, DiskException? failure)
    {
        lock (_fetching)
        {
            _fetches.Remove(fetch);
            Uncount(fetch);
            if (fetch.IsHeldUp)
                _bytesHeldUp -= BytesOf(fetch);
        }

        if (failure is null)
            fetch.Stored.TrySetResult();
        else
            fetch.Stored.TrySetException(failure);
        _ = fetch.Arrived.Task.Exception; // seen, also if nobody waits
        _ = fetch.Stored.Task.Exception;
        Release(fetch);
    }

    private void Release(Fetch fetch)
    {
        lock (_fetching)
        {
            if (--fetch.References > 0)
                return;
            if (fetch.Buffer is { } buffer)
                _buffers.Return(buffer);
            fetch.Buffer = null;
        }
    }
}
