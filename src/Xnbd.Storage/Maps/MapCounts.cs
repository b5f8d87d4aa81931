using System.Numerics;

namespace Xnbd.Storage.Maps;

/// <summary>How many blocks of a range are in each state.</summary>
/// <param name="Absent">Blocks that the file does not hold.</param>
/// <param name="Fetched">Blocks that are as the source has them.</param>
/// <param name="Zero">Blocks that were made zero here.</param>
/// <param name="Written">Blocks that were written here.</param>
public readonly record struct BlockCounts(long Absent, long Fetched, long Zero, long Written);

/// <summary>
/// How many blocks of each page of a map are in each state. So a whole map is counted without reading all of its words,
/// of which a disk of 16 TiB has 1 GiB.
/// <para>
/// One word for each page holds the page's three counts, 16 bits each. Whoever changes a page holds the page's lock.
/// Any thread reads without a lock, and sees the counts of one page as they were at one moment. Nothing survives: the
/// counts are made anew when the map is loaded.
/// </para>
/// </summary>
/// <param name="pageCount">How many pages the map has.</param>
internal sealed class MapCounts(int pageCount)
{
    private const ulong EachBlock = 0x5555_5555_5555_5555; // the lower bit of each block's two
    private const int ZeroShift = 16, WrittenShift = 32;
    private const ulong Mask = 0xFFFF; // a page has fewer blocks

    private readonly ulong[] _pages = new ulong[pageCount];

    /// <summary>The counts of some words of one page, as one number.</summary>
    public static ulong Of(ReadOnlySpan<ulong> words)
    {
        ulong counts = 0;
        foreach (ref readonly ulong live in words)
        {
            ulong word = Volatile.Read(in live);
            if (word != 0)
                counts += Of(word);
        }

        return counts;
    }

    /// <summary>The counts of one word.</summary>
    public static ulong Of(ulong word)
    {
        ulong low = word & EachBlock, high = (word >> 1) & EachBlock;
        return (ulong)BitOperations.PopCount(low & ~high)
            + ((ulong)BitOperations.PopCount(high & ~low) << ZeroShift)
            + ((ulong)BitOperations.PopCount(high & low) << WrittenShift);
    }

    /// <summary>Notes that words of a page have changed. The page's lock is held.</summary>
    /// <param name="page">The page.</param>
    /// <param name="before">The counts of these words before.</param>
    /// <param name="after">The counts of these words now.</param>
    public void Change(long page, ulong before, ulong after)
        => Volatile.Write(ref _pages[page], _pages[page] + after - before);

    /// <summary>The counts of consecutive pages.</summary>
    /// <param name="first">The first page.</param>
    /// <param name="end">The page behind the last one.</param>
    /// <param name="blocks">How many blocks they have.</param>
    public BlockCounts Sum(long first, long end, long blocks)
    {
        long fetched = 0, zero = 0, written = 0;
        for (long page = first; page < end; page++)
        {
            ulong counts = Volatile.Read(ref _pages[page]);
            if (counts == 0)
                continue;
            fetched += (long)(counts & Mask);
            zero += (long)((counts >> ZeroShift) & Mask);
            written += (long)(counts >> WrittenShift);
        }

        return new BlockCounts(blocks - fetched - zero - written, fetched, zero, written);
    }

    /// <summary>Adds counts that are one number; the absent blocks are those that are left of all.</summary>
    /// <param name="sum">The sum so far.</param>
    /// <param name="counts">The counts of some blocks.</param>
    /// <param name="blocks">How many blocks these are.</param>
    public static BlockCounts Add(BlockCounts sum, ulong counts, long blocks)
    {
        long fetched = (long)(counts & Mask);
        long zero = (long)((counts >> ZeroShift) & Mask), written = (long)(counts >> WrittenShift);
        long absent = blocks - fetched - zero - written;
        return new BlockCounts(
            sum.Absent + absent, sum.Fetched + fetched, sum.Zero + zero, sum.Written + written);
    }
}
