using Xnbd.Linux;

namespace Xnbd.Programs.Wrapper;

/// <summary>A file that an export uses, whatever its names are.</summary>
/// <param name="Path">The full path.</param>
/// <param name="IsChanged">The export writes it.</param>
/// <param name="Identity">What tells it from other files; null if it is absent.</param>
internal readonly record struct FileUse(string Path, bool IsChanged, string? Identity)
{
    /// <summary>Looks at a file. The call may wait for a file system that does not answer.</summary>
    public static FileUse Of(string path, bool isChanged)
    {
        if (LinuxFile.Status(path, out FileStatus status) != Errno.None)
            return new FileUse(path, isChanged, null);
        return new FileUse(path, isChanged, status.Kind == FileKind.BlockDevice
            ? $"device {status.Number.Major}:{status.Number.Minor}"
            : $"inode {status.Inode} of {status.Device}");
    }

    /// <summary>Both are one file.</summary>
    public bool IsSame(in FileUse other)
        => Path == other.Path || (Identity is not null && Identity == other.Identity);
}
