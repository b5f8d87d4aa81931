using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;

namespace Xnbd.Storage.Images;

/// <summary>
/// The locks of an open image, which keep out programs that would do harm. The kernel releases them when the file is
/// closed. Where there are no locks (some network file systems), nobody is kept out.
/// <para>
/// The whole file is locked (<c>flock</c>): exclusively by a program that needs it alone, else shared. In addition, two
/// bytes are locked as QEMU does, so that its programs and this one respect each other: one byte by a program that
/// writes the file, the other one by a program that does not tolerate another writer. Each program looks whether
/// another one holds the byte that excludes it.
/// </para>
/// <para>
/// A program looks before it locks its bytes, so it does not disturb one that has been there for long. It looks again
/// after both bytes are locked, so two programs that start at the same moment do not miss each other. Then both unlock
/// their bytes and try again after a random time: one of them comes first.
/// </para>
/// </summary>
internal static class ImageLock
{
    /// <summary>The offset of QEMU's byte for programs that write (<c>BLK_PERM_WRITE</c>).</summary>
    private const long Writes = 100 + 1;

    /// <summary>The offset of QEMU's byte for programs that tolerate no other writer.</summary>
    private const long ToleratesNoWriter = 200 + 1;

    /// <summary>
    /// How often two programs give way to each other; each time, one of them most likely comes first.
    /// </summary>
    private const int MaxTries = 20;

    private const int MaxPauseMilliseconds = 20;

    /// <summary>Takes the locks.</summary>
    /// <param name="path">The file's name, for messages.</param>
    /// <param name="file">The open file; its owner closes it, also if this fails.</param>
    /// <param name="readOnly">The file is only read.</param>
    /// <param name="use">What the file is opened for.</param>
    /// <exception cref="InUseException">Another program excludes this use, or would be excluded.</exception>
    public static void Take(string path, SafeFileHandle file, bool readOnly, ImageUse use)
    {
        if (LinuxFile.TryLock(file, shared: use != ImageUse.Alone) == Errno.EAGAIN)
        {
            const string reason = "another program needs it, or has it, alone";
            throw new InUseException($"'{path}'", file, UseConflict.NeededAlone, reason);
        }

        bool toleratesNoWriter = use == ImageUse.Base || (!readOnly && use != ImageUse.Shared);
        for (int attempt = 1; attempt <= MaxTries; attempt++)
        {
            ThrowIfExcluded(path, file, readOnly, toleratesNoWriter);
            bool isLocked = (readOnly || LinuxFile.TryLockByte(file, Writes) != Errno.EAGAIN)
                & (!toleratesNoWriter || LinuxFile.TryLockByte(file, ToleratesNoWriter) != Errno.EAGAIN);
            if (isLocked && !IsExcluded(file, readOnly, toleratesNoWriter))
                return;
            LinuxFile.UnlockByte(file, Writes);
            LinuxFile.UnlockByte(file, ToleratesNoWriter);
            Thread.Sleep(Random.Shared.Next(1, MaxPauseMilliseconds));
        }

        ThrowIfExcluded(path, file, readOnly, toleratesNoWriter);
        throw new InUseException($"'{path}'", file, UseConflict.NeededAlone, "others keep locking it", Writes);
    }

    /// <summary>From now on others may read the file as well, and nobody else may write it.</summary>
    public static void Share(SafeFileHandle file) => _ = LinuxFile.TryLock(file, shared: true);

    /// <summary>Another program may be writing the file.</summary>
    public static bool IsWritten(SafeFileHandle file) => LinuxFile.IsByteLocked(file, Writes);

    private static bool IsExcluded(SafeFileHandle file, bool readOnly, bool toleratesNoWriter)
        => (!readOnly && LinuxFile.IsByteLocked(file, ToleratesNoWriter))
            || (toleratesNoWriter && LinuxFile.IsByteLocked(file, Writes));

    private static void ThrowIfExcluded(string path, SafeFileHandle file, bool readOnly, bool toleratesNoWriter)
    {
        bool isRefused = !readOnly && LinuxFile.IsByteLocked(file, ToleratesNoWriter);
        bool isWritten = (isRefused || toleratesNoWriter) && LinuxFile.IsByteLocked(file, Writes);
        if (isWritten)
        {
            string reason = "another program writes it" + (isRefused ? ", and tolerates no other writer" : "");
            throw new InUseException($"'{path}'", file, UseConflict.AnotherWriter, reason, Writes);
        }

        if (isRefused)
        {
            const string reason = "another program relies on its staying as it is";
            throw new InUseException($"'{path}'", file, UseConflict.MustNotChange, reason, ToleratesNoWriter);
        }
    }
}
