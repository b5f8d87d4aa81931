using Microsoft.Win32.SafeHandles;

namespace Xnbd.Linux;

/// <content>Locks on files.</content>
public static unsafe partial class LinuxFile
{
    private const int LockShared = 1;
    private const int LockExclusive = 2;
    private const int LockNonBlocking = 4;
    private const int LockRelease = 8;

    private const short ReadLock = 0, WriteLock = 1, Unlocked = 2;

    /// <summary>
    /// Takes a lock on the open file, without waiting. The lock ends with the last descriptor of the open file.
    /// </summary>
    /// <param name="file">The file.</param>
    /// <param name="shared">Other processes may hold a shared lock at the same time.</param>
    /// <returns><see cref="Errno.EAGAIN"/> when another process holds it.</returns>
    public static Errno TryLock(SafeFileHandle file, bool shared = false)
        => LibC.Outcome(LibC.FLock(file, (shared ? LockShared : LockExclusive) | LockNonBlocking));

    /// <summary>Takes a lock on one byte of the file (an open-file-description lock), without waiting.</summary>
    /// <param name="file">The file; open for writing if the lock is not shared.</param>
    /// <param name="offset">Offset of the byte.</param>
    /// <param name="shared">Other processes may hold a shared lock at the same time.</param>
    /// <returns>
    /// <see cref="Errno.EAGAIN"/> when a lock of another process forbids it; another error if the file system has no
    /// such locks.
    /// </returns>
    public static Errno TryLockByte(SafeFileHandle file, long offset, bool shared = true)
    {
        const int setLock = 37; // F_OFD_SETLK
        var range = new LibC.RecordLock { Type = shared ? ReadLock : WriteLock, Start = offset, Length = 1 };
        return LibC.Outcome(LibC.FCntl(file, setLock, &range));
    }

    /// <summary>Releases a lock of <see cref="TryLockByte"/>.</summary>
    public static void UnlockByte(SafeFileHandle file, long offset)
    {
        const int setLock = 37; // F_OFD_SETLK
        var range = new LibC.RecordLock { Type = Unlocked, Start = offset, Length = 1 };
        _ = LibC.FCntl(file, setLock, &range);
    }

    /// <summary>
    /// Releases all locks of this open file. Closing it does that, too; but a child process that is being started at
    /// that moment would hold them until it runs its own program.
    /// </summary>
    public static void Unlock(SafeFileHandle file)
    {
        const int setLock = 37; // F_OFD_SETLK
        var all = new LibC.RecordLock { Type = Unlocked };
        _ = LibC.FCntl(file, setLock, &all);
        _ = LibC.FLock(file, LockRelease);
    }

    /// <summary>Whether another process holds a lock on one byte of the file.</summary>
    public static bool IsByteLocked(SafeFileHandle file, long offset)
    {
        const int getLock = 36; // F_OFD_GETLK
        var range = new LibC.RecordLock { Type = WriteLock, Start = offset, Length = 1 };
        return LibC.FCntl(file, getLock, &range) == 0 && range.Type != Unlocked;
    }
}
