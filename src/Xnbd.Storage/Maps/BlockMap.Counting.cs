namespace Xnbd.Storage.Maps;

/// <content>How many blocks are in each state.</content>
internal sealed partial class BlockMap
{
    /// <summary>How many blocks are in a state.</summary>
    public long Count(BlockState state) => CountAll()[(int)state];

    /// <summary>
    /// How many blocks are in each state, by the state's number. If the map changes meanwhile, the numbers are
    /// approximate. It costs some nanoseconds for each 64 MiB of the disk.
    /// </summary>
    public long[] CountAll()
    {
        BlockCounts counts = CountIn(new BlockRange(0, BlockCount));
        return [counts.Absent, counts.Fetched, counts.Zero, counts.Written];
    }

    /// <summary>
    /// How many blocks of a range are in each state. If the map changes meanwhile, the numbers are approximate. Words
    /// are read at the two ends of the range alone, at most a page at each.
    /// </summary>
    public BlockCounts CountIn(BlockRange range)
    {
        long first = (range.First + BlocksPerPage - 1) / BlocksPerPage; // the pages that are in the range as a whole
        long end = range.End == BlockCount ? _isDirty.Length : range.End / BlocksPerPage;
        if (first >= end)
            return CountPartly(default, range);
        var before = new BlockRange(range.First, (first * BlocksPerPage) - range.First);
        long wholeEnd = Math.Min(end * BlocksPerPage, range.End);
        BlockCounts sum = _counts.Sum(first, end, wholeEnd - (first * BlocksPerPage));
        return CountPartly(CountPartly(sum, before), new BlockRange(wholeEnd, range.End - wholeEnd));
    }

    /// <summary>Adds the counts of a range that is shorter than two pages.</summary>
    private BlockCounts CountPartly(BlockCounts sum, BlockRange range)
    {
        while (range.Count > 0)
        {
            long page = range.First / BlocksPerPage;
            var inPage = new BlockRange(range.First, Math.Min(range.End, (page + 1) * BlocksPerPage) - range.First);
            ulong counts = _counts[page] == 0 ? 0 : CountWords(inPage); // words that were never written stay untouched
            sum = MapCounts.Add(sum, counts, inPage.Count);
            range = range.After(inPage);
        }

        return sum;
    }

    /// <summary>The counts of blocks of one page, as one number.</summary>
    private ulong CountWords(BlockRange range)
    {
        int first = (int)(range.First / BlocksPerWord), last = (int)((range.End - 1) / BlocksPerWord);
        ulong notBefore = ulong.MaxValue << (int)(range.First % BlocksPerWord * 2);
        ulong notBehind = ulong.MaxValue >> (int)((BlocksPerWord - 1 - ((range.End - 1) % BlocksPerWord)) * 2);
        if (first == last)
            return MapCounts.Of(Volatile.Read(ref _words[first]) & notBefore & notBehind);
        return MapCounts.Of(Volatile.Read(ref _words[first]) & notBefore)
            + MapCounts.Of(_words.AsSpan(first + 1, last - first - 1))
            + MapCounts.Of(Volatile.Read(ref _words[last]) & notBehind);
    }
}
