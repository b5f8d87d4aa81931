using System.Runtime.CompilerServices;
using Xnbd.Storage.Maps;

namespace Xnbd.Storage.Cache;

/// <content>Filling the cache with all that is missing.</content>
internal sealed partial class CachingDisk
{
    /// <summary>The most that the origin is asked about zeroes at once, 1 GiB; and the most extents of its answer, which bounds the memory for it.</summary>
    private const int AskedBlocks = (1 << 30) / BlockRange.BlockSize, AskedExtents = 4096;

    private int _invalidations; // how often what the origin has said has become stale

    /// <summary>Fetches all that is missing, but for zeroes that the origin knows of: those are made here.</summary>
    /// <param name="blocksPerRequest">How many blocks are fetched with one request, at most; 1 to 256.</param>
    /// <param name="parallel">How many requests are under way at once.</param>
    /// <param name="cancel">Ends it; what was fetched stays.</param>
    /// <exception cref="DiskException">The origin failed, or what was fetched cannot be kept.</exception>
    public async Task CacheAll(int blocksPerRequest, int parallel, CancellationToken cancel)
    {
        var options = new ParallelOptions { MaxDegreeOfParallelism = parallel, CancellationToken = cancel };
        await Parallel.ForEachAsync(Missing(blocksPerRequest), options, async (range, _) => await Bring(range));
        Map.WriteBehind(); // what others have just stored, too
    }

    /// <summary>What is to be fetched, in order; zeroes between are kept as holes of the file when they are come to.</summary>
    private async IAsyncEnumerable<BlockRange> Missing(int mostBlocks, [EnumeratorCancellation] CancellationToken cancel = default)
    {
        Task<Answer?> next = AskForZeroes(0);
        while (await next is { } answer)
        {
            cancel.ThrowIfCancellationRequested();
            next = AskForZeroes(answer.Range.End); // while this one is worked off
            long done = answer.Range.First;
            foreach (BlockRange zeroes in answer.Zeroes.Append(new BlockRange(answer.Range.End, 0)))
            {
                for (; done < zeroes.First; done = Math.Min(done + mostBlocks, zeroes.First))
                    yield return new BlockRange(done, Math.Min(mostBlocks, zeroes.First - done));
                await KeepZeroes(zeroes, answer.Invalidations);
                done = zeroes.End;
            }
        }
    }

    /// <summary>Looks for absent blocks, and asks the origin which of them are zeroes.</summary>
    /// <param name="block">Where to begin.</param>
    /// <returns>Of the next absent blocks; null when there are none.</returns>
    private async Task<Answer?> AskForZeroes(long block)
    {
        BlockRange range = default;
        BlockState state = BlockState.Written;
        for (; block < Map.BlockCount && state != BlockState.Absent; block = range.End)
            range = Map.Run(new BlockRange(block, Math.Min(AskedBlocks, Map.BlockCount - block)), out state);
        if (state != BlockState.Absent)
            return null;

        int invalidations = Volatile.Read(ref _invalidations);
        var extents = new ExtentList(AskedExtents);
        await _origin.GetExtentsAsync(range.Offset, range.LengthOn(Length), extents);
        var zeroes = new List<BlockRange>();
        long offset = range.Offset;
        foreach (Extent extent in extents.Extents)
        {
            BlockRange whole = BlockRange.Inside(offset, extent.Length, Length);
            if (extent.IsHole && whole.LengthOn(Length) >= StoreBytes) // less is fetched with what surrounds it
                zeroes.Add(whole);
            offset += extent.Length;
        }

        long answered = BlockRange.Inside(range.Offset, offset - range.Offset, Length).Count;
        return new Answer(range with { Count = Math.Max(1, answered) }, zeroes, invalidations);
    }

    private Task KeepZeroes(BlockRange zeroes, int invalidations) => ForEachHeld(zeroes, state => state == BlockState.Absent, async part =>
    {
        if (Volatile.Read(ref _invalidations) != invalidations)
            return; // the answer is stale
        await MakeHole(part.Offset, part.LengthOn(Length));
        Map.SetFetched(part);
        Interlocked.Add(ref _zeroBytes, part.LengthOn(Length));
    });

    /// <summary>What the origin has said.</summary>
    /// <param name="Range">The absent blocks that it has said it of; at least one.</param>
    /// <param name="Zeroes">Those that are zeroes, in order.</param>
    /// <param name="Invalidations">When it was asked.</param>
    private sealed record Answer(BlockRange Range, List<BlockRange> Zeroes, int Invalidations);
}
