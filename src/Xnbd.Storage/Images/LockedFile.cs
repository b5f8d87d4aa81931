using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;

namespace Xnbd.Storage.Images;

/// <summary>
/// Files that are in use as long as somebody holds their lock (<c>flock</c>). The kernel lets go of it when the process
/// ends, however it ends: so a temporary file without a lock is what a killed process left behind.
/// </summary>
internal static class LockedFile
{
    /// <summary>Creates a file and locks it for this process alone.</summary>
    /// <exception cref="DiskException">It is there already, or cannot be created.</exception>
    public static SafeFileHandle Create(string path)
        => TryCreate(path) ?? throw Failure(Errno.EEXIST, "create", path);

    /// <summary>Creates a file beside another one, with a name that nobody has, to be put in that one's place later.</summary>
    public static SafeFileHandle CreateBeside(string path, out string partial)
    {
        partial = $"{path}.{Guid.NewGuid().ToString("N")[..8]}.partial";
        return Create(partial);
    }

    /// <returns>Null when the file is there already.</returns>
    /// <exception cref="DiskException">It cannot be created.</exception>
    public static SafeFileHandle? TryCreate(string path)
    {
        while (true)
        {
            Errno errno = LinuxFile.Open(path, OpenMode.ReadWrite | OpenMode.CreateNew, out SafeFileHandle? file);
            if (errno == Errno.EEXIST)
                return null;
            if (errno != Errno.None)
                throw Failure(errno, "create", path);
            errno = LinuxFile.TryLock(file!);
            if (errno == Errno.None && IsAt(path, file!))
                return file;

            // Before it was locked, somebody who cleans up took it for a leftover, and has removed it, or is about to.
            file!.Dispose();
            if (errno is not (Errno.None or Errno.EAGAIN))
            {
                _ = LinuxFile.Unlink(path);
                throw Failure(errno, "lock", path);
            }
        }
    }

    /// <summary>Removes files of a pattern that nobody holds.</summary>
    /// <param name="prefix">Directory, and how the names begin.</param>
    /// <param name="suffix">How they end; between the two there are digits.</param>
    /// <param name="isOurs">Says of an open and locked file whether it may go.</param>
    /// <returns>The files removed.</returns>
    public static IReadOnlyList<string> RemoveAbandoned(string prefix, string suffix, Func<SafeFileHandle, bool> isOurs)
    {
        string full = Path.GetFullPath(prefix);
        string namePrefix = Path.GetFileName(full);
        var removed = new List<string>();
        IEnumerable<string> paths;
        try
        {
            paths = Directory.EnumerateFiles(Path.GetDirectoryName(full)!).ToList();
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            return removed; // a directory that cannot be listed holds nothing that this program could have left
        }

        foreach (string path in paths)
        {
            string name = Path.GetFileName(path);
            if (name.Length <= namePrefix.Length + suffix.Length
                || !name.StartsWith(namePrefix, StringComparison.Ordinal)
                || !name.EndsWith(suffix, StringComparison.Ordinal)
                || !name[namePrefix.Length..^suffix.Length].All(char.IsAsciiDigit)
                || LinuxFile.Open(path, OpenMode.ReadOnly | OpenMode.NoFollow, out SafeFileHandle? file) != Errno.None)
                continue;
            using (file)
            {
                // This program leaves regular files only. Anything else of such a name is somebody's.
                if (LinuxFile.Status(file!, out FileStatus status) == Errno.None && status.Kind == FileKind.Regular
                    && LinuxFile.TryLock(file!) == Errno.None && IsAt(path, file!) && isOurs(file!)
                    && LinuxFile.Unlink(path) == Errno.None)
                    removed.Add(path);
            }
        }

        return removed;
    }

    /// <summary>Whether a path leads to an open file.</summary>
    public static bool IsAt(string path, SafeFileHandle file)
        => LinuxFile.Status(path, out FileStatus there) == Errno.None
            && LinuxFile.Status(file, out FileStatus here) == Errno.None
            && there.IsSameFile(here);

    /// <summary>What to throw when something cannot be done with a file.</summary>
    public static DiskException Failure(Errno errno, string operation, string path)
        => new(DiskException.Classify(errno), $"cannot {operation} '{path}': {errno.Describe()}");
}
