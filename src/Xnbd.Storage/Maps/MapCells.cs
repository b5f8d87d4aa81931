namespace Xnbd.Storage.Maps;

/// <summary>
/// Draws a map as a text of a few cells, each of which stands for an equal share of the disk (docs/control.md, method
/// <c>watch</c>). The cost is that of <see cref="BlockMap.CountIn"/>: it grows with the number of cells, and by some
/// nanoseconds for each 64 MiB of the disk. No lock is taken.
/// </summary>
internal static class MapCells
{
    /// <summary>The largest number of cells. This bounds the words that are read: two pages for each.</summary>
    public const int Max = 4096;

    private const char Absent = '.', Fetching = '*';

    /// <summary>Draws the map.</summary>
    /// <param name="map">The map.</param>
    /// <param name="cells">How many cells, 1 to <see cref="Max"/>; fewer if the disk has fewer blocks.</param>
    /// <param name="fetching">Ranges that are being fetched.</param>
    public static string Draw(BlockMap map, int cells, IReadOnlyList<BlockRange> fetching)
    {
        long blocks = map.BlockCount;
        int count = (int)Math.Min(Math.Clamp(cells, 1, Max), blocks);
        char[] signs = new char[count];
        for (int i = 0; i < count; i++)
            signs[i] = SignOf(map.CountIn(new BlockRange(FirstOf(i), FirstOf(i + 1) - FirstOf(i))));
        foreach (BlockRange range in fetching)
        {
            for (int i = CellOf(range.First); i <= CellOf(range.End - 1); i++)
                signs[i] = Fetching;
        }

        return new string(signs);

        // A map in memory has less than 2^36 blocks: nothing overflows.
        long FirstOf(int cell) => cell * blocks / count;
        int CellOf(long block) => (int)((((block + 1) * count) - 1) / blocks);
    }

    /// <summary>
    /// The sign of a cell: of what most of its local blocks are, and whether all of its blocks are local.
    /// </summary>
    private static char SignOf(BlockCounts counts)
    {
        char most = counts.Written > 0 && counts.Written >= Math.Max(counts.Fetched, counts.Zero) ? 'W'
            : counts.Fetched > 0 && counts.Fetched >= counts.Zero ? 'F'
            : counts.Zero > 0 ? 'Z' : Absent;
        return counts.Absent > 0 ? char.ToLowerInvariant(most) : most;
    }
}
