using System.Globalization;
using Microsoft.Win32.SafeHandles;

namespace Xnbd.Linux;

/// <summary>
/// How much was written to a block device, as the kernel counts it. The counters start at 0 with the machine, or the
/// device.
/// </summary>
/// <param name="DiskSequence">Tells this disk from all others that had its number since the machine was started; 0 on
/// old kernels.</param>
/// <param name="SectorsRead">Sectors that were read.</param>
/// <param name="SectorsWritten">Sectors that were written or zeroed.</param>
/// <param name="SectorsDiscarded">Sectors that were discarded.</param>
public readonly record struct BlockDeviceCounters(
    ulong DiskSequence, ulong SectorsRead, ulong SectorsWritten, ulong SectorsDiscarded);

/// <summary>What the kernel knows of a block device, beyond its length.</summary>
public static unsafe class BlockDevice
{
    private const nuint IoctlLoopStatus = 0x4c05; // LOOP_GET_STATUS64

    /// <summary>
    /// Reads the counters of a device or a partition. Data that is only in the page cache is not counted yet, so
    /// callers sync first.
    /// </summary>
    /// <param name="device">The open device.</param>
    /// <param name="counters">The counters.</param>
    /// <returns>False if this kernel, or the device's driver, does not count.</returns>
    public static bool TryReadCounters(SafeFileHandle device, out BlockDeviceCounters counters)
    {
        counters = default;
        if (LinuxFile.Status(device, out FileStatus status) != Errno.None || status.Kind != FileKind.BlockDevice)
            return false;

        // Some drivers claim to count but do not. So a read past the page cache must change the counters.
        if (!TryRead(status, out BlockDeviceCounters before) || !ReadStart(device))
            return false;
        return TryRead(status, out counters) && counters.SectorsRead != before.SectorsRead;
    }

    /// <summary>The file behind a loop device.</summary>
    /// <param name="device">The open device.</param>
    /// <param name="backing">What is known of the file.</param>
    /// <returns>False if it is no loop device, or if the file cannot be found any more.</returns>
    public static bool TryGetLoopFile(SafeFileHandle device, out FileStatus backing)
    {
        backing = default;
        ulong* info = stackalloc ulong[32]; // struct loop_info64, which begins with the file's device and inode
        return LinuxFile.Status(device, out FileStatus status) == Errno.None
            && status.Kind == FileKind.BlockDevice
            && ReadText($"{Folder(status)}/loop/backing_file") is { } path
            && LibC.IoCtl(device, IoctlLoopStatus, (nint)info) == 0
            && LinuxFile.Status(path, out backing) == Errno.None
            && (info[0], info[1]) == (Encode(backing.Device), backing.Inode);
    }

    private static string Folder(in FileStatus status)
        => string.Create(CultureInfo.InvariantCulture, $"/sys/dev/block/{status.Number.Major}:{status.Number.Minor}");

    private static bool TryRead(in FileStatus status, out BlockDeviceCounters counters)
    {
        const int sectorsRead = 2, sectorsWritten = 6, sectorsDiscarded = 13; // Documentation/block/stat.rst
        counters = default;
        string folder = Folder(status);
        string disk = ReadText(folder + "/partition") is null ? folder : ParentOf(folder);
        if (ReadText(disk + "/queue/iostats") is not "1")
            return false;
        string[] words = (ReadText(folder + "/stat") ?? "").Split(' ', StringSplitOptions.RemoveEmptyEntries);
        if (words.Length <= sectorsDiscarded)
            return false;
        _ = ulong.TryParse(ReadText(disk + "/diskseq"), CultureInfo.InvariantCulture, out ulong sequence);
        counters = new BlockDeviceCounters(
            sequence, Number(sectorsRead), Number(sectorsWritten), Number(sectorsDiscarded));
        return true;

        ulong Number(int index) => ulong.Parse(words[index], CultureInfo.InvariantCulture);
    }

    /// <summary>The folder of the disk that a partition is on.</summary>
    private static string ParentOf(string folder)
        => Path.GetDirectoryName(Directory.ResolveLinkTarget(folder, returnFinalTarget: true)?.FullName) ?? folder;

    /// <summary>Reads the first bytes past the page cache.</summary>
    private static bool ReadStart(SafeFileHandle device)
    {
        const int length = 64 * 1024; // a multiple of every block size
        const OpenMode mode = OpenMode.ReadOnly | OpenMode.Direct;
        if (LinuxFile.Open(LinuxFile.NameOf(device), mode, out SafeFileHandle? direct) != Errno.None)
            return false;
        using (direct)
        using (var buffer = new NativeBuffer(length))
            return LinuxFile.Read(direct!, buffer.GetSpan(), 0) > 0;
    }

    /// <summary>Reads a file of sysfs, without the end of its line.</summary>
    /// <returns>Null if the file is absent.</returns>
    private static string? ReadText(string path)
    {
        try
        {
            string text = File.ReadAllText(path);
            return text.EndsWith('\n') ? text[..^1] : text;
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            return null;
        }
    }

    /// <summary>Encodes a device number as the loop driver does.</summary>
    /// <param name="device">Major number in the upper half, minor number in the lower half.</param>
    private static ulong Encode(ulong device)
    {
        ulong major = device >> 32, minor = device & 0xffffffff;
        return (minor & 0xff) | (major << 8) | ((minor & ~0xfful) << 12);
    }
}
