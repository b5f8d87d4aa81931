using Xnbd.Storage.Maps;

namespace Xnbd.Storage.Cache;

/// <summary>
/// Chooses the blocks of a cache by which its origin is recognized: fetched ones, spread over the disk.
/// </summary>
internal static class CacheSamples
{
    /// <summary>Takes samples.</summary>
    /// <param name="map">Which blocks the cache holds.</param>
    /// <param name="read">Reads one block; null if it is not a copy any more, or cannot be read.</param>
    /// <param name="mayHoldWrites">See <see cref="DiskSamples.MayHoldWrites"/>.</param>
    /// <exception cref="DiskException"><paramref name="read"/> has failed.</exception>
    public static DiskSamples Take(BlockMap map, Func<BlockRange, byte[]?> read, bool mayHoldWrites)
    {
        long count = map.Count(BlockState.Fetched), passed = 0, next = 0;
        // An odd step: file systems put the same structures at round offsets.
        long step = ((count + DiskSamples.MaxCandidates - 1) / DiskSamples.MaxCandidates) | 1;
        var candidates = new List<(long, byte[])>();
        foreach ((BlockRange run, BlockState state) in map.Runs())
        {
            if (state != BlockState.Fetched)
                continue;
            for (; next < passed + run.Count; next += step)
            {
                var block = new BlockRange(run.First + next - passed, 1);
                bool isWhole = block.LengthOn(map.Header.Source.Length) == BlockRange.BlockSize;
                if (isWhole && read(block) is { } data) // a server may take whole blocks only
                    candidates.Add((block.Offset, data));
            }

            passed += run.Count;
        }

        return DiskSamples.Choose(candidates, mayHoldWrites);
    }
}
