namespace Xnbd.Storage;

/// <summary>
/// Consecutive blocks of a disk. All arithmetic between bytes and blocks stands here. The last block of a disk may be
/// shorter than the others.
/// </summary>
/// <param name="First">The first block's index.</param>
/// <param name="Count">How many blocks, at least 0.</param>
public readonly record struct BlockRange(long First, long Count)
{
    /// <summary>A block's length in bytes: the page cache's and most file systems' unit.</summary>
    public const int BlockSize = 4096;

    /// <summary>The index behind the last block.</summary>
    public long End => First + Count;

    /// <summary>The first block's offset in bytes.</summary>
    public long Offset => First * BlockSize;

    /// <summary>How many blocks a disk of so many bytes has.</summary>
    public static long CountOf(long length) => (length / BlockSize) + (length % BlockSize == 0 ? 0 : 1);

    /// <summary>The blocks of which a range of bytes holds at least a part.</summary>
    public static BlockRange Touching(long offset, long length)
        => new(offset / BlockSize, CountOf(offset + length) - (offset / BlockSize));

    /// <summary>The blocks that a range of bytes holds whole; a short last block counts.</summary>
    /// <param name="offset">In bytes.</param>
    /// <param name="length">In bytes.</param>
    /// <param name="diskLength">The disk's length, in bytes.</param>
    public static BlockRange Inside(long offset, long length, long diskLength)
    {
        long first = CountOf(offset);
        long end = offset + length == diskLength ? CountOf(diskLength) : (offset + length) / BlockSize;
        return new BlockRange(first, Math.Max(0, end - first));
    }

    /// <summary>How many bytes the blocks have on a disk.</summary>
    /// <param name="diskLength">The disk's length, in bytes.</param>
    public long LengthOn(long diskLength) => Math.Min(End * BlockSize, diskLength) - Offset;

    /// <summary>The blocks behind a part of this range; none if the part reaches the range's end, or goes beyond it.</summary>
    /// <param name="part">Begins within this range.</param>
    public BlockRange After(BlockRange part) => new(part.End, Math.Max(0, End - part.End));

    /// <summary>Whether both have a block in common.</summary>
    public bool Overlaps(BlockRange other) => First < other.End && other.First < End;
}
