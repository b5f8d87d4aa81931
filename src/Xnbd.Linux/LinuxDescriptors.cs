using System.Runtime.InteropServices;

namespace Xnbd.Linux;

/// <summary>
/// How many descriptors this process may have. The last ones are a reserve, which clients do not get: without it they
/// could take what a broken remote needs to come back, the control channel, the log, or a snapshot.
/// </summary>
public static unsafe class LinuxDescriptors
{
    private const int NumberOfFiles = 7; // RLIMIT_NOFILE

    /// <summary>
    /// The most that is asked for: the clients that a server takes, several times over. A hard limit may be a billion,
    /// and programs that walk through all numbers would then take minutes.
    /// </summary>
    private const int MostWanted = 65_536;

    /// <summary>
    /// The reserve: 64 connections to a remote, 16 control clients, and as many for logs, layers and snapshots.
    /// </summary>
    private const int LargestReserve = 128;

    /// <summary>The limit at present: descriptors are smaller numbers.</summary>
    public static int Limit
    {
        get
        {
            LibC.ResourceLimit limit;
            return LibC.GetRLimit(NumberOfFiles, &limit) == 0 ? (int)Math.Min(limit.Soft, int.MaxValue) : 1024;
        }
    }

    /// <summary>
    /// Raises this process's limit to what it may be (<c>RLIMIT_NOFILE</c>, from soft to hard). Its children inherit
    /// it.
    /// </summary>
    public static void RaiseLimit()
    {
        LibC.ResourceLimit limit;
        if (LibC.GetRLimit(NumberOfFiles, &limit) != 0)
            return;
        ulong wanted = Math.Min(limit.Hard, MostWanted);
        if (limit.Soft >= wanted)
            return;
        limit.Soft = wanted;
        _ = LibC.SetRLimit(NumberOfFiles, &limit);
    }

    /// <summary>
    /// Whether a descriptor is one of the reserve. The kernel gives out the smallest number that is free, so all that
    /// are not of the reserve are in use then.
    /// </summary>
    /// <param name="descriptor">The descriptor; it is open.</param>
    /// <param name="limit">The <see cref="Limit"/>.</param>
    public static bool IsOfReserve(SafeHandle descriptor, int limit)
        => (int)descriptor.DangerousGetHandle() >= limit - Math.Min(LargestReserve, limit / 4);
}
