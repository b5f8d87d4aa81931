using System.Numerics;

namespace Xnbd.Storage.Maps;

/// <summary>
/// The states of all blocks in memory: two bits for each block, in pages as in the file (<see cref="MapLayout"/>).
/// <para>
/// A page in which no block was ever changed has no memory of its own: all such pages are one array of zeroes, which
/// nobody writes. A page gets its own array before the first block in it changes, and keeps it. So memory and the time
/// of a walk grow with what is used, and not with the disk. (With one array for all pages, each block that is used
/// would take 2 MiB where the kernel gives huge pages to every program.)
/// </para>
/// <para>
/// Beside each page stands how many of its blocks are in each state (<see cref="MapCounts"/>). A block that was and
/// stays present never counts as absent meanwhile.
/// </para>
/// <para>
/// Threads: any thread may read, without a lock. A thread that changes a page has it alone (<see cref="BlockMap"/>
/// holds the page's lock).
/// </para>
/// </summary>
internal sealed class BlockStates
{
    private const int BlocksPerWord = MapLayout.BlocksPerWord;
    private const int WordsPerPage = MapLayout.WordsPerPage;
    private const int BlocksPerPage = MapLayout.BlocksPerPage;
    private const ulong EachBlock = 0x5555_5555_5555_5555; // the lower bit of each block's two

    private static readonly ulong[] s_unused = new ulong[WordsPerPage]; // never written

    private readonly ulong[][] _pages;
    private readonly MapCounts _counts;
    private readonly long _blockCount;

    /// <summary>All blocks are absent.</summary>
    /// <param name="blockCount">The disk's number of blocks.</param>
    /// <param name="pageCount">The map's number of pages.</param>
    public BlockStates(long blockCount, int pageCount)
    {
        _pages = new ulong[pageCount][];
        _pages.AsSpan().Fill(s_unused);
        _counts = new MapCounts(pageCount);
        _blockCount = blockCount;
    }

    /// <summary>The words of a page that has all blocks in one state.</summary>
    public static ulong WordOf(BlockState state) => (ulong)state * EachBlock;

    /// <summary>A block's state.</summary>
    public BlockState this[long block]
    {
        get
        {
            (long page, long at) = Math.DivRem(block, BlocksPerPage);
            ulong word = Volatile.Read(ref _pages[page][at / BlocksPerWord]);
            return (BlockState)((word >> (int)(at % BlocksPerWord * 2)) & 3);
        }
    }

    /// <summary>Whether no block of a page was ever changed: all are absent.</summary>
    public bool IsUnused(int page) => ReferenceEquals(_pages[page], s_unused);

    /// <summary>The words of a page. Other threads may change them meanwhile, unless the page is held.</summary>
    public ReadOnlySpan<ulong> Words(int page) => _pages[page];

    /// <summary>The blocks at the start of a range that are all in one state.</summary>
    /// <param name="range">At least one block.</param>
    /// <param name="state">Their state.</param>
    public BlockRange Run(BlockRange range, out BlockState state)
    {
        state = this[range.First];
        if (range.Count == 1)
            return range;
        ulong pattern = WordOf(state);
        long block = range.First;
        while (block < range.End)
        {
            (long page, long at) = Math.DivRem(block, BlocksPerPage);
            int end = (int)Math.Min(BlocksPerPage, range.End - block + at);
            int same = EndOfSame(_pages[page], (int)at, end, pattern);
            block += same - at;
            if (same < end)
                break;
        }

        // The first block was in this state when it was read, whatever has become of it since.
        return range with { Count = Math.Max(1, block - range.First) };
    }

    /// <summary>
    /// How many blocks of a range are in each state. If the states change meanwhile, the numbers are approximate. Words
    /// are read at the two ends of the range alone, at most a page at each.
    /// </summary>
    public BlockCounts CountIn(BlockRange range)
    {
        long first = (range.First + BlocksPerPage - 1) / BlocksPerPage; // the pages that are in the range as a whole
        long end = range.End == _blockCount ? _pages.Length : range.End / BlocksPerPage;
        if (first >= end)
            return CountPartly(default, range);
        var before = new BlockRange(range.First, (first * BlocksPerPage) - range.First);
        long wholeEnd = Math.Min(end * BlocksPerPage, range.End);
        BlockCounts sum = _counts.Sum(first, end, wholeEnd - (first * BlocksPerPage));
        return CountPartly(CountPartly(sum, before), new BlockRange(wholeEnd, range.End - wholeEnd));
    }

    /// <summary>Gives a page its own memory; the caller holds the page. Its blocks stay absent.</summary>
    public void Use(int page) => _pages[page] = new ulong[WordsPerPage];

    /// <summary>Changes words of a page, which the caller holds.</summary>
    /// <param name="page">The page; <see cref="Use"/> was called.</param>
    /// <param name="first">Index of the first word in the page.</param>
    /// <param name="words">The new words.</param>
    public void Change(int page, int first, ReadOnlySpan<ulong> words)
    {
        Span<ulong> present = _pages[page].AsSpan(first, words.Length);
        _counts.Change(page, MapCounts.Of(present), MapCounts.Of(words)); // before: nothing is seen uncounted
        for (int i = 0; i < words.Length; i++)
            Volatile.Write(ref present[i], words[i]);
    }

    /// <summary>Finds where blocks of one state end.</summary>
    /// <param name="words">The words of a page.</param>
    /// <param name="at">The first block, counted in the page.</param>
    /// <param name="end">Where the search ends.</param>
    /// <param name="pattern">The word in which all blocks have that state.</param>
    /// <returns>At most <paramref name="end"/>.</returns>
    private static int EndOfSame(ulong[] words, int at, int end, ulong pattern)
    {
        if (pattern == 0 && ReferenceEquals(words, s_unused))
            return end;
        while (at < end)
        {
            int inWord = at % BlocksPerWord;
            ulong differing = (Volatile.Read(ref words[at / BlocksPerWord]) ^ pattern) >> (inWord * 2);
            int same = BitOperations.TrailingZeroCount(differing) / 2;
            if (same < BlocksPerWord - inWord)
                return Math.Min(at + same, end);
            at += BlocksPerWord - inWord;
        }

        return end;
    }

    /// <summary>Adds the counts of a range that is shorter than two pages.</summary>
    private BlockCounts CountPartly(BlockCounts sum, BlockRange range)
    {
        while (range.Count > 0)
        {
            (long page, long at) = Math.DivRem(range.First, BlocksPerPage);
            long count = Math.Min(range.Count, BlocksPerPage - at);
            ulong counts = IsUnused((int)page) ? 0 : CountWords(_pages[page], (int)at, (int)(at + count));
            sum = MapCounts.Add(sum, counts, count);
            range = new BlockRange(range.First + count, range.Count - count);
        }

        return sum;
    }

    /// <summary>The counts of some blocks of a page, as one number.</summary>
    /// <param name="words">The words of the page.</param>
    /// <param name="at">The first block, counted in the page.</param>
    /// <param name="end">The block behind the last one.</param>
    private static ulong CountWords(ulong[] words, int at, int end)
    {
        int first = at / BlocksPerWord, last = (end - 1) / BlocksPerWord;
        ulong notBefore = ulong.MaxValue << (at % BlocksPerWord * 2);
        ulong notBehind = ulong.MaxValue >> ((BlocksPerWord - 1 - ((end - 1) % BlocksPerWord)) * 2);
        if (first == last)
            return MapCounts.Of(Volatile.Read(ref words[first]) & notBefore & notBehind);
        return MapCounts.Of(Volatile.Read(ref words[first]) & notBefore)
            + MapCounts.Of(words.AsSpan(first + 1, last - first - 1))
            + MapCounts.Of(Volatile.Read(ref words[last]) & notBehind);
    }
}
