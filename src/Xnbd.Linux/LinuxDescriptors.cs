using System.Runtime.InteropServices;

namespace Xnbd.Linux;

/// <summary>
/// How many descriptors this process may have. The last ones are a reserve, which clients do not get. Without the
/// reserve, clients could take the descriptors that the remote's connections, the control channel, the log and
/// snapshots need.
/// </summary>
public static unsafe class LinuxDescriptors
{
    private const int NumberOfFiles = 7; // RLIMIT_NOFILE

    /// <summary>
    /// The highest limit that is set: several times the number of clients that a server accepts. A hard limit may be a
    /// billion, and a child process that walks through all numbers would then take minutes.
    /// </summary>
    private const int MaxWanted = 65_536;

    /// <summary>
    /// The reserve: 64 connections to a remote, 16 control clients, and 48 for logs, layers and snapshots.
    /// </summary>
    private const int MaxReserve = 128;

    /// <summary>The present limit: all descriptors are smaller numbers.</summary>
    public static int Limit
    {
        get
        {
            LibC.ResourceLimit limit;
            return LibC.GetRLimit(NumberOfFiles, &limit) == 0 ? (int)Math.Min(limit.Soft, int.MaxValue) : 1024;
        }
    }

    /// <summary>
    /// Raises the soft limit of this process towards its hard limit (<c>RLIMIT_NOFILE</c>). Child processes inherit the
    /// limit.
    /// </summary>
    public static void RaiseLimit()
    {
        LibC.ResourceLimit limit;
        if (LibC.GetRLimit(NumberOfFiles, &limit) != 0)
            return;
        ulong wanted = Math.Min(limit.Hard, MaxWanted);
        if (limit.Soft >= wanted)
            return;
        limit.Soft = wanted;
        _ = LibC.SetRLimit(NumberOfFiles, &limit);
    }

    /// <summary>Keeps a descriptor from child processes.</summary>
    public static Errno CloseOnExec(int descriptor)
    {
        const int setDescriptorFlags = 2, closeOnExec = 1; // F_SETFD, FD_CLOEXEC
        return LibC.Outcome(LibC.FCntl(descriptor, setDescriptorFlags, closeOnExec));
    }

    /// <summary>
    /// Whether a descriptor is one of the reserve. The kernel gives out the smallest free number, so all descriptors
    /// outside the reserve are in use then.
    /// </summary>
    /// <param name="descriptor">The descriptor; it is open.</param>
    /// <param name="limit">The <see cref="Limit"/>.</param>
    public static bool IsOfReserve(SafeHandle descriptor, int limit)
        => (int)descriptor.DangerousGetHandle() >= limit - Math.Min(MaxReserve, limit / 4);
}
