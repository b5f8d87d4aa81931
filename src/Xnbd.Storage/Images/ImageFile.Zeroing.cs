using Xnbd.Linux;

namespace Xnbd.Storage.Images;

/// <content>Zeroes and trim: by the file system where it can, else by writing zeroes.</content>
public sealed partial class ImageFile
{
    /// <summary>Length of the pieces in which zeroes are written, in bytes.</summary>
    private const int ZeroPieceBytes = 1 << 20;

    private static readonly byte[] s_zeroes = new byte[ZeroPieceBytes];

    // What the file system has refused once is not tried again.
    private bool _cannotPunch;
    private bool _cannotZeroRange;

    /// <summary>Zeroes the beginning of a range, and takes it off the range.</summary>
    /// <returns>True when nothing is left of the range, and it is durable if it has to be.</returns>
    private bool ZeroPart(ref long offset, ref long length, ZeroMode mode, bool durable)
    {
        if (durable)
            _sync.ThrowIfFailed();
        _gate.Enter();
        try
        {
            long part = length;
            if ((mode & ZeroMode.FastOnly) != 0)
                ZeroFast(offset, length, mode);
            else if (length > 0)
            {
                if (_saving is { } saving)
                {
                    part = Math.Min(length, SnapshotCopy.BlockSize - (offset % SnapshotCopy.BlockSize));
                    saving.Save(offset, part);
                }

                part = ZeroPiece(offset, part, mode);
            }

            offset += part;
            length -= part;
        }
        finally
        {
            _gate.Leave();
        }

        if (length > 0)
            return false;
        if (durable)
            Flush();
        return true;
    }

    /// <summary>
    /// Zeroes a range without writing more than its edges. The whole blocks come first, since they may turn out not to
    /// be fast: then nothing has changed. The edges of a device's blocks are not fast either, because the device would
    /// have to read them first, nor are blocks that a snapshot has to save.
    /// </summary>
    private void ZeroFast(long offset, long length, ZeroMode mode)
    {
        (long start, long end) = WholeBlocks(offset, length);
        bool isFast = (_saving is not { } saving || saving.IsSaved(offset, length))
            && (_kind == FileKind.Regular || (start, end) == (offset, offset + length))
            && (start == end || TryZeroBlocks(start, end - start, mode));
        if (!isFast)
        {
            throw new DiskException(
                DiskError.NotSupported, $"no fast way to zero {length} bytes at {offset} of '{Path}'");
        }

        WriteZeroes(offset, start - offset);
        WriteZeroes(end, offset + length - end);
    }

    /// <summary>Zeroes a range or its beginning.</summary>
    /// <returns>How many bytes were zeroed.</returns>
    private long ZeroPiece(long offset, long length, ZeroMode mode)
    {
        (long start, long end) = WholeBlocks(offset, length);
        if (start > offset)
            return WriteZeroes(offset, start - offset); // an edge, shorter than two blocks; the middle comes next round
        return TryZeroBlocks(start, end - start, mode)
            ? end - start
            : WriteZeroes(offset, Math.Min(length, ZeroPieceBytes));
    }

    /// <summary>Lets the file system zero whole blocks.</summary>
    /// <returns>False if it cannot do that; then nothing has changed.</returns>
    private bool TryZeroBlocks(long offset, long length, ZeroMode mode)
    {
        if ((mode & ZeroMode.MayPunch) != 0 && TryAllocate(AllocateMode.PunchHole, offset, length, ref _cannotPunch))
            return true;

        // On a block device this may write zeroes one by one inside the kernel: not fast.
        return !((mode & ZeroMode.FastOnly) != 0 && _kind == FileKind.BlockDevice)
            && TryAllocate(AllocateMode.ZeroRange, offset, length, ref _cannotZeroRange);
    }

    /// <summary>Gives all of the image's space back if the file system can; the image then reads as zeroes.</summary>
    internal void Discard() => Trim(0, Length, durable: true);

    private void Trim(long offset, long length, bool durable)
    {
        if (durable)
            _sync.ThrowIfFailed();
        (long start, long end) = WholeBlocks(offset, length);
        if (start < end)
        {
            _gate.Enter();
            try
            {
                // A trim is a hint. While a snapshot is copied, a trim would first have to copy all that it discards.
                if (_saving is null)
                    _ = TryAllocate(AllocateMode.PunchHole, start, end - start, ref _cannotPunch);
            }
            finally
            {
                _gate.Leave();
            }
        }

        if (durable)
            Flush();
    }

    /// <summary>
    /// The whole blocks of the file system inside a range; the image's last block may be shorter. If there are none, an
    /// empty range at the end of the given one. The file system punches or zeroes only such blocks: to clear a part of
    /// a block, some file systems (XFS) clear all of it in memory, in place, and put the rest right afterwards.
    /// </summary>
    private (long Start, long End) WholeBlocks(long offset, long length)
    {
        long end = offset + length;
        long firstWhole = (offset + _blockBytes - 1) / _blockBytes * _blockBytes;
        long lastWhole = end == Length ? end : end / _blockBytes * _blockBytes;
        return firstWhole < lastWhole ? (firstWhole, lastWhole) : (end, end);
    }

    /// <returns>False if the file system cannot do it.</returns>
    private bool TryAllocate(AllocateMode mode, long offset, long length, ref bool isImpossible)
    {
        if (Volatile.Read(ref isImpossible))
            return false;
        _finder.ForgetRun(offset, length);
        switch (LinuxFile.Allocate(_file, mode | AllocateMode.KeepSize, _start + offset, length))
        {
            case Errno.None:
                return true;
            case Errno.EOPNOTSUPP or Errno.ENOSYS or Errno.ENODEV:
                Volatile.Write(ref isImpossible, true);
                return false;
            case Errno errno:
                throw new DiskException("zeroing", Path, offset, length, errno);
        }
    }

    private long WriteZeroes(long offset, long length)
    {
        WriteRaw(offset, s_zeroes.AsSpan(0, (int)length));
        return length;
    }
}
