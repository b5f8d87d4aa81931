using System.Buffers.Binary;
using System.IO.Hashing;
using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;

namespace Xnbd.Storage.Images;

/// <summary>
/// A number that differs when a block device was written. A device has no time of last change, so this takes its place.
/// There are three kinds, told apart by their sign (docs/formats.md):
/// <list type="bullet">
/// <item>for a loop device whose file can be found: that file's time of last change, never negative;</item>
/// <item>for other devices a negative number: a hash of this run of the machine and of what the kernel counts. After
/// the machine was started anew nobody knows what was written before;</item>
/// <item><see cref="Unknown"/>, which equals no version, not even itself.</item>
/// </list>
/// </summary>
internal static class DeviceVersion
{
    /// <summary>Nothing is known: the kernel does not count this device's writes.</summary>
    public const long Unknown = long.MinValue;

    private const int BootShift = 48;
    private const long BootMask = 0x7fffL << BootShift;

    /// <summary>The version of a device, which has been synced before.</summary>
    public static long Of(SafeFileHandle device)
    {
        if (BlockDevice.TryGetLoopFile(device, out FileStatus backing) && backing.Kind == FileKind.Regular)
            return Math.Max(0, backing.ModifiedNanoseconds);
        if (!BlockDevice.TryReadCounters(device, out BlockDeviceCounters counters)
            || LinuxFile.Status(device, out FileStatus status) != Errno.None)
            return Unknown;
        Span<ulong> words = stackalloc ulong[6];
        LinuxProcess.BootId.TryWriteBytes(System.Runtime.InteropServices.MemoryMarshal.AsBytes(words[..2]));
        words[2] = ((ulong)status.Number.Major << 32) | status.Number.Minor;
        words[3] = counters.DiskSequence;
        words[4] = counters.SectorsWritten;
        words[5] = counters.SectorsDiscarded;
        ulong hash = XxHash3.HashToUInt64(System.Runtime.InteropServices.MemoryMarshal.AsBytes(words));
        long version = long.MinValue | Boot() | ((long)hash & ((1L << BootShift) - 1));
        return version == Unknown ? version + 1 : version;
    }

    /// <summary>Whether two versions prove that nothing was written in between.</summary>
    public static bool AreEqual(long known, long actual) => known == actual && actual != Unknown;

    /// <summary>Describes for people why a device is not known to be as it was.</summary>
    /// <param name="known">The device's version then.</param>
    /// <param name="actual">The device's version now; negative.</param>
    public static string Describe(long known, long actual)
    {
        if (actual == Unknown)
            return "nobody can know whether it was written since: the kernel does not count what is written to it";
        if (known is >= 0 or Unknown)
            return "nobody can know whether it was written since: the layer does not say what had been written to it";
        return (known & BootMask) == (actual & BootMask)
            ? "it has been written since, or taken away and attached again"
            : "nobody can know whether it was written since: "
                + "the machine has been started anew, and a device does not tell";
    }

    /// <summary>A number that tells this run of the machine from most others.</summary>
    private static long Boot()
    {
        Span<byte> id = stackalloc byte[16];
        LinuxProcess.BootId.TryWriteBytes(id);
        return ((long)BinaryPrimitives.ReadUInt16LittleEndian(id) << BootShift) & BootMask;
    }
}
