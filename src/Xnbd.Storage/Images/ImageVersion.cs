using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;

namespace Xnbd.Storage.Images;

/// <summary>
/// The version of an image: a number that differs when the image was changed. It is the time of the file's last change,
/// in nanoseconds since 1970; a device has a <see cref="DeviceVersion"/>. Layers know by it that their base has
/// changed, so a sync makes it durable together with the data: after the death of the machine the old time must not
/// stand over new data.
/// <para>
/// Threads: one thread at a time calls <see cref="Sync"/> (<see cref="ImageSync"/> sees to that). The other methods
/// have no state.
/// </para>
/// </summary>
/// <param name="path">The image's path, for messages.</param>
/// <param name="file">The open file.</param>
/// <param name="kind">A regular file or a block device.</param>
/// <param name="isWhole">The image is the whole file: layers may stand on it.</param>
/// <param name="length">Length of the image in bytes.</param>
internal sealed class ImageVersion(string path, SafeFileHandle file, FileKind kind, bool isWhole, long length)
{
    private long? _durable; // the time of the last change that is durable, as far as it is known
    private bool _isChangeDurable; // a change since the first sync is durable: later ones make no difference

    /// <summary>Reads the version.</summary>
    /// <param name="isKept">
    /// Something will be bound to it that outlives the machine's run. Then image and version are made durable, and a
    /// change from now on makes another version. (A device is synced in any case: what is not written yet has not been
    /// counted.)
    /// </param>
    /// <exception cref="DiskException">The sync failed.</exception>
    public long Read(bool isKept)
    {
        long version;
        if (kind == FileKind.BlockDevice)
        {
            SyncContents();
            version = DeviceVersion.Of(file);
        }
        else
        {
            Errno errno = isKept ? LinuxFile.Sync(file) : Errno.None;

            // A file system that an error has made read-only can still be read.
            if (errno != Errno.EROFS && IsFailure(errno))
                throw new DiskException("sync", path, 0, length, errno);
            errno = LinuxFile.Status(file, out FileStatus status);
            if (errno != Errno.None)
                throw LockedFile.Failure(errno, "look at", path);
            version = status.ModifiedNanoseconds;
        }

        if (isKept && version >= 0)
            WaitForLaterTime(version);
        return version;
    }

    /// <summary>
    /// Changes the version, durably, and nothing else. This comes before the first change of an image on which layers
    /// may stand: whatever becomes of the machine then, the layers do not take the image for what it was.
    /// </summary>
    /// <exception cref="DiskException">It could not be done.</exception>
    public void MarkChanged()
    {
        Errno errno = kind == FileKind.Regular ? LinuxFile.Touch(file) : RewriteStart();
        if (errno == Errno.None)
            errno = LinuxFile.Sync(file);
        if (errno != Errno.None)
            throw LockedFile.Failure(errno, "mark as changed", path);
    }

    /// <summary>
    /// Syncs the data, and, as far as it matters, the time of their change. The first sync covers what was left by a
    /// process that was killed, and another one the first change since. Which change it is makes no difference to
    /// anybody.
    /// </summary>
    public Errno Sync()
    {
        if (_isChangeDurable || kind != FileKind.Regular || !isWhole
            || LinuxFile.Status(file, out FileStatus status) != Errno.None
            || status.ModifiedNanoseconds == _durable)
            return LinuxFile.SyncData(file);
        Errno errno = LinuxFile.Sync(file);
        _isChangeDurable = errno == Errno.None && _durable is not null;
        _durable = status.ModifiedNanoseconds;
        return errno;
    }

    /// <summary>Makes durable what is in the file, whoever wrote it, even if this process only reads it.</summary>
    /// <exception cref="DiskException">The sync failed.</exception>
    public void SyncContents()
    {
        if (LinuxFile.SyncData(file) is var errno && IsFailure(errno))
            throw new DiskException("sync", path, 0, length, errno);
    }

    /// <summary>
    /// Whether a sync has failed. Some file systems that are never written cannot sync, and need not.
    /// </summary>
    private bool IsFailure(Errno errno)
        => errno != Errno.None && !(errno == Errno.EINVAL && LinuxFile.IsOnReadOnlyFileSystem(file));

    /// <summary>Writes a device's first block as it is, so that the kernel counts a write.</summary>
    private Errno RewriteStart()
    {
        Span<byte> start = stackalloc byte[(int)Math.Min(BlockRange.BlockSize, length)];
        long count = LinuxFile.Read(file, start, 0);
        if (count >= 0 && count < start.Length)
            return Errno.EIO;
        if (count >= 0)
            count = LinuxFile.Write(file, start, 0);
        return Errno.Of(count);
    }

    /// <summary>
    /// Waits until a change of the file gets a later time than the given one, if the file was changed just now. Times
    /// of change go in steps: of the kernel's timer, or of one or two seconds where a file system has no room for more.
    /// </summary>
    private static void WaitForLaterTime(long nanoseconds)
    {
        const long second = 1_000_000_000, timer = 20_000_000;
        long step = timer;
        if (nanoseconds % second == 0)
            step += nanoseconds % (2 * second) == 0 ? 2 * second : second;
        while (Math.Abs(((DateTime.UtcNow - DateTime.UnixEpoch).Ticks * 100) - nanoseconds) < step)
            Thread.Sleep(5);
    }
}
