using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;
using Xnbd.Storage.Images;

namespace Xnbd.Storage.Layers;

/// <summary>Makes new files, each of which appears under its name when it is complete and durable.</summary>
public static class NewFile
{
    /// <summary>Makes a file.</summary>
    /// <param name="path">The file, which must not exist.</param>
    /// <param name="write">
    /// Writes its contents. It receives the path under which the file stands until it is complete, and the open file.
    /// </param>
    /// <exception cref="DiskException">The file exists, or cannot be made; nothing is left behind.</exception>
    public static async Task Write(string path, Func<string, SafeFileHandle, Task> write)
    {
        if (LinuxFile.Status(path, out _) == Errno.None)
            throw LockedFile.Failure(Errno.EEXIST, "write", path);
        using SafeFileHandle file = LockedFile.CreateBeside(Path.GetFullPath(path), out string partial);
        try
        {
            await write(partial, file);
            Check(LinuxFile.Sync(file), path);
            Check(LinuxFile.RenameNoReplace(partial, path), path);
            LinuxFile.SyncDirectoryOf(path);
            LinuxFile.Unlock(file);
        }
        catch
        {
            _ = LinuxFile.Unlink(partial);
            throw;
        }
    }

    /// <summary>Throws if a system call on the file has failed.</summary>
    internal static void Check(Errno errno, string path)
    {
        if (errno != Errno.None)
            throw LockedFile.Failure(errno, "write", path);
    }
}
