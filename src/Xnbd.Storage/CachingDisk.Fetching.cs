using Xnbd.Linux;

namespace Xnbd.Storage;

/// <content>Fetches: started, joined, bounded, stored; and reading ahead.</content>
internal sealed partial class CachingDisk
{
    /// <summary>Readers that are followed at once: a few per client machine, for many of them.</summary>
    private const int MaxStreams = 16;

    /// <summary>So many reads in sequence make a stream that is read ahead of.</summary>
    private const int SequentialReads = 3;

    /// <summary>The furthest that is read ahead, in blocks: 4 MiB.</summary>
    private const long MaxAheadBlocks = 1024;

    /// <summary>What is read ahead is fetched in pieces of so many blocks, 256 KiB: a reader need not wait for a whole MiB.</summary>
    private const int AheadPieceBlocks = 64;

    /// <summary>
    /// Where a reader in sequence, who finds all there that was read ahead, makes the next part be read ahead: a number of a
    /// MiB, at the place that its lowest bits say; one lookup for each read, that mostly finds nothing.
    /// </summary>
    private readonly long[] _triggers = [.. Enumerable.Repeat(-1L, 64)];

    // Of each reader: where it will go on if it reads in sequence, how often it has, and how far was read ahead. The most recent first.
    private readonly List<(long Next, int Count, long AheadEnd)> _streams = [];

    /// <summary>
    /// A read of the origin. Everybody who waits for it, and the storing, holds a reference; the last one gives the buffer back.
    /// </summary>
    private sealed class Fetch(BlockRange range)
    {
        public readonly BlockRange Range = range;
        public readonly TaskCompletionSource Arrived = new(); // its readers go on at once, where the data arrived
        public readonly TaskCompletionSource Stored = new(TaskCreationOptions.RunContinuationsAsynchronously);
        public NativeBuffer? Buffer;
        public int References = 1;
    }

    /// <summary>Joins the fetch that brings a range's first block, or starts one.</summary>
    /// <param name="range">At least one block.</param>
    /// <param name="covered">The range's beginning, as far as the fetch brings it, or as it is local.</param>
    /// <returns>A fetch, to be released; null when the blocks are local by now.</returns>
    private Fetch? Join(BlockRange range, out BlockRange covered)
    {
        Fetch fetch;
        TaskCompletionSource? room = null;
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
            foreach (Fetch other in _fetches)
            {
                if (other.Range.First <= range.First && range.First < other.Range.End)
                {
                    covered = range with { Count = Math.Min(run.End, other.Range.End) - range.First };
                    other.References++;
                    return other;
                }

                if (other.Range.First > range.First)
                    end = Math.Min(end, other.Range.First);
            }

            covered = range with { Count = end - range.First };
            fetch = new Fetch(covered) { References = 2 }; // the caller's, and its own
            _fetches.Add(fetch);
            if (_waiting.Count > 0 || !HasRoom(fetch))
                _waiting.Enqueue((fetch, room = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously)));
            else
                Enter(fetch);
        }

        _ = Run(fetch, room);
        return fetch;
    }

    private long BytesOf(Fetch fetch) => fetch.Range.LengthOn(Length);

    private bool HasRoom(Fetch fetch)
        => _running == 0 || (_bytesInFlight + BytesOf(fetch) <= _mostBytes && _running < _mostFetches);

    private void Enter(Fetch fetch)
    {
        _running++;
        _bytesInFlight += BytesOf(fetch);
    }

    /// <summary>
    /// The origin has answered: others may ask it. A fetch that has arrived counts no more, whoever still holds it: its storing
    /// may wait for a writer who waits for another fetch.
    /// </summary>
    private void Leave(Fetch fetch)
    {
        List<TaskCompletionSource>? started = null;
        lock (_fetching)
        {
            _running--;
            _bytesInFlight -= BytesOf(fetch);
            while (_waiting.TryPeek(out (Fetch Fetch, TaskCompletionSource Room) next) && HasRoom(next.Fetch))
            {
                _waiting.Dequeue();
                Enter(next.Fetch);
                (started ??= []).Add(next.Room);
            }
        }

        started?.ForEach(room => room.SetResult());
    }

    private async Task Run(Fetch fetch, TaskCompletionSource? room)
    {
        if (room is not null)
            await room.Task;
        int length = (int)BytesOf(fetch);
        DiskException? failure = null;
        try
        {
            fetch.Buffer = _buffers.Rent(length);
            await _origin.ReadAsync(fetch.Range.Offset, fetch.Buffer.Memory[..length]);
            Interlocked.Add(ref _fetchedBytes, length);
        }
        catch (Exception caught)
        {
            failure = caught as DiskException ?? new DiskException(DiskError.NoMemory, caught.Message);
        }

        Leave(fetch);
        if (failure is null)
        {
            fetch.Arrived.SetResult();
            try
            {
                await Batch.Yield(); // the replies that came with this one go out first
                await Store(fetch);
            }
            catch (Exception caught)
            {
                failure = caught as DiskException ?? new DiskException(DiskError.Io, caught.Message);
                _cannotStore(failure);
            }
        }
        else
        {
            fetch.Arrived.SetException(failure);
        }

        lock (_fetching)
            _fetches.Remove(fetch);
        if (failure is null)
            fetch.Stored.SetResult();
        else
            fetch.Stored.SetException(failure);
        _ = fetch.Arrived.Task.Exception; // seen, also if nobody waits
        _ = fetch.Stored.Task.Exception;
        Release(fetch);
    }

    /// <summary>Writes to the file what has arrived, where nobody has written meanwhile.</summary>
    private async ValueTask Store(Fetch fetch)
    {
        for (BlockRange left = fetch.Range; left.Count > 0;)
        {
            BlockRange run = Map.Run(left, out BlockState state);
            left = new BlockRange(run.End, left.End - run.End);
            if (state != BlockState.Absent)
                continue;
            if (!Changing.TryEnter(run))
                await Changing.EnterAsync(run);
            try
            {
                for (BlockRange inside = run; inside.Count > 0;)
                {
                    BlockRange part = Map.Run(inside, out BlockState now);
                    if (now == BlockState.Absent)
                    {
                        await StoreData(part.Offset, fetch.Buffer!.Memory.Slice((int)(part.Offset - fetch.Range.Offset), (int)part.LengthOn(Length)));
                        Map.Set(part, BlockState.Fetched);
                    }

                    inside = new BlockRange(part.End, inside.End - part.End);
                }
            }
            finally
            {
                Changing.Leave(run);
            }
        }
    }

    /// <summary>Data as data, and long runs of zeroes as holes: a sparse origin stays sparse.</summary>
    private async ValueTask StoreData(long offset, ReadOnlyMemory<byte> data)
    {
        while (data.Length > 0)
        {
            bool isZero = data.Length >= HoleGrain && !data.Span[..HoleGrain].ContainsAnyExcept((byte)0);
            int length = Math.Min(HoleGrain, data.Length);
            while (length < data.Length
                && (data.Length - length >= HoleGrain && !data.Span.Slice(length, HoleGrain).ContainsAnyExcept((byte)0)) == isZero)
                length = Math.Min(length + HoleGrain, data.Length);
            if (isZero)
                await Local.ZeroAsync(offset, length, ZeroMode.MayPunch, durable: false);
            else if (!Local.TryWrite(offset, data.Span[..length]))
                await Local.WriteAsync(offset, data[..length], durable: false);
            offset += length;
            data = data[length..];
        }
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

    /// <summary>
    /// Finds out whether a read goes on where an earlier one ended, and then how far to read ahead. A miss of such a reader is
    /// fetched with what follows, up to the most that goes out as one request.
    /// </summary>
    /// <param name="offset">Of the read, in bytes.</param>
    /// <param name="length">Of the read, in bytes.</param>
    /// <param name="ahead">What to read ahead; may be empty.</param>
    /// <returns>The read's blocks.</returns>
    private BlockRange Follow(long offset, int length, out BlockRange ahead)
    {
        BlockRange range = BlockRange.Touching(offset, length);
        ahead = new BlockRange(range.End, 0);
        lock (_fetching)
        {
            int at = _streams.FindIndex(s => offset / BlockRange.BlockSize >= s.Next - 1 && range.First <= Math.Max(s.Next, s.AheadEnd));
            (long _, int count, long aheadEnd) = at >= 0 ? _streams[at] : (0L, 0, 0L);
            if (at >= 0)
                _streams.RemoveAt(at);
            else if (_streams.Count == MaxStreams)
                _streams.RemoveAt(MaxStreams - 1);
            count++;
            aheadEnd = Math.Max(aheadEnd, range.End);

            // Twice as far each time; and no further than half of the budget, which belongs to those who wait.
            long distance = count < SequentialReads ? 0 : Math.Min(MaxAheadBlocks, range.Count << Math.Min(count, 20));
            if (distance > 0 && aheadEnd <= range.End + (distance / 2) && _bytesInFlight < _mostBytes / 2)
            {
                long end = Math.Min(range.End + distance, Map.BlockCount);
                ahead = new BlockRange(aheadEnd, Math.Max(0, end - aheadEnd));
                aheadEnd = Math.Max(end, aheadEnd);
                const int blocksOfMiB = (1 << 20) / BlockRange.BlockSize;
                long trigger = (aheadEnd - (distance / 2) + blocksOfMiB - 1) / blocksOfMiB;
                Volatile.Write(ref _triggers[trigger % _triggers.Length], trigger);
            }

            _streams.Insert(0, (range.End, count, aheadEnd));
        }

        return range;
    }

    /// <summary>A read found all it needed.</summary>
    private void Hit(long offset, int length)
    {
        Interlocked.Increment(ref _hits);
        long place = offset >> 20;
        if (Volatile.Read(ref _triggers[place % _triggers.Length]) != place)
            return;
        Volatile.Write(ref _triggers[place % _triggers.Length], -1);
        _ = Follow(offset, length, out BlockRange ahead);
        ReadAhead(ahead);
    }

    /// <summary>Starts to fetch what a reader in sequence will want; waits for nothing.</summary>
    private void ReadAhead(BlockRange range)
    {
        while (range.Count > 0)
        {
            // Pieces begin at multiples of their size, so that they are whole however the reader goes on.
            long pieceEnd = Math.Min(range.End, (range.First / AheadPieceBlocks * AheadPieceBlocks) + AheadPieceBlocks);
            if (Join(range with { Count = pieceEnd - range.First }, out BlockRange covered) is { } fetch)
                Release(fetch);
            range = new BlockRange(covered.End, range.End - covered.End);
        }
    }
}
