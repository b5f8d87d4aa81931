using System.Runtime.InteropServices;
using Microsoft.Win32.SafeHandles;

namespace Xnbd.Linux;

/// <content>What kind of file it is, and on which file system.</content>
public static unsafe partial class LinuxFile
{
    private const uint StatXBasic = 0x7ff;
    private const int StatXLength = 256;

    /// <summary>Reads the status of an open file.</summary>
    public static Errno Status(SafeHandle file, out FileStatus status)
    {
        const int emptyPath = 0x1000;
        byte* buffer = stackalloc byte[StatXLength];
        Errno errno = LibC.Outcome(LibC.StatX(file, "", emptyPath, StatXBasic, buffer));
        status = errno == Errno.None ? ReadStatX(buffer) : default;
        return errno;
    }

    /// <summary>Reads the status of a file by its path; symbolic links are followed.</summary>
    public static Errno Status(string path, out FileStatus status)
    {
        byte* buffer = stackalloc byte[StatXLength];
        Errno errno = LibC.Outcome(LibC.StatX(CurrentDirectory, path, 0, StatXBasic, buffer));
        status = errno == Errno.None ? ReadStatX(buffer) : default;
        return errno;
    }

    /// <summary>Whether the file lives in memory (tmpfs, ramfs), where no read ever waits for a disk.</summary>
    public static bool IsInMemory(SafeFileHandle file)
    {
        const long tmpfs = 0x01021994, ramfs = 0x858458f6;
        byte* buffer = stackalloc byte[256]; // f_type is the first word of struct statfs
        return LibC.FStatFs(file, buffer) == 0 && (*(long*)buffer & 0xffffffff) is tmpfs or ramfs;
    }

    /// <summary>Whether the file can be read only because its file system, or its mount, is read-only.</summary>
    public static bool IsOnReadOnlyFileSystem(SafeFileHandle file)
    {
        const int flagsAt = 10, readOnly = 1; // f_flags is the eleventh word of struct statfs; ST_RDONLY
        byte* buffer = stackalloc byte[256];
        return LibC.FStatFs(file, buffer) == 0 && (((long*)buffer)[flagsAt] & readOnly) != 0;
    }

    /// <summary>Reads <c>struct statx</c>, which has the same layout on every architecture.</summary>
    private static FileStatus ReadStatX(byte* buffer)
    {
        FileKind kind = (*(ushort*)(buffer + 28) & 0xf000) switch
        {
            0x8000 => FileKind.Regular,
            0x6000 => FileKind.BlockDevice,
            0x4000 => FileKind.Directory,
            0xc000 => FileKind.Socket,
            _ => FileKind.Other,
        };
        ulong device = ((ulong)*(uint*)(buffer + 136) << 32) | *(uint*)(buffer + 140);
        uint permissions = *(ushort*)(buffer + 28) & 0xfffu;
        return new FileStatus(
            kind, *(long*)(buffer + 40), *(long*)(buffer + 48) * 512, *(ulong*)(buffer + 32), device, permissions,
            *(uint*)(buffer + 20), *(uint*)(buffer + 24),
            (*(long*)(buffer + 112) * 1_000_000_000) + *(uint*)(buffer + 120),
            *(uint*)(buffer + 4),
            (*(uint*)(buffer + 128), *(uint*)(buffer + 132)));
    }
}
