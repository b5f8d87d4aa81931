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
        var sum = default(BlockCounts);
        while (range.Count > 0)
        {
            long page = range.First / BlocksPerPage, end = Math.Min((page + 1) * BlocksPerPage, BlockCount);
            var inPage = new BlockRange(range.First, Math.Min(range.End, end) - range.First);
            ulong counts = _counts[page];
            bool isWhole = inPage.First == page * BlocksPerPage && inPage.End == end;
            sum = MapCounts.Add(sum, isWhole || counts == 0 ? counts : CountWords(inPage), inPage.Count);
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
