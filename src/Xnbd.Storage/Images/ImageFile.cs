using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;
using Xnbd.Storage.Threads;

namespace Xnbd.Storage.Images;

/// <summary>
/// A disk image: a regular file of any length, or a block device, read and written where it stands.
/// <para>
/// What survives: a completed write is in the kernel's page cache, so the death of this process loses nothing; after
/// the death of the machine there is what a flush or a durable operation had covered. A sync that has failed may have
/// lost data that the kernel no longer holds, so from then on every flush fails until the image is opened anew.
/// </para>
/// <para>
/// The image is never mapped into memory: a full disk or an I/O error is an error of one request, not the end of
/// the process.
/// </para>
/// The type's other files: <c>ImageFile.Zeroing.cs</c> (zeroes and trim), <c>ImageFile.Locating.cs</c> (extents, and
/// where bytes stand), <c>ImageFile.Work.cs</c> (operations on the disk threads), <c>ImageFile.Snapshots.cs</c>. Its
/// locks are in <see cref="ImageLock"/>.
/// </summary>
public sealed partial class ImageFile : Disk
{
    private const int PageSize = 4096;

    /// <summary>The largest block of a local file system, in bytes; what a network file system names is a transfer size.</summary>
    private const uint MaxBlockBytes = 64 * 1024;

    private readonly SafeFileHandle _file;
    private readonly FileKind _kind;
    private readonly long _start; // where the image begins in its file, in bytes
    private readonly bool _inMemory;
    private readonly bool _canReadNoWait;
    private readonly bool _cannotChange; // nobody writes the file as long as it is open
    private readonly SafeFileHandle? _seeking; // a second opening of the file, to look for data and holes
    private readonly long _blockBytes; // the file system's blocks, at least a page
    private readonly WriteGate _gate = new();

    // Syncs, numbered in the order of their start; one at a time runs. Guarded by _syncing.
    private readonly object _syncing = new();
    private bool _isSyncing;
    private long _syncsStarted;
    private long _lastSync; // that has ended
    private volatile DiskException? _syncFailure;

    // Of the thread that syncs: the time of the last change that is durable, and whether that is later than the first
    // sync.
    private long? _durableChange;
    private bool _isChangeDurable;

    private ImageFile(string path, SafeFileHandle file, FileKind kind, long start, long length, bool readOnly, bool cannotChange = false)
    {
        Path = path;
        _file = file;
        _kind = kind;
        _start = start;
        Length = length;
        Features = readOnly ? DiskFeatures.ReadOnly : DiskFeatures.Trim;
        _inMemory = kind == FileKind.Regular && LinuxFile.IsInMemory(file);
        _cannotChange = cannotChange;
        _blockBytes = LinuxFile.Status(file, out FileStatus status) == Errno.None && kind == FileKind.Regular
            ? Math.Clamp(status.BlockBytes, PageSize, MaxBlockBytes)
            : PageSize;
        if (kind == FileKind.Regular)
            _ = LinuxFile.OpenAgain(file, out _seeking); // without it, all goes on with one opening
        Span<byte> probe = stackalloc byte[1];
        _canReadNoWait = !_inMemory && Errno.Of(LinuxFile.ReadNoWait(file, probe, start)) is Errno.None or Errno.EAGAIN;
    }

    /// <summary>Where the image stands.</summary>
    public string Path { get; }

    /// <inheritdoc/>
    public override long Length { get; }

    /// <inheritdoc/>
    public override DiskFeatures Features { get; }

    /// <summary>Syncs that were started; fewer than were asked for, since those who wait share them.</summary>
    internal long SyncCount => Volatile.Read(ref _syncsStarted);

    /// <summary>Opens an image.</summary>
    /// <param name="path">A regular file or a block device.</param>
    /// <param name="readOnly">Open it for reading only.</param>
    /// <param name="use">What it is opened for: who else may use it at the same time.</param>
    /// <exception cref="DiskException">It is absent, in use, may not be opened, or is neither file nor block device.</exception>
    public static ImageFile Open(string path, bool readOnly, ImageUse use = ImageUse.Shared)
    {
        Errno errno = LinuxFile.Open(path, readOnly ? OpenMode.ReadOnly : OpenMode.ReadWrite, out SafeFileHandle? file);
        FileStatus status = default;
        if (errno == Errno.None)
            errno = LinuxFile.Status(file!, out status);
        long length = status.Length;
        if (errno == Errno.None && status.Kind == FileKind.Directory)
            errno = Errno.EISDIR;
        if (errno == Errno.None && status.Kind == FileKind.BlockDevice)
            errno = LinuxFile.BlockDeviceLength(file!, out length);
        if (errno == Errno.ENXIO && LinuxFile.Status(path, out status) == Errno.None
            && status.Kind is not (FileKind.Regular or FileKind.BlockDevice))
            throw NoImage(path); // a socket

        if (errno != Errno.None)
        {
            file?.Dispose();
            bool mayRead = !readOnly && errno is Errno.EACCES or Errno.EROFS or Errno.EPERM;
            throw new DiskException(
                DiskException.Classify(errno),
                $"cannot open '{path}': {errno.Describe()}",
                mayRead ? Remedy.OpenReadOnly : Remedy.None);
        }

        if (status.Kind is not (FileKind.Regular or FileKind.BlockDevice))
        {
            file!.Dispose();
            throw NoImage(path);
        }

        try
        {
            ImageLock.Take(path, file!, readOnly, use);
            return new ImageFile(path, file!, status.Kind, start: 0, length, readOnly, cannotChange: use == ImageUse.Base);
        }
        catch
        {
            file!.Dispose();
            throw;
        }
    }

    private static DiskException NoImage(string path)
        => new(DiskError.Io, $"cannot serve '{path}': neither a regular file nor a block device");

    /// <summary>A part of a regular file as a disk, such as the data of a layer. The disk owns the file from now on.</summary>
    /// <param name="path">The file's name, for messages.</param>
    /// <param name="file">The open file.</param>
    /// <param name="start">Where the part begins, in bytes; a multiple of 4096.</param>
    /// <param name="length">Its length in bytes; the file is long enough.</param>
    /// <param name="readOnly">The file is open for reading only, and nobody writes it as long as it is.</param>
    internal static ImageFile OfPart(string path, SafeFileHandle file, long start, long length, bool readOnly)
        => new(path, file, FileKind.Regular, start, length, readOnly, cannotChange: readOnly);

    /// <summary>Opens the image of a cache, for this process alone; a file is made if it is absent, and grown if it is too short.</summary>
    /// <param name="path">A file, or a block device that is long enough.</param>
    /// <param name="length">The disk's length; what is beyond stays as it is.</param>
    /// <param name="mayGrow">A file that is absent or too short is right; otherwise it is an error.</param>
    /// <param name="mayHoldData">A regular file may hold data already: there is a map that speaks of them, or they are given up.</param>
    /// <exception cref="DiskException">It cannot be opened, is in use, or too short.</exception>
    internal static ImageFile OpenCache(string path, long length, bool mayGrow, bool mayHoldData)
    {
        Errno errno = LinuxFile.Open(path, OpenMode.ReadWrite | (mayGrow ? OpenMode.Create : 0), out SafeFileHandle? file);
        if (errno != Errno.None)
            throw LockedFile.Failure(errno, "open the cache image", path);
        try
        {
            ImageLock.Take(path, file!, readOnly: false, ImageUse.Alone);
            errno = LinuxFile.Status(file!, out FileStatus status);
            long present = status.Length;
            if (errno == Errno.None && status.Kind == FileKind.BlockDevice)
                errno = LinuxFile.BlockDeviceLength(file!, out present);
            else if (errno == Errno.None && status.Kind != FileKind.Regular)
                throw new DiskException(DiskError.Io, $"'{path}' is neither a regular file nor a block device");
            if (errno == Errno.None && status.Kind == FileKind.Regular && !mayHoldData && LinuxFile.NextData(file!, 0) >= 0)
            {
                throw new DiskException(
                    DiskError.Mismatch,
                    $"'{path}' holds data, and there is no map that says which blocks are right",
                    Remedy.OverwriteImage);
            }

            if (errno == Errno.None && present < length && status.Kind == FileKind.Regular && mayGrow)
                errno = LinuxFile.Truncate(file!, length);
            else if (errno == Errno.None && present < length)
                throw new DiskException(DiskError.NoSpace, $"the cache image '{path}' has {present} bytes; {length} are needed");
            if (errno != Errno.None)
                throw LockedFile.Failure(errno, "use the cache image", path);
            return new ImageFile(path, file!, status.Kind, start: 0, length, readOnly: false);
        }
        catch
        {
            file!.Dispose();
            throw;
        }
    }

    /// <summary>From now on others may read the image as well, as that of the target mode.</summary>
    internal void ShareLock() => ImageLock.Share(_file);

    /// <summary>
    /// Differs when the image was changed: the time of its last change, in nanoseconds since 1970, or of a device a
    /// <see cref="DeviceVersion"/>.
    /// </summary>
    /// <param name="isKept">
    /// Something will be bound to it that outlives the machine: then image and version are made durable, and a change
    /// from now on makes another version. (A device is synced in any case, since what was not written yet has not been
    /// counted yet.)
    /// </param>
    /// <exception cref="DiskException">The sync failed.</exception>
    internal long GetVersion(bool isKept)
    {
        long version;
        if (_kind == FileKind.BlockDevice)
        {
            SyncContents();
            version = DeviceVersion.Of(_file);
        }
        else
        {
            Errno errno = isKept ? LinuxFile.Sync(_file) : Errno.None;
            if (errno != Errno.EROFS && IsFailure(errno)) // a file system that has become read-only by an error can still be read
                throw new DiskException("sync", Path, 0, Length, errno);
            errno = LinuxFile.Status(_file, out FileStatus status);
            version = errno == Errno.None ? status.ModifiedNanoseconds : throw LockedFile.Failure(errno, "look at", Path);
        }

        if (isKept && version >= 0)
            WaitForLaterTime(version);
        return version;
    }

    /// <summary>
    /// Waits until a change gets another time than a given one: of an image that was written just now. Times of change go
    /// in steps, of the kernel's timer, or of one or two seconds where a file system has no room for more.
    /// </summary>
    private static void WaitForLaterTime(long nanoseconds)
    {
        const long second = 1_000_000_000, timer = 20_000_000;
        long step = timer + (nanoseconds % second != 0 ? 0 : nanoseconds % (2 * second) != 0 ? second : 2 * second);
        while (Math.Abs(((DateTime.UtcNow - DateTime.UnixEpoch).Ticks * 100) - nanoseconds) < step)
            Thread.Sleep(5);
    }

    /// <summary>Whether a sync has failed. Some file systems that are never written cannot do it, and need not.</summary>
    private bool IsFailure(Errno errno) => errno != Errno.None && !(errno == Errno.EINVAL && IsOnReadOnlyFileSystem);

    /// <summary>
    /// Changes the version, durably, and nothing else: to be called before the first change of an image on which layers
    /// may stand. Whatever becomes of the machine then, they do not take it for what it was.
    /// </summary>
    /// <exception cref="DiskException">It could not be done.</exception>
    internal void MarkChanged()
    {
        Errno errno = Errno.None;
        if (_kind == FileKind.Regular)
        {
            errno = LinuxFile.Touch(_file);
        }
        else if (Length > 0)
        {
            Span<byte> start = stackalloc byte[(int)Math.Min(PageSize, Length)];
            Read(0, start);
            WriteRaw(0, start);
        }

        if (errno == Errno.None)
            errno = LinuxFile.Sync(_file);
        if (errno != Errno.None)
            throw LockedFile.Failure(errno, "mark as changed", Path);
    }

    /// <summary>Nothing of it can be written, whoever tries: its file system is read-only.</summary>
    internal bool IsOnReadOnlyFileSystem => LinuxFile.IsOnReadOnlyFileSystem(_file);

    /// <summary>Makes durable what is in the file, whoever wrote it, also if this process only reads it.</summary>
    /// <exception cref="DiskException">The sync failed.</exception>
    internal void SyncContents()
    {
        if (LinuxFile.SyncData(_file) is var errno && IsFailure(errno))
            throw new DiskException("sync", Path, 0, Length, errno);
    }

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
    protected override void Dispose(bool disposing)
    {
        if (!disposing || _file.IsClosed)
            return;
        LinuxFile.Unlock(_file);
        _seeking?.Dispose();
        _file.Dispose();
    }

    /// <summary>
    /// Whether a write needs no read of the disk before it: a page written in part must be in memory. (The write itself
    /// goes to the page cache. It may still be throttled by the kernel, as everywhere.)
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
        {
            throw TooShort(offset + count, offset + count);
        }
    }

    private void Write(long offset, ReadOnlySpan<byte> data, bool durable)
    {
        ThrowIfSyncFailed(durable);
        while (data.Length > 0)
        {
            _gate.Enter();
            try
            {
                // While a snapshot is being copied, one block at a time: each waits for its own copy only.
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
    /// Makes durable what has completed. Those who ask while a sync is under way share the next one: it starts after they
    /// asked, so it covers what they mean. (A write is never synced on its own: the kernel reports a failed write-back to
    /// the first sync that looks, and that one must be known to be a sync.)
    /// </summary>
    /// <exception cref="DiskException">The sync failed, or an earlier one did.</exception>
    public void Flush()
    {
        if ((Features & DiskFeatures.ReadOnly) != 0)
            return;
        long number;
        lock (_syncing)
        {
            long needed = _syncsStarted + 1; // one that starts from now on
            while (_isSyncing && _lastSync < needed)
                Monitor.Wait(_syncing);
            ThrowIfSyncFailed(durable: true);
            if (_lastSync >= needed)
                return;
            _isSyncing = true;
            number = ++_syncsStarted;
        }

        DiskException? failure = Sync();
        lock (_syncing)
        {
            _isSyncing = false;
            _lastSync = number;
            _syncFailure ??= failure;
            Monitor.PulseAll(_syncing);
            ThrowIfSyncFailed(durable: true);
        }
    }

    /// <summary>Syncs the file. One that has become shorter has lost data, whatever the kernel says of the rest.</summary>
    private DiskException? Sync()
    {
        if (SyncFile() is var errno and not Errno.None)
            return new DiskException("flush", Path, 0, Length, errno);
        try
        {
            ThrowIfShorter();
            return null;
        }
        catch (DiskException failure)
        {
            return failure;
        }
    }

    /// <summary>
    /// Syncs the data, and, as far as it matters, the time of their change: by it layers know that their base has
    /// changed. After a crash of the machine the old time would stand over new data. The first sync covers what was
    /// left by a process that was killed, and another one the first change since; which change it is makes no
    /// difference to anybody.
    /// </summary>
    private Errno SyncFile()
    {
        if (_isChangeDurable || _kind != FileKind.Regular || _start != 0
            || LinuxFile.Status(_file, out FileStatus status) != Errno.None
            || status.ModifiedNanoseconds == _durableChange)
            return LinuxFile.SyncData(_file);
        Errno errno = LinuxFile.Sync(_file);
        _isChangeDurable = errno == Errno.None && _durableChange is not null;
        _durableChange = status.ModifiedNanoseconds;
        return errno;
    }

    private void ThrowIfSyncFailed(bool durable)
    {
        if (durable && _syncFailure is { } failure)
        {
            throw new DiskException(
                DiskError.Io, $"an earlier sync failed and may have lost data; nothing is called durable any more ({failure.Message})");
        }
    }
}
