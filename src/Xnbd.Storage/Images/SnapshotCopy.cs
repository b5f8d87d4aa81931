using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;

namespace Xnbd.Storage.Images;

/// <summary>
/// A copy of an image as it stood at one moment, made while the image goes on changing. A writer saves a block before
/// it overwrites it, and waits for that one block; <see cref="CopyAll"/> saves all others.
/// <para>
/// States: a block is not saved, and then saved for good; it is saved under the lock of its stripe. While this object
/// is the image's current copy (from one closing of the image's gate to the next), every writer calls
/// <see cref="Save"/> inside the gate before it changes anything. Hence a block that is not saved still stands as it
/// did. A copy that has failed saves nothing any more: the image's service matters more than the copy.
/// </para>
/// <para>
/// Locks: <c>_locks</c>, one for each stripe of blocks, is held while one block is read and written: so long a writer
/// of the same stripe waits. No other lock is taken under it.
/// </para>
/// </summary>
internal sealed class SnapshotCopy
{
    /// <summary>How much is saved at a time, in bytes: a writer waits for no more.</summary>
    public const int BlockSize = 64 * 1024;

    /// <summary>
    /// Length of the longest image in bytes that is copied: 256 TiB. What is saved is noted in memory, 512 MiB for that
    /// length.
    /// </summary>
    public const long MaxLength = 256L << 40;

    private const int Stripes = 64;

    private readonly SafeFileHandle _image;
    private readonly SafeFileHandle _seeking; // the image, to look for data
    private readonly SafeFileHandle _target;
    private readonly long _length;
    private readonly ulong[] _saved;
    private readonly Lock[] _locks = new Lock[Stripes];
    private volatile DiskException? _failure;

    public SnapshotCopy(SafeFileHandle image, SafeFileHandle seeking, SafeFileHandle target, long length)
    {
        _image = image;
        _seeking = seeking;
        _target = target;
        _length = length;
        long blocks = (length + BlockSize - 1) / BlockSize;
        _saved = new ulong[(blocks + 63) / 64];
        for (int i = 0; i < Stripes; i++)
            _locks[i] = new Lock();
    }

    /// <summary>Whether an image is not too long.</summary>
    public static bool CanCopy(long length) => length <= MaxLength;

    /// <summary>Why the copy cannot be completed; null as long as it can.</summary>
    public DiskException? Failure => _failure;

    /// <summary>Whether nothing in a range needs to be saved any more.</summary>
    public bool IsSaved(long offset, long length)
    {
        if (_failure is not null)
            return true;
        long last = (offset + length - 1) / BlockSize;
        for (long block = offset / BlockSize; block <= last; block++)
        {
            if (!IsSaved(block))
                return false;
        }

        return true;
    }

    /// <summary>Saves the blocks that a range touches, as far as they are not saved yet.</summary>
    public void Save(long offset, long length)
    {
        long last = (offset + length - 1) / BlockSize;
        for (long block = offset / BlockSize; block <= last && _failure is null; block++)
        {
            if (IsSaved(block))
                continue;
            lock (_locks[block % Stripes])
            {
                if (!IsSaved(block))
                {
                    CopyBlock(block);
                    Interlocked.Or(ref _saved[block / 64], 1UL << (int)(block % 64));
                }
            }
        }
    }

    /// <summary>Saves all blocks that hold data, until this is done, has failed, or is cancelled.</summary>
    /// <param name="progress">Receives how many bytes have been passed.</param>
    /// <param name="cancel">Interrupts it.</param>
    public void CopyAll(Action<long> progress, CancellationToken cancel)
    {
        long offset = 0;
        while (offset < _length && _failure is null)
        {
            cancel.ThrowIfCancellationRequested();
            progress(offset);

            // A hole that is passed over here is a hole in the copy, too. Whoever writes there later saves it first,
            // and finds zeroes, which are not written.
            long data = LinuxFile.NextData(_seeking, offset);
            if (Errno.Of(data) == Errno.ENXIO || data >= _length)
                break; // a hole up to the end, or up to what was appended since
            if (data > offset)
                offset = data / BlockSize * BlockSize;
            Save(offset, 1);
            offset += BlockSize;
        }
    }

    private bool IsSaved(long block) => (Volatile.Read(ref _saved[block / 64]) >> (int)(block % 64) & 1) != 0;

    private void CopyBlock(long block)
    {
        long offset = block * BlockSize;
        Span<byte> buffer = t_block ??= new byte[BlockSize];
        buffer = buffer[..(int)Math.Min(BlockSize, _length - offset)];

        long count = LinuxFile.Read(_image, buffer, offset);
        if (count < buffer.Length)
        {
            _failure = new DiskException(
                "read", "the image", offset, buffer.Length, count < 0 ? Errno.Of(count) : Errno.EIO);
            return;
        }

        if (!buffer.ContainsAnyExcept((byte)0))
            return; // the copy is sparse: what is not written is zero
        count = LinuxFile.Write(_target, buffer, offset);
        if (count < 0)
            _failure = new DiskException("write", "the snapshot", offset, buffer.Length, Errno.Of(count));
    }

    [ThreadStatic]
    private static byte[]? t_block;
}
