namespace Xnbd.Storage.Cache;

/// <summary>
/// Tells which reads go on in sequence, and what such a reader will want next. It reads nothing itself.
/// <para>
/// State: a few streams, the most recent first, and triggers. A stream is where a reader goes on if it reads in
/// sequence. A trigger is a place, in MiB; a read there that needed no fetch makes the next part be read ahead.
/// Streams are guarded by <c>_lock</c>, inside which no other lock is taken. Triggers are read and written without it:
/// one that is lost costs a miss, and one that is seen twice is harmless.
/// </para>
/// Nothing here survives the process.
/// </summary>
/// <param name="blockCount">How many blocks the disk has.</param>
internal sealed class ReadAhead(long blockCount)
{
    /// <summary>How many streams are remembered: enough for a few readers on each of several machines.</summary>
    private const int MaxStreams = 16;

    /// <summary>How many reads in sequence make a stream that is read ahead of.</summary>
    private const int SequentialReads = 3;

    /// <summary>How far is read ahead at most, in blocks: 4 MiB.</summary>
    private const long MaxAheadBlocks = 1024;

    private const int BlocksPerMiB = (1 << 20) / BlockRange.BlockSize;

    private readonly Lock _lock = new();
    private readonly List<Stream> _streams = [];

    /// <summary>
    /// A place is kept at its number modulo the array's length, so a read compares one number.
    /// </summary>
    private readonly long[] _triggers = [.. Enumerable.Repeat(-1L, 64)];

    /// <summary>Where a reader is.</summary>
    /// <param name="Next">The block at which it goes on if it reads in sequence.</param>
    /// <param name="Count">How often it has gone on.</param>
    /// <param name="AheadEnd">The block up to which was read ahead.</param>
    private readonly record struct Stream(long Next, int Count, long AheadEnd);

    /// <summary>
    /// Whether a read that needed no fetch has reached a trigger. If so, <see cref="Next"/> is to be called.
    /// </summary>
    /// <param name="offset">Offset of the read in bytes.</param>
    public bool IsTriggered(long offset)
    {
        long place = offset >> 20;
        ref long trigger = ref _triggers[place % _triggers.Length];
        if (Volatile.Read(ref trigger) != place)
            return false;
        Volatile.Write(ref trigger, -1);
        return true;
    }

    /// <summary>Notes a read, and tells what to read ahead of its reader.</summary>
    /// <param name="range">The blocks of the read.</param>
    /// <param name="hasRoom">Whether there is room to read ahead.</param>
    /// <returns>Blocks behind the read; often none.</returns>
    public BlockRange Next(BlockRange range, bool hasRoom)
    {
        lock (_lock)
        {
            int at = _streams.FindIndex(stream
                => range.First >= stream.Next - 1 && range.First <= Math.Max(stream.Next, stream.AheadEnd));
            (long next, int count, long aheadEnd) = at < 0 ? default : _streams[at];
            if (at >= 0)
                _streams.RemoveAt(at);
            else if (_streams.Count == MaxStreams)
                _streams.RemoveAt(MaxStreams - 1);
            if (range.End > next)
                count++; // a reader that reads the same block again goes nowhere
            aheadEnd = Math.Max(aheadEnd, range.End);

            var ahead = new BlockRange(range.End, 0);
            long distance = count < SequentialReads ? 0 : Math.Min(MaxAheadBlocks, range.Count << Math.Min(count, 20));
            if (hasRoom && distance > 0 && aheadEnd <= range.End + (distance / 2))
            {
                // Each time the distance doubles.
                long end = Math.Min(range.End + distance, blockCount);
                ahead = new BlockRange(aheadEnd, Math.Max(0, end - aheadEnd));
                aheadEnd = Math.Max(end, aheadEnd);
                long trigger = (aheadEnd - (distance / 2) + BlocksPerMiB - 1) / BlocksPerMiB;
                Volatile.Write(ref _triggers[trigger % _triggers.Length], trigger);
            }

            _streams.Insert(0, new Stream(Math.Max(next, range.End), count, aheadEnd));
            return ahead;
        }
    }

    /// <summary>The first piece of what is read ahead, or copied. Pieces begin at multiples of their size.</summary>
    /// <param name="ahead">At least one block.</param>
    /// <param name="pieceBlocks">The size of a piece, in blocks; at least 1.</param>
    public static BlockRange FirstPiece(BlockRange ahead, int pieceBlocks)
    {
        long end = (ahead.First / pieceBlocks * pieceBlocks) + pieceBlocks;
        return ahead with { Count = Math.Min(ahead.End, end) - ahead.First };
    }
}
