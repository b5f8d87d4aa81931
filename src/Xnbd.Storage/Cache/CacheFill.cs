using System.Runtime.CompilerServices;
using Xnbd.Storage.Maps;
using Xnbd.Storage.Overlay;

namespace Xnbd.Storage.Cache;

/// <summary>
/// Fills the cache with all that is missing. It asks the origin where zeroes are, a step ahead of what is being
/// fetched, keeps long zeroes as holes of the file, and fetches the rest.
/// <para>
/// An answer from before a change of the origin is not used. Each answer carries the number of changes at its time,
/// which is compared while the blocks are held. Whoever calls <see cref="Forget"/> looks at all
/// blocks afterwards.
/// </para>
/// Threads: several may run at once. There is no lock here; blocks are held in <c>BlockLocks</c> while their zeroes are
/// kept. What was kept survives like every copy: see <see cref="FetchStore"/>.
/// </summary>
/// <param name="origin">Tells where zeroes are.</param>
/// <param name="local">The cache's file.</param>
/// <param name="map">Which blocks the file holds.</param>
/// <param name="changing">Blocks whose state is being changed.</param>
/// <param name="turn">Completes when another piece should be fetched, and tells its size in blocks.</param>
/// <param name="fetch">Fetches what is absent of a range, until it is stored.</param>
internal sealed class CacheFill(
    Disk origin,
    Disk local,
    BlockMap map,
    BlockLocks changing,
    Func<CancellationToken, Task<int>> turn,
    Func<BlockRange, Task> fetch)
{
    /// <summary>How much the origin is asked about at once, in blocks: 1 GiB.</summary>
    internal const int AskedBlocks = (1 << 30) / BlockRange.BlockSize;

    /// <summary>How many extents an answer has at most: this bounds the memory for it.</summary>
    internal const int MaxExtents = 4096;

    /// <summary>Shorter zeroes are fetched with what surrounds them.</summary>
    private const int MinZeroBytes = FetchStore.UnitBytes;

    private const int UnitBlocks = FetchStore.UnitBytes / BlockRange.BlockSize;

    private int _originChanges; // how often the answers have become stale
    private long _zeroBytes;

    private long Length => map.Header.Source.Length;

    /// <summary>Bytes that were made zero here, because the origin says that they are.</summary>
    public long ZeroBytes => Interlocked.Read(ref _zeroBytes);

    /// <summary>The origin has changed: what it has said so far is not used any more.</summary>
    public void Forget() => Interlocked.Increment(ref _originChanges);

    /// <summary>Fetches all that is missing, and keeps the zeroes that the origin knows of.</summary>
    /// <param name="maxBlocks">How many blocks one request fetches at most; 1 to <see cref="Fetch.MaxBlocks"/>.</param>
    /// <param name="parallel">How many requests are under way, or being stored, at once.</param>
    /// <param name="cancel">Ends the work; what was fetched stays.</param>
    /// <exception cref="DiskException">The origin failed, or what was fetched cannot be kept.</exception>
    public async Task RunAsync(int maxBlocks, int parallel, CancellationToken cancel)
    {
        var options = new ParallelOptions { MaxDegreeOfParallelism = parallel, CancellationToken = cancel };
        await Parallel.ForEachAsync(
            Pieces(maxBlocks), options, async (range, _) => await fetch(range).WaitAsync(cancel));
        map.WriteBehind(); // also what others have just stored
    }

    /// <summary>What is to be fetched, in order, each piece when it is its turn.</summary>
    private async IAsyncEnumerable<BlockRange> Pieces(
        int maxBlocks, [EnumeratorCancellation] CancellationToken cancel = default)
    {
        await foreach (BlockRange range in Missing(cancel))
        {
            for (BlockRange left = range; left.Count > 0;)
            {
                int blocks = Math.Clamp(await turn(cancel), 1, maxBlocks);
                if (blocks > UnitBlocks)
                    blocks -= (int)((left.First + blocks) % UnitBlocks); // zeroes are looked for in whole units
                BlockRange piece = left with { Count = Math.Min(blocks, left.Count) };
                yield return piece;
                left = left.After(piece);
            }
        }
    }

    /// <summary>What is missing, in order. Zeroes on the way are kept.</summary>
    private async IAsyncEnumerable<BlockRange> Missing([EnumeratorCancellation] CancellationToken cancel = default)
    {
        Task<Answer?> next = AskForZeroes(0);
        while (await next is { } answer)
        {
            cancel.ThrowIfCancellationRequested();
            next = AskForZeroes(answer.Range.End); // while this answer is being worked off
            long done = answer.Range.First;
            foreach (BlockRange zeroes in answer.Zeroes.Append(new BlockRange(answer.Range.End, 0)))
            {
                if (done < zeroes.First)
                    yield return new BlockRange(done, zeroes.First - done);
                await KeepZeroes(zeroes, answer.OriginChanges, cancel);
                done = zeroes.End;
            }
        }
    }

    /// <summary>Looks for absent blocks, and asks the origin which of them are zeroes.</summary>
    /// <param name="block">The first block that is looked at.</param>
    /// <returns>What the origin says of the next absent blocks; null when there are none.</returns>
    private async Task<Answer?> AskForZeroes(long block)
    {
        BlockRange range = default;
        BlockState state = BlockState.Written;
        for (; block < map.BlockCount && state != BlockState.Absent; block = range.End)
            range = map.Run(new BlockRange(block, Math.Min(AskedBlocks, map.BlockCount - block)), out state);
        if (state != BlockState.Absent)
            return null;

        int originChanges = Volatile.Read(ref _originChanges);
        var extents = new ExtentList(MaxExtents);
        await origin.GetExtentsAsync(range.Offset, range.LengthOn(Length), extents);
        var zeroes = new List<BlockRange>();
        long offset = range.Offset;
        foreach (Extent extent in extents.Extents)
        {
            BlockRange whole = BlockRange.Inside(offset, extent.Length, Length);
            if (extent.IsHole && whole.LengthOn(Length) >= MinZeroBytes)
                zeroes.Add(whole);
            offset += extent.Length;
        }

        // An answer that ends within the first block is of no use: that block is fetched.
        long answered = BlockRange.Inside(range.Offset, offset - range.Offset, Length).Count;
        return new Answer(range with { Count = Math.Max(1, answered) }, zeroes, originChanges);
    }

    private Task KeepZeroes(BlockRange zeroes, int originChanges, CancellationToken cancel)
        => changing.ForEachAsync(map, zeroes, state => state == BlockState.Absent, async part =>
        {
            if (Volatile.Read(ref _originChanges) != originChanges)
                return;
            await local.ZeroAsync(part.Offset, part.LengthOn(Length), ZeroMode.MayPunch, durable: false);
            map.SetFetched(part);
            Interlocked.Add(ref _zeroBytes, part.LengthOn(Length));
        }, cancel: cancel);

    /// <summary>What the origin has said.</summary>
    /// <param name="Range">The absent blocks that it speaks of; at least one.</param>
    /// <param name="Zeroes">Those that are zeroes, in order.</param>
    /// <param name="OriginChanges">How often the origin had changed when it was asked.</param>
    private sealed record Answer(BlockRange Range, List<BlockRange> Zeroes, int OriginChanges);
}
