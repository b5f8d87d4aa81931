using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;

namespace Xnbd.Storage.Images;

/// <summary>How a snapshot was made.</summary>
/// <param name="Path">The finished snapshot.</param>
/// <param name="IsReflink">The snapshot shares its blocks with the image; otherwise it is a copy.</param>
/// <param name="AllocatedBytes">Bytes that the snapshot takes; for a reflink, all that it refers to.</param>
public readonly record struct SnapshotResult(string Path, bool IsReflink, long AllocatedBytes);

/// <content>
/// Snapshots: a copy of the image as it stood at one moment, in a file beside it. The file is written under a temporary
/// name, made durable, and then renamed. After a crash an unfinished file may remain, which nobody has locked;
/// <see cref="RemoveAbandonedSnapshots"/> removes it.
/// </content>
public sealed partial class ImageFile
{
    private const string SnapshotInfix = ".snapshot.";
    private const string PartialSuffix = ".partial";

    private readonly SemaphoreSlim _oneSnapshot = new(1, 1);
    private volatile SnapshotCopy? _saving;

    /// <summary>
    /// Makes a snapshot, named for the time in seconds since 1970: <c>IMAGE.snapshot.SECONDS</c> (a later second if
    /// that name is taken). The moment of the snapshot is soon after this method is called: the snapshot has all writes
    /// that had completed before the call, and none that starts after <paramref name="begun"/> was called.
    /// </summary>
    /// <param name="now">The time for the name.</param>
    /// <param name="begun">Called when the moment has passed and the copy, if one is needed, starts.</param>
    /// <param name="progress">Receives how many bytes have been copied or passed over.</param>
    /// <param name="cancel">Gives the snapshot up; nothing is left behind.</param>
    /// <exception cref="DiskException">
    /// The snapshot could not be made; nothing is left behind, and the image is as it was.
    /// </exception>
    public SnapshotResult TakeSnapshot(
        DateTimeOffset now, Action begun, Action<long> progress, CancellationToken cancel)
    {
        if (_kind != FileKind.Regular || _start != 0)
            throw new DiskException(DiskError.NotSupported, "only snapshots of a whole regular file are supported");
        if (!_oneSnapshot.Wait(0, CancellationToken.None))
            throw new DiskException(DiskError.NotSupported, "a snapshot is being made already");
        try
        {
            RemoveAbandonedSnapshots();
            Flush(); // a clone writes back what is dirty while writers wait: so most of it is written now
            string partial = Path + SnapshotInfix + now.ToUnixTimeSeconds() + PartialSuffix;
            using SafeFileHandle target = CreatePartial(partial);
            try
            {
                bool isReflink = Fill(target, begun, progress, cancel);
                cancel.ThrowIfCancellationRequested();
                Check(LinuxFile.Sync(target), "sync", partial);
                string path = PutInPlace(partial, now.ToUnixTimeSeconds());
                _ = LinuxFile.Status(target, out FileStatus status);
                return new SnapshotResult(path, isReflink, status.AllocatedBytes);
            }
            catch
            {
                _ = LinuxFile.Unlink(partial);
                throw;
            }
        }
        finally
        {
            _oneSnapshot.Release();
        }
    }

    /// <summary>Removes unfinished snapshots of this image that a killed server left.</summary>
    /// <returns>The paths of the files that were removed.</returns>
    public IReadOnlyList<string> RemoveAbandonedSnapshots()
        => LockedFile.RemoveAbandoned(Path + SnapshotInfix, PartialSuffix, _ => true);

    /// <summary>
    /// Creates and locks the file. Its owner and mode are the image's: a snapshot shows as much as the image does.
    /// </summary>
    private SafeFileHandle CreatePartial(string partial)
    {
        SafeFileHandle target = LockedFile.Create(partial);
        Errno errno = LinuxFile.Status(_file, out FileStatus status);
        if (errno == Errno.None)
            errno = LinuxFile.SetOwner(target, status);
        if (errno == Errno.None)
            return target;
        target.Dispose();
        _ = LinuxFile.Unlink(partial);
        throw LockedFile.Failure(errno, "prepare", partial);
    }

    private static void Check(Errno errno, string operation, string path)
    {
        if (errno != Errno.None)
            throw LockedFile.Failure(errno, operation, path);
    }

    /// <returns>True when the file system shares the blocks; false when they were copied.</returns>
    private bool Fill(SafeFileHandle target, Action begun, Action<long> progress, CancellationToken cancel)
    {
        SnapshotCopy? copy = SnapshotCopy.CanCopy(Length)
            ? new SnapshotCopy(_file, _finder.Opening, target, Length)
            : null;
        Errno cloned = Errno.EOPNOTSUPP;
        _gate.RunClosed(() =>
        {
            _finder.ThrowIfShorter();
            cloned = LinuxFile.Clone(_file, target);
            if (cloned != Errno.None)
                _saving = copy;
        });
        if (cloned != Errno.None && copy is null)
        {
            throw new DiskException(
                DiskError.NotSupported,
                $"the image has {Length} bytes: a snapshot of more than {SnapshotCopy.MaxLength} is made only where the"
                + " file system can share blocks between files");
        }

        begun();
        if (cloned == Errno.None)
            return true;

        try
        {
            Check(LinuxFile.Truncate(target, Length), "extend", "the snapshot");
            copy!.CopyAll(progress, cancel);
        }
        finally
        {
            // No writer may be inside: one that has seen the copy may still be saving into it.
            _gate.RunClosed(() => _saving = null);
        }

        if (copy.Failure is not null)
            throw copy.Failure;
        _finder.ThrowIfShorter(); // what is behind the end would have been taken for a hole
        return false;
    }

    private string PutInPlace(string partial, long seconds)
    {
        while (true)
        {
            string path = Path + SnapshotInfix + seconds++;
            Errno errno = LinuxFile.RenameNoReplace(partial, path);
            if (errno == Errno.EEXIST)
                continue;
            Check(errno, "put in place", path);
            LinuxFile.SyncDirectoryOf(path);
            return path;
        }
    }
}
