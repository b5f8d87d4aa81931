using Xnbd.Linux;

namespace Xnbd.Storage;

/// <content>Zeroes and trim: by the file system where it can, else by writing zeroes.</content>
public sealed partial class ImageFile
{
    /// <summary>Zeroes are written, and ranges handled while a snapshot is copied, in pieces of this size: 1 MiB.</summary>
    private const int ZeroPieceBytes = 1 << 20;

    private static readonly byte[] s_zeroes = new byte[ZeroPieceBytes];

    // What the file system has refused once is not asked again.
    private bool _cannotPunch;
    private bool _cannotZeroRange;

    /// <summary>Zeroes a range's beginning, and takes that off the range.</summary>
    /// <returns>True when nothing is left of it, and it is durable if it has to be.</returns>
    private bool ZeroPart(ref long offset, ref long length, ZeroMode mode, bool durable)
    {
        ThrowIfSyncFailed(durable);
        if ((mode & ZeroMode.FastOnly) != 0 && length > 0 && !IsFastToZero(offset, length))
            throw NoFastZero(offset, length);

        _gate.Enter();
        try
        {
            long part = length;
            if (_saving is { } saving && length > 0)
            {
                part = Math.Min(length, SnapshotCopy.BlockSize - (offset % SnapshotCopy.BlockSize));
                saving.Save(offset, part);
            }

            if (part > 0)
                part = ZeroPiece(offset, part, mode);
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
    /// Whether zeroing can be fast, told before anything changes: a device's blocks are whole, and no snapshot has to
    /// save what stands there.
    /// </summary>
    private bool IsFastToZero(long offset, long length)
        => Aligned(offset, length) == (offset, offset + length)
            && (_saving is not { } saving || saving.IsSaved(offset, length));

    private DiskException NoFastZero(long offset, long length)
        => new(DiskError.NotSupported, $"no fast way to zero {length} bytes at {offset} of '{Path}'");

    /// <summary>Zeroes a range or its beginning; answers how much.</summary>
    private long ZeroPiece(long offset, long length, ZeroMode mode)
    {
        (long start, long end) = Aligned(offset, length);
        if (start > offset || end < offset + length)
        {
            // A block device takes whole blocks only: what sticks out is written, the middle comes next round.
            if (start > offset || end <= start)
                return WriteZeroes(offset, Math.Min(length, end <= start ? length : start - offset));
            length = end - offset;
        }

        bool fastOnly = (mode & ZeroMode.FastOnly) != 0;
        if ((mode & ZeroMode.MayPunch) != 0
            && TryAllocate(AllocateMode.PunchHole | AllocateMode.KeepSize, offset, length, ref _cannotPunch))
            return length;

        // On a block device this may write zeroes one by one inside the kernel: not fast.
        if (!(fastOnly && _kind == FileKind.BlockDevice)
            && TryAllocate(AllocateMode.ZeroRange | AllocateMode.KeepSize, offset, length, ref _cannotZeroRange))
            return length;

        if (fastOnly)
            throw NoFastZero(offset, length);
        return WriteZeroes(offset, Math.Min(length, ZeroPieceBytes));
    }

    /// <summary>Gives all of the image's space back, if the file system can; it then reads as zeroes.</summary>
    internal void Discard() => Trim(0, Length, durable: true);

    private void Trim(long offset, long length, bool durable)
    {
        ThrowIfSyncFailed(durable);
        (long start, long end) = Aligned(offset, length);
        if (start < end)
        {
            _gate.Enter();
            try
            {
                // A trim is a hint. While a snapshot is copied it would first have to copy all that it discards.
                if (_saving is null)
                    _ = TryAllocate(AllocateMode.PunchHole | AllocateMode.KeepSize, start, end - start, ref _cannotPunch);
            }
            finally
            {
                _gate.Leave();
            }
        }

        if (durable)
            Flush();
    }

    /// <summary>The part of a range that the file can zero or punch by itself: all of it, or a device's whole blocks.</summary>
    private (long Start, long End) Aligned(long offset, long length)
    {
        long end = offset + length;
        return _kind == FileKind.BlockDevice
            ? ((offset + PageSize - 1) / PageSize * PageSize, end == Length ? end : end / PageSize * PageSize)
            : (offset, end);
    }

    /// <returns>False when the file system cannot do it.</returns>
    private bool TryAllocate(AllocateMode mode, long offset, long length, ref bool isImpossible)
    {
        if (Volatile.Read(ref isImpossible))
            return false;
        switch (LinuxFile.Allocate(_file, mode, _start + offset, length))
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
