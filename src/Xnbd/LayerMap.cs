using Xnbd.Storage;
using Xnbd.Storage.Layers;
using Xnbd.Storage.Maps;

namespace Xnbd.Programs;

/// <summary>Draws in text what a layer holds of its disk.</summary>
internal static class LayerMap
{
    private const int Columns = 64;
    private const int MaxRows = 16;

    /// <summary>Draws the map: each character stands for an equal share of the disk.</summary>
    public static IEnumerable<string> Draw(LayerInfo info)
    {
        if (info.Length == 0)
            yield break;
        long blocks = BlockRange.CountOf(info.Length);
        long blocksPerCell = Math.Max(1, (blocks + (Columns * MaxRows) - 1) / (Columns * MaxRows));
        long cellBytes = blocksPerCell * BlockRange.BlockSize;
        int cells = (int)((info.Length + cellBytes - 1) / cellBytes);
        var shares = new (long Written, long Zero, long All)[cells];
        long offset = 0;
        foreach ((long length, BlockState state) in info.Runs)
        {
            for (long at = offset; at < offset + length;)
            {
                int cell = (int)(at / cellBytes);
                long part = Math.Min(offset + length, (cell + 1) * cellBytes) - at;
                shares[cell].All += part;
                shares[cell].Written += state == BlockState.Written ? part : 0;
                shares[cell].Zero += state == BlockState.Zero ? part : 0;
                at += part;
            }

            offset += length;
        }

        for (int row = 0; row < cells; row += Columns)
            yield return $"{row * cellBytes,16}  {string.Concat(shares.Skip(row).Take(Columns).Select(Sign))}";
        yield return "";
        yield return $"one sign is {ByteCount.DescribeExactly(cellBytes)}:  "
            + ". of the base   + written in part   # written   0 made zero";
    }

    private static char Sign((long Written, long Zero, long All) share)
        => share.Written + share.Zero == 0 ? '.' : share.Zero == share.All ? '0'
            : share.Written == share.All ? '#' : '+';
}
