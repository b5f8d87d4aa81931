using System.Runtime.InteropServices;
using Microsoft.Win32.SafeHandles;

namespace Xnbd.Linux;

/// <summary>How a file is opened.</summary>
[Flags]
public enum OpenMode
{
    /// <summary>For reading only.</summary>
    ReadOnly = 0,

    /// <summary>For reading and writing.</summary>
    ReadWrite = 2,

    /// <summary>Create it, for its owner alone; fail if it is there.</summary>
    CreateNew = 0x40 | 0x80,

    /// <summary>Create it, for its owner alone, if it is absent.</summary>
    Create = 0x40,

    /// <summary>
    /// For writing at the end that the file has by then; create it if it is absent, readable for all.
    /// </summary>
    Append = 1 | 0x400 | 0x40,

    /// <summary>
    /// Refuse a symbolic link with <see cref="Errno.ELOOP"/>. (The number is our own: it differs between
    /// architectures.)
    /// </summary>
    NoFollow = 1 << 30,

    /// <summary>Past the page cache, for aligned reads of devices. (The number is our own, too.)</summary>
    Direct = 1 << 29,
}

/// <summary>How <see cref="LinuxFile.Allocate"/> changes a range.</summary>
[Flags]
public enum AllocateMode
{
    /// <summary><c>FALLOC_FL_KEEP_SIZE</c>: the file does not grow.</summary>
    KeepSize = 1,

    /// <summary><c>FALLOC_FL_PUNCH_HOLE</c>: the range reads as zeroes and takes no space.</summary>
    PunchHole = 2,

    /// <summary><c>FALLOC_FL_ZERO_RANGE</c>: the range reads as zeroes and stays allocated.</summary>
    ZeroRange = 16,
}

/// <summary>
/// Files by descriptor: positioned reads and writes, and other calls that the BCL lacks. Counts and offsets are in
/// bytes. Methods that return a <c>long</c> return a count or a negated <see cref="Errno"/> (see
/// <see cref="ErrnoExtensions"/>). Interrupted calls are repeated.
/// </summary>
public static unsafe partial class LinuxFile
{
    private const int OpenCloseOnExec = 0x80000;
    private const int OpenNonBlocking = 0x800;
    private const int RwfNoWait = 8;

    private const int SeekData = 3;
    private const int SeekHole = 4;

    private const int AdviceWillNeed = 3;

    private const int CurrentDirectory = -100; // AT_FDCWD

    private const nuint IoctlBlockDeviceLength = 0x80081272; // BLKGETSIZE64
    private const nuint IoctlClone = 0x40049409; // FICLONE

    private static readonly bool s_isArm =
        RuntimeInformation.ProcessArchitecture is Architecture.Arm64 or Architecture.Arm;
    private static readonly int s_openNoFollow = s_isArm ? 0x8000 : 0x20000; // O_NOFOLLOW
    private static readonly int s_openDirect = s_isArm ? 0x10000 : 0x4000; // O_DIRECT

    /// <summary>
    /// Opens a file; the descriptor is closed on exec. It never waits for another program: a FIFO is opened at once, or
    /// fails with <see cref="Errno.ENXIO"/> if it is opened for writing and has no reader.
    /// </summary>
    /// <param name="path">The file.</param>
    /// <param name="mode">How it is opened.</param>
    /// <param name="file">The open file; null on failure.</param>
    public static Errno Open(string path, OpenMode mode, out SafeFileHandle? file)
    {
        file = null;
        int flags = (int)(mode & ~(OpenMode.NoFollow | OpenMode.Direct)) | OpenCloseOnExec;
        flags |= (mode & OpenMode.NoFollow) != 0 ? s_openNoFollow : 0;
        flags |= (mode & OpenMode.Direct) != 0 ? s_openDirect : 0;
        uint permissions = (mode & OpenMode.Append) == OpenMode.Append ? 0b110_100_100u : 0b110_000_000u;
        Errno errno = Open(path, flags | OpenNonBlocking, permissions, out SafeFileHandle? opened);

        // Another program, such as Samba, holds a lease: this open waits until the program has released it.
        if (errno == Errno.EAGAIN && Status(path, out FileStatus leased) == Errno.None
            && leased.Kind == FileKind.Regular)
            errno = Open(path, flags, permissions, out opened);
        if (errno != Errno.None)
            return errno;

        // From here on the file behaves as if it had been opened without O_NONBLOCK.
        if (Status(opened!, out FileStatus status) == Errno.None && status.Kind == FileKind.BlockDevice)
        {
            // With O_NONBLOCK some drivers skip checks, such as that for a medium. So the device is opened once more.
            errno = Open(NameOf(opened!), flags & ~(s_openNoFollow | (int)OpenMode.CreateNew), 0, out file);
            if (errno != Errno.ENOENT)
            {
                opened!.Dispose();
                return errno;
            }
        }

        _ = LinuxSocket.SetBlocking(opened!);
        file = opened;
        return Errno.None;
    }

    /// <summary>A path that leads to an open file, wherever the file is by now.</summary>
    public static string NameOf(SafeFileHandle file) => $"/proc/self/fd/{file.DangerousGetHandle()}";

    private static Errno Open(string path, int flags, uint permissions, out SafeFileHandle? file)
    {
        int descriptor;
        do
        {
            descriptor = LibC.Open(path, flags, permissions);
        }
        while (descriptor < 0 && Marshal.GetLastPInvokeError() == (int)Errno.EINTR);
        Errno errno = LibC.Outcome(descriptor);
        file = errno == Errno.None ? new SafeFileHandle(descriptor, ownsHandle: true) : null;
        return errno;
    }

    /// <summary>
    /// Opens an open file once more, for reading: the same file, but with its own file position and locks. The file's
    /// name does not matter.
    /// </summary>
    /// <param name="file">The open file.</param>
    /// <param name="again">The second open file; null on failure, for example without /proc.</param>
    public static Errno OpenAgain(SafeFileHandle file, out SafeFileHandle? again)
    {
        bool added = false;
        try
        {
            file.DangerousAddRef(ref added);
            return Open($"/proc/self/fd/{file.DangerousGetHandle()}", OpenMode.ReadOnly, out again);
        }
        finally
        {
            if (added)
                file.DangerousRelease();
        }
    }

    /// <summary>Reads until the buffer is full or the file ends.</summary>
    /// <returns>Bytes read; fewer than asked for only at the end of the file.</returns>
    public static long Read(SafeFileHandle file, Span<byte> buffer, long offset)
    {
        int done = 0;
        fixed (byte* start = buffer)
        {
            while (done < buffer.Length)
            {
                long count = LibC.Result(LibC.PRead(file, start + done, (nuint)(buffer.Length - done), offset + done));
                if (Errno.Of(count) == Errno.EINTR)
                    continue;
                if (count <= 0)
                    return count < 0 ? count : done;
                done += (int)count;
            }
        }

        return done;
    }

    /// <summary>Reads what is in memory, without waiting for a disk (<c>RWF_NOWAIT</c>).</summary>
    /// <returns>
    /// Bytes read, perhaps fewer than asked for; -EAGAIN when the first is not in memory; -EOPNOTSUPP where the file
    /// system cannot tell.
    /// </returns>
    public static long ReadNoWait(SafeFileHandle file, Span<byte> buffer, long offset)
    {
        fixed (byte* start = buffer)
        {
            var vector = new LibC.IoVector { Base = start, Length = (nuint)buffer.Length };
            long count;
            do
            {
                count = LibC.Result(LibC.PReadV2(file, &vector, 1, offset, RwfNoWait));
            }
            while (Errno.Of(count) == Errno.EINTR);
            return count;
        }
    }

    /// <summary>Writes the whole buffer.</summary>
    /// <param name="file">The file.</param>
    /// <param name="buffer">The data.</param>
    /// <param name="offset">Offset in the file in bytes.</param>
    /// <returns>The buffer's length, or a negated error number; then a part may have been written.</returns>
    public static long Write(SafeFileHandle file, ReadOnlySpan<byte> buffer, long offset)
    {
        int done = 0;
        fixed (byte* start = buffer)
        {
            while (done < buffer.Length)
            {
                long count = LibC.Result(LibC.PWrite(file, start + done, (nuint)(buffer.Length - done), offset + done));
                if (Errno.Of(count) == Errno.EINTR)
                    continue;
                if (count <= 0)
                    return count < 0 ? count : -(int)Errno.EIO;
                done += (int)count;
            }
        }

        return done;
    }

    /// <summary>Writes at the end of a file that was opened with <see cref="OpenMode.Append"/>.</summary>
    /// <returns>Bytes written, or a negated error number.</returns>
    public static long Append(SafeFileHandle file, ReadOnlySpan<byte> buffer)
    {
        fixed (byte* start = buffer)
            return LibC.Result(LibC.Write(file, start, (nuint)buffer.Length));
    }

    /// <summary>Sets the permissions of a file, and its owner if this process may.</summary>
    public static Errno SetOwner(SafeFileHandle file, in FileStatus model)
    {
        _ = LibC.FChOwn(file, model.User, model.Group); // only root may give files away
        return LibC.Outcome(LibC.FChMod(file, model.Permissions));
    }

    /// <summary>Changes how a range is allocated (<c>fallocate</c>).</summary>
    public static Errno Allocate(SafeFileHandle file, AllocateMode mode, long offset, long length)
    {
        Errno errno;
        do
        {
            errno = LibC.Outcome(LibC.FAllocate(file, (int)mode, offset, length));
        }
        while (errno == Errno.EINTR);
        return errno;
    }

    /// <summary>The first byte at or after <paramref name="offset"/> that is data.</summary>
    /// <returns>
    /// Its offset; -ENXIO when only a hole follows; another negated error where the file system cannot tell.
    /// </returns>
    public static long NextData(SafeFileHandle file, long offset)
        => LibC.Result((nint)LibC.LSeek(file, offset, SeekData));

    /// <summary>
    /// The first byte at or after <paramref name="offset"/> that is in a hole; the end of the file counts as one.
    /// </summary>
    public static long NextHole(SafeFileHandle file, long offset)
        => LibC.Result((nint)LibC.LSeek(file, offset, SeekHole));

    /// <summary>Makes all data written so far durable, and the metadata needed to read it.</summary>
    public static Errno SyncData(SafeFileHandle file) => LibC.Outcome(LibC.FDataSync(file));

    /// <summary>Makes data and all metadata durable; for a directory, its entries.</summary>
    public static Errno Sync(SafeFileHandle file) => LibC.Outcome(LibC.FSync(file));

    /// <summary>Sets the time of a file's last change to now.</summary>
    public static Errno Touch(SafeFileHandle file) => LibC.Outcome(LibC.FUTimeNs(file, null));

    /// <summary>Sets a file's length.</summary>
    public static Errno Truncate(SafeFileHandle file, long length) => LibC.Outcome(LibC.FTruncate(file, length));

    /// <summary>Asks the kernel to read a range into memory soon: a hint, whose failure does not matter.</summary>
    public static void AdviseWillNeed(SafeFileHandle file, long offset, long length)
        => _ = LibC.FAdvise(file, offset, length, AdviceWillNeed);

    /// <summary>
    /// Makes the whole of <paramref name="target"/> share the blocks of <paramref name="source"/> (<c>FICLONE</c>).
    /// </summary>
    public static Errno Clone(SafeFileHandle source, SafeFileHandle target)
        => LibC.Outcome(LibC.IoCtl(target, IoctlClone, source.DangerousGetHandle()));

    /// <summary>A block device's length in bytes.</summary>
    public static Errno BlockDeviceLength(SafeFileHandle device, out long length)
    {
        long value = 0;
        Errno errno = LibC.Outcome(LibC.IoCtl(device, IoctlBlockDeviceLength, (nint)(&value)));
        length = value;
        return errno;
    }

    /// <summary>Makes the entries of a file's directory durable, as far as the file system can.</summary>
    public static void SyncDirectoryOf(string path)
    {
        string folder = Path.GetDirectoryName(Path.GetFullPath(path))!;
        if (Open(folder, OpenMode.ReadOnly, out SafeFileHandle? directory) != Errno.None)
            return;
        using (directory)
            _ = Sync(directory!);
    }

    /// <summary>Renames a file; fails with <see cref="Errno.EEXIST"/> when the new name is taken.</summary>
    public static Errno RenameNoReplace(string oldPath, string newPath)
    {
        const uint noReplace = 1;
        Errno errno = LibC.Outcome(LibC.RenameAt2(CurrentDirectory, oldPath, CurrentDirectory, newPath, noReplace));
        if (errno is not (Errno.EINVAL or Errno.ENOSYS))
            return errno;
        errno = LibC.Outcome(LibC.Link(oldPath, newPath)); // the file system does not know the flag, as NFS does not
        return errno == Errno.None ? Unlink(oldPath) : errno;
    }

    /// <summary>Renames a file, and replaces one that may have the new name.</summary>
    public static Errno Rename(string oldPath, string newPath) => LibC.Outcome(LibC.Rename(oldPath, newPath));

    /// <summary>Removes a file's name.</summary>
    public static Errno Unlink(string path) => LibC.Outcome(LibC.Unlink(path));
}
