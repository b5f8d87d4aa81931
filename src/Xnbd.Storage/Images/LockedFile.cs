using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;

namespace Xnbd.Storage.Images;

/// <summary>
/// Files that are in use as long as a process holds their lock (<c>flock</c>). The kernel releases the lock when the
/// process ends, however it ends: so a temporary file without a lock is what a killed process left behind.
/// </summary>
internal static class LockedFile
{
    /// <summary>Creates a file and locks it for this process alone.</summary>
    /// <exception cref="DiskException">The file exists, or cannot be created.</exception>
    public static SafeFileHandle Create(string path)
        => TryCreate(path) ?? throw Failure(Errno.EEXIST, "create", path);

    /// <summary>Creates a file under a new name beside a path. It will be renamed to that path later.</summary>
    public static SafeFileHandle CreateBeside(string path, out string partial)
    {
        partial = $"{path}.{Guid.NewGuid().ToString("N")[..8]}.partial";
        return Create(partial);
    }

    /// <returns>Null if the file exists.</returns>
    /// <exception cref="DiskException">The file cannot be created.</exception>
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

            // Before it was locked, another process took it for abandoned, and has removed it, or is about to.
            Close(file);
            if (errno is not (Errno.None or Errno.EAGAIN))
            {
                _ = LinuxFile.Unlink(path);
                throw Failure(errno, "lock", path);
            }
        }
    }

    /// <summary>Removes files that nobody has locked and whose names fit a pattern.</summary>
    /// <param name="prefix">The directory, and how the names begin.</param>
    /// <param name="suffix">How the names end; between prefix and suffix there are digits.</param>
    /// <param name="isOurs">Tells whether an open and locked file may be removed.</param>
    /// <returns>The paths of the files that were removed.</returns>
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
            return removed; // in a directory that cannot be listed, this program has left nothing
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

            // This program leaves regular files only. Anything else of such a name belongs to somebody.
            if (LinuxFile.Status(file!, out FileStatus status) == Errno.None && status.Kind == FileKind.Regular
                && LinuxFile.TryLock(file!) == Errno.None && IsAt(path, file!) && isOurs(file!)
                && LinuxFile.Unlink(path) == Errno.None)
                removed.Add(path);
            Close(file);
        }

        return removed;
    }

    /// <summary>
    /// Closes a file, and releases its locks before; see <see cref="LinuxFile.Unlock"/>. A file that is closed already
    /// stays so.
    /// </summary>
    public static void Close(SafeFileHandle? file)
    {
        if (file is not { IsClosed: false })
            return;
        LinuxFile.Unlock(file);
        file.Dispose();
    }

    /// <summary>Whether a path names an open file.</summary>
    public static bool IsAt(string path, SafeFileHandle file)
        => LinuxFile.Status(path, out FileStatus there) == Errno.None
            && LinuxFile.Status(file, out FileStatus here) == Errno.None
            && there.IsSameFile(here);

    /// <summary>What to throw when something cannot be done with a file.</summary>
    public static DiskException Failure(Errno errno, string operation, string path)
        => new(DiskException.Classify(errno), $"cannot {operation} '{path}': {errno.Describe()}");
}
