using Xnbd.Linux;
using Xnbd.Storage.Maps;

namespace Xnbd.Storage.Layers;

/// <summary>Reads a layer's disk and another disk of the same length, and hands them over block by block.</summary>
internal static class BlockComparison
{
    /// <summary>Receives one block of both disks.</summary>
    /// <param name="blockIndex">The block's index.</param>
    /// <param name="data">What the layer's disk holds; shorter than a block at the end of the disk.</param>
    /// <param name="other">What the other disk holds, of the same length.</param>
    public delegate void BlockPair(long blockIndex, ReadOnlySpan<byte> data, ReadOnlySpan<byte> other);

    /// <summary>Goes through the disks.</summary>
    /// <param name="disk">The layer's disk.</param>
    /// <param name="other">The other disk.</param>
    /// <param name="skipAbsent">Pass over blocks that the layer does not hold.</param>
    /// <param name="progress">Receives how far this has come.</param>
    /// <param name="cancel">Interrupts it.</param>
    /// <param name="compare">Receives each block; it may change the block's state.</param>
    public static async Task Run(
        CowDisk disk,
        Disk other,
        bool skipAbsent,
        Action<WorkProgress> progress,
        CancellationToken cancel,
        BlockPair compare)
    {
        using var data = new NativeBuffer(WorkProgress.PieceBytes);
        using var otherData = new NativeBuffer(WorkProgress.PieceBytes);
        foreach ((BlockRange run, BlockState state) in disk.Map.Runs())
        {
            if (skipAbsent && state == BlockState.Absent)
                continue;
            long end = run.Offset + run.LengthOn(disk.Length);
            for (long offset = run.Offset; offset < end; offset += WorkProgress.PieceBytes)
            {
                cancel.ThrowIfCancellationRequested();
                int length = (int)Math.Min(end - offset, WorkProgress.PieceBytes);
                await disk.ReadAsync(offset, data.Memory[..length]);
                await other.ReadAsync(offset, otherData.Memory[..length]);
                for (int at = 0; at < length; at += BlockRange.BlockSize)
                {
                    int part = Math.Min(BlockRange.BlockSize, length - at);
                    compare((offset + at) / BlockRange.BlockSize, data.Slice(at, part), otherData.Slice(at, part));
                }

                progress(new WorkProgress(offset + length, disk.Length));
            }
        }
    }
}
