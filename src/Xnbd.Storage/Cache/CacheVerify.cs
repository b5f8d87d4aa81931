using System.Runtime.CompilerServices;
using Xnbd.Storage.Maps;
using Xnbd.Storage.Overlay;

namespace Xnbd.Storage.Cache;

/// <summary>
/// Compares all blocks that were fetched, and not written here, with the origin, which is read once more. What the
/// origin says is zero is not read: it is compared with zeroes.
/// <para>
/// The origin is read first. Then the blocks are held, a unit at a time, and compared if they still count as fetched:
/// who holds them is no writer, so that the file has what was stored. A writer waits for one unit at most.
/// </para>
/// Threads: several pieces are compared at once. There is no lock here, and nothing is changed.
/// </summary>
/// <param name="origin">Tells where zeroes are.</param>
/// <param name="local">The cache's file.</param>
/// <param name="map">Which blocks the file holds.</param>
/// <param name="changing">Blocks whose state is being changed.</param>
/// <param name="turn">Completes when another piece should be read, and tells its size in blocks.</param>
/// <param name="readAgain">Reads blocks of the origin once more, behind those that clients wait for.</param>
internal sealed class CacheVerify(
    Disk origin,
    Disk local,
    BlockMap map,
    BlockLocks changing,
    Func<CancellationToken, Task<int>> turn,
    Func<BlockRange, Memory<byte>, Task> readAgain)
{
    /// <summary>How many blocks are held at once.</summary>
    private const int HeldBlocks = FetchStore.UnitBytes / BlockRange.BlockSize;

    /// <summary>How many pieces are read or compared at once: more than the pace of the line lets out.</summary>
    private const int MaxPieces = 256;

    private static readonly byte[] s_zeroes = new byte[FetchStore.UnitBytes];

    private long Length => map.Header.Source.Length;

    /// <summary>Compares.</summary>
    /// <param name="result">Is filled in meanwhile.</param>
    /// <param name="cancel">Ends the work.</param>
    /// <exception cref="DiskException">The origin or the file cannot be read.</exception>
    public async Task RunAsync(CacheVerification result, CancellationToken cancel)
    {
        result.Blocks = map.Count(BlockState.Fetched);
        result.MayHoldWrites = (map.Header.Flags & MapFlags.MayHoldWrites) != 0;
        var options = new ParallelOptions { MaxDegreeOfParallelism = MaxPieces, CancellationToken = cancel };
        await Parallel.ForEachAsync(
            Pieces(), options, async (piece, _) => await Compare(piece.Range, piece.IsZero, result, cancel));

        // Blocks that were written before their piece was cut were in no piece; others were fetched meanwhile.
        result.Blocks = Math.Max(result.Blocks, result.DoneBlocks);
        long written = result.Blocks - result.DoneBlocks;
        result.NoteWritten(written);
        result.NoteDone(written);
    }

    /// <summary>What is to be compared, in order, each piece when it is its turn.</summary>
    private async IAsyncEnumerable<(BlockRange Range, bool IsZero)> Pieces(
        [EnumeratorCancellation] CancellationToken cancel = default)
    {
        await foreach ((BlockRange range, bool isZero) in Ranges(cancel))
        {
            for (BlockRange left = range; left.Count > 0;)
            {
                int blocks = isZero ? Fetch.MaxBlocks : Math.Clamp(await turn(cancel), 1, Fetch.MaxBlocks);
                BlockRange piece = left with { Count = Math.Min(blocks, left.Count) };
                yield return (piece, isZero);
                left = left.After(piece);
            }
        }
    }

    /// <summary>What is to be compared, in order, and what the origin says of it.</summary>
    private async IAsyncEnumerable<(BlockRange Range, bool IsZero)> Ranges(
        [EnumeratorCancellation] CancellationToken cancel = default)
    {
        for (long block = 0; block < map.BlockCount;)
        {
            cancel.ThrowIfCancellationRequested();
            BlockRange run = map.Run(new BlockRange(block, map.BlockCount - block), out BlockState state);
            if (state != BlockState.Fetched)
            {
                block = run.End;
                continue;
            }

            // Not about this run alone: clients may have written between any two blocks, and each question takes a
            // round trip.
            var asked = new BlockRange(run.First, Math.Min(CacheFill.AskedBlocks, map.BlockCount - run.First));
            var extents = new ExtentList(CacheFill.MaxExtents);
            await origin.GetExtentsAsync(asked.Offset, asked.LengthOn(Length), extents);
            long offset = asked.Offset, done = asked.First;
            foreach (Extent extent in extents.Extents)
            {
                BlockRange zeroes = BlockRange.Inside(offset, extent.Length, Length);
                offset += extent.Length;
                if (!extent.IsHole || zeroes.Count == 0 || zeroes.LengthOn(Length) < FetchStore.UnitBytes)
                    continue;
                foreach (BlockRange part in Fetched(new BlockRange(done, zeroes.First - done)))
                    yield return (part, false);
                foreach (BlockRange part in Fetched(zeroes))
                    yield return (part, true);
                done = zeroes.End;
            }

            block = Math.Max(done, Math.Min(asked.End, BlockRange.Inside(0, offset, Length).End));
            if (block == asked.First)
                block = run.End; // an answer of no use
            foreach (BlockRange part in Fetched(new BlockRange(done, block - done)))
                yield return (part, false);
        }
    }

    /// <summary>What was fetched of a range, in order.</summary>
    private IEnumerable<BlockRange> Fetched(BlockRange range)
    {
        while (range.Count > 0)
        {
            BlockRange run = map.Run(range, out BlockState state);
            if (state == BlockState.Fetched)
                yield return run;
            range = range.After(run);
        }
    }

    private async Task Compare(BlockRange piece, bool isZero, CacheVerification result, CancellationToken cancel)
    {
        byte[] theirs = [];
        if (!isZero)
        {
            theirs = new byte[piece.LengthOn(Length)]; // given up with the read if this is cancelled
            await readAgain(piece, theirs).WaitAsync(cancel);
            result.NoteRead(theirs.Length);
        }

        byte[] ours = new byte[FetchStore.UnitBytes];
        long compared = 0;
        for (BlockRange left = piece; left.Count > 0;)
        {
            BlockRange unit = left with { Count = Math.Min(left.Count, HeldBlocks) };
            left = left.After(unit);
            await changing.ForEachAsync(
                map,
                unit,
                state => state == BlockState.Fetched,
                async part =>
                {
                    if (map.IsSealed) // clients write to the image alone, and the map does not know
                        throw new DiskException(
                            DiskError.Permission, "the proxy was switched before all of it was compared");
                    int length = (int)part.LengthOn(Length);
                    await local.ReadAsync(part.Offset, ours.AsMemory(0, length));
                    ReadOnlyMemory<byte> expected = isZero
                        ? s_zeroes.AsMemory(0, length)
                        : theirs.AsMemory((int)(part.Offset - piece.Offset), length);
                    NoteDifferences(part, ours.AsSpan(0, length), expected.Span, result);
                    compared += part.Count;
                },
                cancel: cancel);
        }

        result.NoteWritten(piece.Count - compared);
        result.NoteDone(piece.Count);
    }

    private static void NoteDifferences(
        BlockRange range, ReadOnlySpan<byte> ours, ReadOnlySpan<byte> theirs, CacheVerification result)
    {
        if (ours.SequenceEqual(theirs))
            return;
        for (int at = 0; at < ours.Length; at += BlockRange.BlockSize)
        {
            int length = Math.Min(BlockRange.BlockSize, ours.Length - at);
            if (!ours.Slice(at, length).SequenceEqual(theirs.Slice(at, length)))
                result.NoteDifferent(new BlockRange(range.First + (at / BlockRange.BlockSize), 1));
        }
    }
}
