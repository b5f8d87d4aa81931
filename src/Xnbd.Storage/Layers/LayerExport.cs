using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;

namespace Xnbd.Storage.Layers;

/// <summary>Writes a whole disk into a new file, as a sparse raw image.</summary>
public static class LayerExport
{
    /// <summary>How far one question about extents looks, in bytes.</summary>
    private const long ExtentsBytes = 1L << 30;

    /// <summary>How many extents one question may be answered with.</summary>
    private const int MaxExtents = 1024;

    /// <summary>Writes the image. It appears under its name when it is complete and durable.</summary>
    /// <param name="disk">The disk.</param>
    /// <param name="outputPath">The file, which must not exist.</param>
    /// <param name="progress">Receives how far this has come.</param>
    /// <param name="cancel">Interrupts it; nothing is left behind.</param>
    /// <exception cref="DiskException">The file exists or cannot be made, or a read or a write failed.</exception>
    /// <exception cref="OperationCanceledException">It was interrupted.</exception>
    public static async Task WriteRaw(
        Disk disk, string outputPath, Action<WorkProgress> progress, CancellationToken cancel)
    {
        await NewFile.Write(outputPath, async (_, file) =>
        {
            NewFile.Check(LinuxFile.Truncate(file, disk.Length), outputPath);
            using var buffer = new NativeBuffer(WorkProgress.PieceBytes);
            for (long offset = 0; offset < disk.Length;)
            {
                // All of one answer is used before the next question: to answer it, a disk may have to look far.
                var extents = new ExtentList(MaxExtents);
                await disk.GetExtentsAsync(offset, Math.Min(disk.Length - offset, ExtentsBytes), extents);
                foreach (Extent extent in extents.Extents)
                {
                    for (long end = offset + extent.Length; offset < end;)
                    {
                        cancel.ThrowIfCancellationRequested();
                        long length = extent.IsHole ? end - offset : Math.Min(end - offset, WorkProgress.PieceBytes);
                        if (!extent.IsHole)
                        {
                            await disk.ReadAsync(offset, buffer.Memory[..(int)length]);
                            WriteSparse(file, outputPath, offset, buffer.Slice(0, (int)length));
                        }

                        offset += length;
                        progress(new WorkProgress(offset, disk.Length));
                    }
                }
            }
        });
    }

    private static void WriteSparse(SafeFileHandle file, string path, long offset, Span<byte> data)
    {
        for (int at = 0; at < data.Length;)
        {
            // A run of blocks that are not zero is written with one call; zero blocks stay holes.
            int end = at;
            while (end < data.Length
                && data[end..Math.Min(end + BlockRange.BlockSize, data.Length)].ContainsAnyExcept((byte)0))
                end = Math.Min(end + BlockRange.BlockSize, data.Length);
            if (end > at && LinuxFile.Write(file, data[at..end], offset + at) is < 0 and var failed)
                throw new DiskException("write", path, offset + at, end - at, Errno.Of(failed));
            at = end + BlockRange.BlockSize;
        }
    }
}
