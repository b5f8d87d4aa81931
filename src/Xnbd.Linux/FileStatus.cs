namespace Xnbd.Linux;

/// <summary>The kind of a file.</summary>
public enum FileKind
{
    /// <summary>A regular file.</summary>
    Regular,

    /// <summary>A block device.</summary>
    BlockDevice,

    /// <summary>A directory.</summary>
    Directory,

    /// <summary>A socket.</summary>
    Socket,

    /// <summary>Anything else.</summary>
    Other,
}

/// <summary>The status of a file, as <c>statx</c> reports it.</summary>
/// <param name="Kind">The kind of file.</param>
/// <param name="Length">A regular file's length in bytes.</param>
/// <param name="AllocatedBytes">Space that it takes on its file system, in bytes.</param>
/// <param name="Inode">Its number within its file system.</param>
/// <param name="Device">The file system's device, major and minor number.</param>
/// <param name="Permissions">Its permissions, as for <c>chmod</c>.</param>
/// <param name="User">Its owner.</param>
/// <param name="Group">Its group.</param>
/// <param name="ModifiedNanoseconds">Time of the last change of its contents, in nanoseconds since 1970.</param>
/// <param name="BlockBytes">The unit in which its file system allocates and reads, in bytes
/// (<c>st_blksize</c>).</param>
/// <param name="Number">Major and minor number, if the file is a device.</param>
public readonly record struct FileStatus(
    FileKind Kind,
    long Length,
    long AllocatedBytes,
    ulong Inode,
    ulong Device,
    uint Permissions,
    uint User,
    uint Group,
    long ModifiedNanoseconds,
    uint BlockBytes,
    (uint Major, uint Minor) Number)
{
    /// <summary>The device as one number, as the C library's <c>stat</c> has it (<c>makedev</c>).</summary>
    public ulong DeviceNumber
    {
        get
        {
            ulong major = Device >> 32, minor = Device & 0xffff_ffff;
            return ((major & 0xffff_f000) << 32) | ((major & 0xfff) << 8)
                | ((minor & 0xffff_ff00) << 12) | (minor & 0xff);
        }
    }

    /// <summary>Whether both are one and the same file.</summary>
    public bool IsSameFile(in FileStatus other) => (Inode, Device) == (other.Inode, other.Device);
}
