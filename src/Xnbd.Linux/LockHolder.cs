using System.Globalization;
using Microsoft.Win32.SafeHandles;

namespace Xnbd.Linux;

/// <summary>A program that holds a lock.</summary>
/// <param name="ProcessId">Its process.</param>
/// <param name="Program">The program's name, as the kernel knows it.</param>
public sealed record LockHolder(int ProcessId, string Program)
{
    /// <summary>Finds another process that holds a lock on a file, for a message to people.</summary>
    /// <remarks>
    /// Nothing here waits for a file system. It looks at all processes, so it is only for refusals. Only root can see
    /// the descriptors of other users' processes.
    /// </remarks>
    /// <param name="file">The file, opened.</param>
    /// <param name="lockedByte">The byte that is locked; null for the lock of the whole file (<c>flock</c>).</param>
    /// <returns>Null if the process cannot be found, or has released the lock meanwhile.</returns>
    public static LockHolder? Find(SafeFileHandle file, long? lockedByte)
    {
        if (NameInLocks(file) is not { } name)
            return null;
        return FindByDescriptors(name, lockedByte) ?? (lockedByte is null ? FindByLocks(name) : null);
    }

    /// <summary>
    /// Finds a process that has a descriptor for the open file that holds the lock. Locks of bytes belong to no
    /// process, so this is the only way to find out. A program may also have passed its descriptor on, to a child that
    /// lives longer.
    /// </summary>
    private static LockHolder? FindByDescriptors(string name, long? lockedByte)
    {
        foreach (string folder in Entries("/proc"))
        {
            string number = Path.GetFileName(folder);
            if (!int.TryParse(number, NumberStyles.None, CultureInfo.InvariantCulture, out int process)
                || process == Environment.ProcessId)
                continue;
            foreach (string descriptor in Entries(folder + "/fdinfo"))
            {
                if (Lines(descriptor).Any(line => line.StartsWith("lock:", StringComparison.Ordinal)
                    && IsLock(line, name, lockedByte)))
                    return Name(process);
            }
        }

        return null;
    }

    /// <summary>Finds the process that the kernel's list of locks names. All users may read that list.</summary>
    private static LockHolder? FindByLocks(string name)
    {
        foreach (string line in Lines("/proc/locks"))
        {
            string[] words = line.Split(' ', StringSplitOptions.RemoveEmptyEntries);
            if (IsLock(line, name, lockedByte: null)
                && int.TryParse(words[^4], NumberStyles.None, CultureInfo.InvariantCulture, out int process)
                && process != Environment.ProcessId
                && Name(process) is { } holder)
                return holder;
        }

        return null;
    }

    /// <summary>Whether a line describes the lock, such as "1: OFDLCK ADVISORY READ -1 fe:00:1234 101 101".</summary>
    private static bool IsLock(string line, string name, long? lockedByte)
    {
        string[] words = line.Split((char[])[' ', '\t'], StringSplitOptions.RemoveEmptyEntries);
        if (words.Length < 8 || words[^3] != name)
            return false;
        if (lockedByte is not { } wanted)
            return words.Contains("FLOCK");
        return !words.Contains("FLOCK")
            && long.TryParse(words[^2], CultureInfo.InvariantCulture, out long first)
            && first <= wanted
            && (!long.TryParse(words[^1], CultureInfo.InvariantCulture, out long last) || wanted <= last); // or "EOF"
    }

    /// <summary>
    /// The file's name in the kernel's lists of locks: device and inode. The device is that of the mount, which on
    /// Btrfs differs from that of <c>stat</c>.
    /// </summary>
    private static string? NameInLocks(SafeFileHandle file)
    {
        if (LinuxFile.Status(file, out FileStatus status) != Errno.None)
            return null;
        const string mountLabel = "mnt_id:";
        string? mount = Lines($"/proc/self/fdinfo/{file.DangerousGetHandle()}")
            .FirstOrDefault(line => line.StartsWith(mountLabel, StringComparison.Ordinal))?[mountLabel.Length..].Trim();
        string[]? device = Lines("/proc/self/mountinfo")
            .Select(line => line.Split(' ')).FirstOrDefault(words => words[0] == mount)?[2].Split(':');
        ulong major = device is null ? status.Device >> 32 : ulong.Parse(device[0], CultureInfo.InvariantCulture);
        ulong minor = device is null ? status.Device & 0xffffffff
            : ulong.Parse(device[1], CultureInfo.InvariantCulture);
        return string.Create(CultureInfo.InvariantCulture, $"{major:x2}:{minor:x2}:{status.Inode}");
    }

    private static LockHolder? Name(int process)
        => Lines($"/proc/{process}/comm").FirstOrDefault() is { } program ? new LockHolder(process, program) : null;

    private static IEnumerable<string> Entries(string folder)
    {
        try
        {
            return Directory.GetFileSystemEntries(folder);
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            return []; // the process has ended, or belongs to another user
        }
    }

    private static string[] Lines(string path)
    {
        try
        {
            return File.ReadAllLines(path);
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            return [];
        }
    }
}
