using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;
using Xnbd.Storage.Threads;

namespace Xnbd.Storage.Images;

/// <summary>
/// A disk image: a regular file of any length, or a block device, read and written where it stands.
/// <para>
/// What survives: a completed write is in the kernel's page cache, so the death of this process loses nothing. After
/// the death of the machine there is what a flush or a durable operation has covered. A sync that has failed may have
/// lost data that the kernel no longer holds, so from then on every flush fails until the image is opened anew.
/// </para>
/// <para>
/// The image is never mapped into memory: a full disk or an I/O error is an error of one request, not the end of the
/// process.
/// </para>
/// <para>
/// Threads: the fast operations run on the thread that calls them, the async ones on the disk threads. Everything that
/// changes the image passes <c>_gate</c>, which a snapshot closes for a moment; while a snapshot is copied
/// (<c>_saving</c>), it first saves what it is about to change. A writer waits for nothing but that inside the gate.
/// </para>
/// The type's other files: <c>ImageFile.Opening.cs</c>, <c>ImageFile.Work.cs</c> (operations on the disk threads),
/// <c>ImageFile.Zeroing.cs</c> (zeroes and trim), <c>ImageFile.Snapshots.cs</c>. Types of their own:
/// <see cref="ImageLock"/>, <see cref="ImageSync"/>, <see cref="ImageVersion"/>, <see cref="DataFinder"/>.
/// </summary>
public sealed partial class ImageFile : Disk
{
    private const int PageSize = 4096;

    /// <summary>
    /// The largest block of a local file system, in bytes. A network file system may tell more: that is a transfer
    /// size.
    /// </summary>
    private const uint MaxBlockBytes = 64 * 1024;

    private readonly SafeFileHandle _file;
    private readonly FileKind _kind;
    private readonly long _start; // where the image begins in its file, in bytes
    private readonly bool _inMemory;
    private readonly bool _canReadNoWait;
    private readonly bool _cannotChange; // nobody writes the file as long as it is open
    private readonly long _blockBytes; // the file system's blocks, at least a page
    private readonly DataFinder _finder;
    private readonly ImageVersion _version;
    private readonly ImageSync _sync;
    private readonly WriteGate _gate = new();
    private readonly DiskThreads _writers = DiskThreads.NewWriters();
    private readonly DiskThreads _lookers = DiskThreads.NewLookers();

    private ImageFile(
        string path,
        SafeFileHandle file,
        FileKind kind,
        long start,
        long length,
        bool readOnly,
        bool cannotChange = false)
    {
        Path = path;
        _file = file;
        _kind = kind;
        _start = start;
        Length = length;
        Features = readOnly ? DiskFeatures.ReadOnly : DiskFeatures.None;
        _inMemory = kind == FileKind.Regular && LinuxFile.IsInMemory(file);
        _cannotChange = cannotChange;
        _blockBytes = LinuxFile.Status(file, out FileStatus status) == Errno.None && kind == FileKind.Regular
            ? Math.Clamp(status.BlockBytes, PageSize, MaxBlockBytes)
            : PageSize;
        _finder = new DataFinder(path, file, kind, start, length, _inMemory);
        _version = new ImageVersion(path, file, kind, isWhole: start == 0, length);
        _sync = new ImageSync(Sync);
        Span<byte> probe = stackalloc byte[1];
        _canReadNoWait = !_inMemory && Errno.Of(LinuxFile.ReadNoWait(file, probe, start)) is Errno.None or Errno.EAGAIN;
    }

    /// <summary>Where the image stands.</summary>
    public string Path { get; }

    /// <inheritdoc/>
    public override long Length { get; }

    /// <inheritdoc/>
    public override DiskFeatures Features { get; }

    /// <summary>Nobody can write any of it: its file system is read-only.</summary>
    internal bool IsOnReadOnlyFileSystem => LinuxFile.IsOnReadOnlyFileSystem(_file);

    /// <summary>From now on others may read the image as well, as in the target mode.</summary>
    internal void ShareLock() => ImageLock.Share(_file);

    /// <inheritdoc cref="ImageVersion.Read"/>
    internal long GetVersion(bool isKept) => _version.Read(isKept);

    /// <inheritdoc cref="ImageVersion.MarkChanged"/>
    internal void MarkChanged() => _version.MarkChanged();

    /// <inheritdoc cref="ImageVersion.SyncContents"/>
    internal void SyncContents() => _version.SyncContents();

    /// <inheritdoc/>
    public override bool TryRead(long offset, Span<byte> buffer)
    {
        if (_inMemory)
        {
            Read(offset, buffer);
            return true;
        }

        if (!_canReadNoWait)
            return false; // a file system that cannot tell may wait for a network: that is for the disk threads
        long count = LinuxFile.ReadNoWait(_file, buffer, _start + offset);
        if (count == buffer.Length)
            return true;
        if (count < 0 && Errno.Of(count) is var errno and not (Errno.EAGAIN or Errno.EOPNOTSUPP))
            throw new DiskException("read", Path, offset, buffer.Length, errno);
        return false;
    }

    /// <inheritdoc/>
    public override bool TryWrite(long offset, ReadOnlySpan<byte> data)
    {
        if (!IsWritableNow(offset, data.Length) || !_gate.TryEnter())
            return false;
        try
        {
            if (_saving is { } saving && !saving.IsSaved(offset, data.Length))
                return false;
            WriteRaw(offset, data);
            return true;
        }
        finally
        {
            _gate.Leave();
        }
    }

    /// <inheritdoc/>
    public override FileRange TryLocate(long offset, int length, bool findHoles)
    {
        if (MayChange)
            return FileRange.None;
        int done = 0;
        while (done < length)
        {
            long at = offset + done;
            if (findHoles && _finder.HoleEnd(at) is var holeEnd && holeEnd > at)
            {
                // A hole ends the data before it, or is the answer.
                return done > 0
                    ? new FileRange(_file, _start + offset, done)
                    : FileRange.Hole((int)Math.Min(length, holeEnd - at));
            }

            int part = (int)Math.Min(length - done, DataFinder.StepBytes - (at % DataFinder.StepBytes));
            if (!_inMemory && !(IsResident(at) && IsResident(at + part - 1)))
                return FileRange.None;
            done += part;
        }

        return new FileRange(_file, _start + offset, length);
    }

    /// <summary>Makes durable all that had completed when it was called. Waits on the calling thread.</summary>
    /// <exception cref="DiskException">The sync failed, or an earlier one did.</exception>
    public void Flush()
    {
        if ((Features & DiskFeatures.ReadOnly) == 0)
            _sync.Run();
    }

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (!disposing || _file.IsClosed)
            return;
        _finder.Dispose();
        LockedFile.Close(_file);
    }

    /// <summary>
    /// The file's pages may be changed while a socket still refers to them: then data must be copied. (When XFS punches
    /// a hole, it clears whole blocks in place.) Nobody writes the base of a layer, as its locks say. An image that is
    /// only read may be written as long as another program holds the lock of those who write.
    /// </summary>
    private bool MayChange
        => !_cannotChange && ((Features & DiskFeatures.ReadOnly) == 0 || ImageLock.IsWritten(_file));

    /// <summary>
    /// Whether a write needs no read of the disk before it: a page that is written in part must be in memory. (The
    /// write itself goes to the page cache. The kernel may still throttle it, as everywhere.)
    /// </summary>
    private bool IsWritableNow(long offset, int length)
    {
        if (_inMemory)
            return true;
        long end = offset + length;
        bool headIsPartial = offset % PageSize != 0;
        bool tailIsPartial = end % PageSize != 0 && end != Length;
        if (!headIsPartial && !tailIsPartial)
            return true;
        return (!headIsPartial || IsResident(offset)) && (!tailIsPartial || IsResident(end - 1));
    }

    /// <summary>Whether the page around <paramref name="offset"/> is in memory.</summary>
    private bool IsResident(long offset)
    {
        Span<byte> one = stackalloc byte[1];
        return _inMemory || (_canReadNoWait && LinuxFile.ReadNoWait(_file, one, _start + offset) == 1);
    }

    private void Read(long offset, Span<byte> buffer)
    {
        long count = LinuxFile.Read(_file, buffer, _start + offset);
        if (count < 0)
            throw new DiskException("read", Path, offset, buffer.Length, Errno.Of(count));
        if (count < buffer.Length)
            throw _finder.TooShort(offset + count, offset + count);
    }

    private void Write(long offset, ReadOnlySpan<byte> data, bool durable)
    {
        if (durable)
            _sync.ThrowIfFailed();
        while (data.Length > 0)
        {
            _gate.Enter();
            try
            {
                // While a snapshot is being copied, one block at a time is written: each waits for its own copy only.
                int length = data.Length;
                if (_saving is { } saving)
                {
                    length = (int)Math.Min(length, SnapshotCopy.BlockSize - (offset % SnapshotCopy.BlockSize));
                    saving.Save(offset, length);
                }

                WriteRaw(offset, data[..length]);
                offset += length;
                data = data[length..];
            }
            finally
            {
                _gate.Leave();
            }
        }

        // A write is never synced on its own: the kernel reports a failed write-back to the first sync that looks, and
        // that one must be known to be a sync.
        if (durable)
            Flush();
    }

    private void WriteRaw(long offset, ReadOnlySpan<byte> data)
    {
        long count = LinuxFile.Write(_file, data, _start + offset);
        if (count < 0)
            throw new DiskException("write", Path, offset, data.Length, Errno.Of(count));
    }

    /// <summary>
    /// Syncs the file. A file that has become shorter has lost data, whatever the kernel says about the rest.
    /// </summary>
    private DiskException? Sync()
    {
        if (_version.Sync() is var errno and not Errno.None)
            return new DiskException("flush", Path, 0, Length, errno);
        try
        {
            _finder.ThrowIfShorter();
            return null;
        }
        catch (DiskException failure)
        {
            return failure;
        }
    }
}
