using System.Buffers.Binary;
using Xnbd.Storage.Maps;

namespace Xnbd.Storage.Layers;

/// <summary>
/// Recognises files that hold a disk in a format of its own. This program serves the bytes of a file as they are, so a
/// client of such a file sees the format instead of the disk. But a client of a raw image may write anything to its
/// first blocks: what is found here is worth a warning, and decides nothing.
/// </summary>
public static class ImageFormat
{
    /// <summary>The format that this program serves.</summary>
    public const string Raw = "raw";

    /// <summary>How many bytes at either end of a file are looked at.</summary>
    public const int SampleBytes = 512;

    /// <summary>Finds the format of a file, by the name that <c>qemu-img</c> has for it.</summary>
    /// <param name="start">The first <see cref="SampleBytes"/> bytes, or all of a shorter file.</param>
    /// <param name="end">The last <see cref="SampleBytes"/> bytes, or all of a shorter file.</param>
    /// <returns>Null for raw images, which may look like anything.</returns>
    public static string? Find(ReadOnlySpan<byte> start, ReadOnlySpan<byte> end)
    {
        const int vdiSignatureAt = 64;
        const uint vdiSignature = 0xbeda107f;
        if (start.StartsWith("QFI"u8) && start.Length >= 8 && start[3] == 0xfb)
            return BinaryPrimitives.ReadUInt32BigEndian(start[4..]) == 1 ? "qcow" : "qcow2";
        if (start.StartsWith("KDMV"u8) || start.StartsWith("COWD"u8) || start.StartsWith("# Disk DescriptorFile"u8))
            return "vmdk";
        if (start.StartsWith("vhdxfile"u8))
            return "vhdx";
        if (start.Length >= vdiSignatureAt + 4
            && BinaryPrimitives.ReadUInt32LittleEndian(start[vdiSignatureAt..]) == vdiSignature)
            return "vdi";
        if (start.StartsWith("conectix"u8) || (end.Length == SampleBytes && end.StartsWith("conectix"u8)))
            return "vpc"; // a dynamic image has its footer at the start, too
        if (start.StartsWith("QED\0"u8))
            return "qed";
        if (start.StartsWith("WithoutFreeSpace"u8) || start.StartsWith("WithouFreSpacExt"u8))
            return "parallels";
        return MapHeader.HasMagic(start) ? "xnbd-layer" : null;
    }

    /// <summary>Finds the format of an open disk.</summary>
    /// <returns>Null for raw images, and if the disk cannot be read.</returns>
    public static string? Find(Disk disk)
    {
        int length = (int)Math.Min(SampleBytes, disk.Length);
        byte[] start = new byte[length], end = new byte[length];
        try
        {
            disk.ReadAsync(0, start).AsTask().GetAwaiter().GetResult();
            disk.ReadAsync(disk.Length - length, end).AsTask().GetAwaiter().GetResult();
        }
        catch (DiskException)
        {
            return null; // the first client that reads is told
        }

        return Find(start, end);
    }
}
