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

    /// <summary>Takes a lock on the open file, without waiting; it ends with the last descriptor of this opening.</summary>
    /// <param name="file">The file.</param>
    /// <param name="shared">Others may hold it as well, if they share it too.</param>
    /// <returns><see cref="Errno.EAGAIN"/> when somebody else holds it.</returns>
    public static Errno TryLock(SafeFileHandle file, bool shared = false)
        => LibC.Outcome(LibC.FLock(file, (shared ? LockShared : LockExclusive) | LockNonBlocking));

    /// <summary>Takes a lock on one byte of the file (an open-file-description lock), without waiting.</summary>
    /// <param name="file">The file; open for writing, if nobody else is to hold the lock.</param>
    /// <param name="offset">The byte.</param>
    /// <param name="shared">Others may hold it as well, if they share it too.</param>
    /// <returns>
    /// <see cref="Errno.EAGAIN"/> when somebody else's lock forbids it; another error where there are no such locks.
    /// </returns>
    public static Errno TryLockByte(SafeFileHandle file, long offset, bool shared = true)
    {
        const int setLock = 37; // F_OFD_SETLK
        var range = new LibC.RecordLock { Type = shared ? ReadLock : WriteLock, Start = offset, Length = 1 };
        return LibC.Outcome(LibC.FCntl(file, setLock, &range));
    }

    /// <summary>Lets go of a lock of <see cref="TryLockByte"/>.</summary>
    public static void UnlockByte(SafeFileHandle file, long offset)
    {
        const int setLock = 37; // F_OFD_SETLK
        var range = new LibC.RecordLock { Type = Unlocked, Start = offset, Length = 1 };
        _ = LibC.FCntl(file, setLock, &range);
    }

    /// <summary>
    /// Lets go of all locks of this opening of the file. Closing does that too; but a child that this process is starting at that
    /// moment would hold them until it runs its own program.
    /// </summary>
    public static void Unlock(SafeFileHandle file)
    {
        const int setLock = 37; // F_OFD_SETLK
        var all = new LibC.RecordLock { Type = Unlocked };
        _ = LibC.FCntl(file, setLock, &all);
        _ = LibC.FLock(file, LockRelease);
    }

    /// <summary>Whether somebody else holds a lock on one byte of the file.</summary>
    public static bool IsByteLocked(SafeFileHandle file, long offset)
    {
        const int getLock = 36; // F_OFD_GETLK
        var range = new LibC.RecordLock { Type = WriteLock, Start = offset, Length = 1 };
        return LibC.FCntl(file, getLock, &range) == 0 && range.Type != Unlocked;
    }
}
