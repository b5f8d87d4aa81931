namespace Xnbd.Storage;

/// <summary>
/// Consecutive blocks of a disk, and all arithmetic between bytes and blocks. The last block of a disk may be shorter
/// than the others.
/// </summary>
/// <param name="First">The first block's index.</param>
/// <param name="Count">How many blocks, at least 0.</param>
public readonly record struct BlockRange(long First, long Count)
{
    /// <summary>Length of a block in bytes: the unit of the page cache and of most file systems.</summary>
    public const int BlockSize = 4096;

    /// <summary>The index that follows the last block's.</summary>
    public long End => First + Count;

    /// <summary>Offset of the first block in bytes.</summary>
    public long Offset => First * BlockSize;

    /// <summary>How many blocks a disk of so many bytes has; a short last block counts.</summary>
    public static long CountOf(long length) => (length / BlockSize) + (length % BlockSize == 0 ? 0 : 1);

    /// <summary>The blocks that a range of bytes touches, as a whole or in part.</summary>
    public static BlockRange Touching(long offset, long length)
        => new(offset / BlockSize, CountOf(offset + length) - (offset / BlockSize));

    /// <summary>The blocks that stand wholly inside a range of bytes; a short last block counts.</summary>
    /// <param name="offset">Offset of the range in bytes.</param>
    /// <param name="length">Length of the range in bytes.</param>
    /// <param name="diskLength">Length of the disk in bytes.</param>
    public static BlockRange Inside(long offset, long length, long diskLength)
    {
        long first = CountOf(offset);
        long end = offset + length == diskLength ? CountOf(diskLength) : (offset + length) / BlockSize;
        return new BlockRange(first, Math.Max(0, end - first));
    }

    /// <summary>Length of the blocks in bytes, on a disk whose last block may be short.</summary>
    /// <param name="diskLength">Length of the disk in bytes.</param>
    public long LengthOn(long diskLength) => Math.Min(End * BlockSize, diskLength) - Offset;

    /// <summary>
    /// The blocks behind a part of this range; none if the part reaches the range's end, or goes beyond it.
    /// </summary>
    /// <param name="part">Begins within this range.</param>
    public BlockRange After(BlockRange part) => new(part.End, Math.Max(0, End - part.End));

    /// <summary>Whether two ranges have a block in common.</summary>
    public bool Overlaps(BlockRange other) => First < other.End && other.First < End;
}
