namespace Xnbd.Storage.Cache;

/// <content>Readers in sequence, who are read ahead of.</content>
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
            int at = 0;
            while (at < _streams.Count && !(range.First >= _streams[at].Next - 1 && range.First <= Math.Max(_streams[at].Next, _streams[at].AheadEnd)))
                at++;
            (long next, int count, long aheadEnd) = at < _streams.Count ? _streams[at] : (0L, 0, 0L);
            if (at < _streams.Count)
                _streams.RemoveAt(at);
            else if (_streams.Count == MaxStreams)
                _streams.RemoveAt(MaxStreams - 1);
            if (range.End > next)
                count++; // who reads the same block again goes nowhere
            aheadEnd = Math.Max(aheadEnd, range.End);

            // Twice as far each time; with no more than half of the budget, which belongs to those who wait; and not while much is to be
            // stored: what is stored late has left the processor's cache, and its readers find it in memory only, not in the file.
            long distance = count < SequentialReads ? 0 : Math.Min(MaxAheadBlocks, range.Count << Math.Min(count, 20));
            if (distance > 0 && aheadEnd <= range.End + (distance / 2) && _bytesInFlight < _mostBytes / 2 && _bytesToStore <= MaxFetchBytes)
            {
                long end = Math.Min(range.End + distance, Map.BlockCount);
                ahead = new BlockRange(aheadEnd, Math.Max(0, end - aheadEnd));
                aheadEnd = Math.Max(end, aheadEnd);
                const int blocksOfMiB = (1 << 20) / BlockRange.BlockSize;
                long trigger = (aheadEnd - (distance / 2) + blocksOfMiB - 1) / blocksOfMiB;
                Volatile.Write(ref _triggers[trigger % _triggers.Length], trigger);
            }

            _streams.Insert(0, (Math.Max(next, range.End), count, aheadEnd));
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
            if (Join(range with { Count = pieceEnd - range.First }, mayGrow: false, out BlockRange covered) is { } fetch)
                Release(fetch);
            range = new BlockRange(covered.End, range.End - covered.End);
        }
    }
}
