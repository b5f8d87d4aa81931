using System.Buffers.Binary;
using System.IO.Hashing;
using System.Runtime.InteropServices;
using Xnbd.Linux;
using Xnbd.Storage;
using Xnbd.Storage.Maps;

namespace Xnbd.Fuzz;

/// <summary>
/// Makes a damaged map of an input. The input is a list of changes to a map without faults, so that it stays small, and
/// the fuzzer does not have to guess checksums:
/// <list type="bullet">
/// <item>the first byte: bit 0 repairs the checksums of the header, bit 1 those of the pages, bit 2 makes the boot id
/// that of another
/// run of the machine, bit 3 makes it a cache's map, bit 4 cuts the file: its length is the next two bytes times
/// two;</item>
/// <item>then, as often as there are bytes: an offset (two bytes, big-endian), a count (one byte), and so many
/// bytes.</item>
/// </list>
/// </summary>
internal static class MapBytes
{
    public const byte RepairHeader = 1, RepairPages = 2, OtherBoot = 4, IsCache = 8, Cut = 16;

    /// <summary>Length of the disk, in bytes: six blocks, the last of which is short.</summary>
    public const int DiskLength = (5 * BlockRange.BlockSize) + 77;

    /// <summary>The origin's name in the map of a cache.</summary>
    public const string Origin = "nbd://origin/";

    /// <summary>The run of the machine in which a map is opened.</summary>
    public static Guid BootId { get; } = LinuxProcess.BootId;

    private const int PageBytes = 4096, PageHead = 32;

    private static readonly Guid s_otherBoot = new("01234567-89ab-cdef-0123-456789abcdef");
    private static readonly Guid s_id = new("c0ffee00-1111-2222-3333-444455556666");

    /// <summary>Where the blocks' data begins, and a cache's map ends, in bytes.</summary>
    public static int DataStart => (int)MapLayout.FileLength(DiskLength);

    /// <summary>Builds what an input says.</summary>
    public static byte[] Build(byte[] input)
    {
        var reader = new ByteReader(input);
        byte options = reader.TryTake(1, out ReadOnlySpan<byte> first) ? first[0] : (byte)0;
        byte[] bytes = MakeSound(IsOfCache(input), (options & OtherBoot) != 0 ? s_otherBoot : BootId);
        int length = bytes.Length;
        if ((options & Cut) != 0 && reader.TryTake(2, out ReadOnlySpan<byte> cut))
            length = Math.Min(length, BinaryPrimitives.ReadUInt16BigEndian(cut) * 2);
        while (reader.TryTake(3, out ReadOnlySpan<byte> head))
        {
            int offset = BinaryPrimitives.ReadUInt16BigEndian(head), count = Math.Min(head[2], reader.Left);
            _ = reader.TryTake(count, out ReadOnlySpan<byte> content);
            content[..Math.Clamp(bytes.Length - offset, 0, count)].CopyTo(bytes.AsSpan(Math.Min(offset, bytes.Length)));
        }

        if ((options & RepairHeader) != 0)
        {
            RepairCopy(bytes.AsSpan(0, MapHeader.Size));
            RepairCopy(bytes.AsSpan(MapHeader.Size, MapHeader.Size));
        }

        if ((options & RepairPages) != 0)
        {
            for (int at = DataStart - (2 * PageBytes); at < DataStart; at += PageBytes)
                RepairPage(bytes.AsSpan(at, PageBytes), bytes.AsSpan(24, 16));
        }

        return bytes[..length];
    }

    /// <summary>Checks that a map which was refused is damaged: one byte of input holds no change and no cut.</summary>
    public static void CheckMayBeRefused(byte[] input)
        => Check.That(input.Length > 1, "a map without faults is opened");

    /// <summary>Says whether an input is about the map of a cache; otherwise it is about a layer.</summary>
    public static bool IsOfCache(byte[] input) => input.Length > 0 && (input[0] & IsCache) != 0;

    /// <summary>A map in which each state occurs, and of which both copies of the header and of the page were
    /// written.</summary>
    private static byte[] MakeSound(bool isCache, Guid bootId)
    {
        var store = new MemoryMapStore(new byte[DataStart + (isCache ? 0 : DiskLength)]);
        var map = BlockMap.Create(store, new MapHeader
        {
            Id = s_id,
            BootId = bootId,
            Flags = isCache ? MapFlags.Cache : MapFlags.None,
            DataStart = isCache ? 0 : DataStart,
            Source = isCache
                ? new SourceIdentity(Origin, DiskLength, 0, 0)
                : new SourceIdentity("/base.img", DiskLength, Version: 17, Sample: 99),
        });
        map.Set(new BlockRange(1, 1), BlockState.Written);
        map.Commit();
        map.Set(new BlockRange(2, 2), isCache ? BlockState.Fetched : BlockState.Zero);
        map.Commit();
        map.ChangeHeader(header => header with { Generation = 3 });
        return store.Bytes;
    }

    private static void RepairCopy(Span<byte> copy)
        => BinaryPrimitives.WriteUInt64LittleEndian(copy[^8..], XxHash3.HashToUInt64(copy[..^8]));

    private static void RepairPage(Span<byte> copy, ReadOnlySpan<byte> id)
    {
        Span<ulong> words = MemoryMarshal.Cast<byte, ulong>(copy);
        if (!words.ContainsAnyExcept(0UL))
            return; // it was never written
        var hash = new XxHash3(BinaryPrimitives.ReadInt64LittleEndian(id));
        hash.Append(copy[..16]);
        hash.Append(copy[24..]);
        words[2] = hash.GetCurrentHashAsUInt64();
    }

    /// <summary>An input without changes, or with one.</summary>
    public static byte[] Input(byte options, params (int Offset, byte[] Content)[] changes)
    {
        Bytes input = new Bytes().U8(options);
        foreach ((int offset, byte[] content) in changes)
            input.U16(offset).U8((byte)content.Length).Raw(content);
        return input.ToArray();
    }

    /// <summary>Inputs that reach different parts of a map.</summary>
    public static IEnumerable<(string Name, byte[] Input)> Seeds()
    {
        yield return ("sound", Input(0));
        yield return ("other-boot", Input(OtherBoot));
        yield return ("cache", Input(IsCache));
        yield return ("cut", new Bytes().U8(Cut).U16(6000).ToArray());
        yield return ("first-header-torn", Input(0, (100, [1, 2, 3])));
        yield return ("both-headers-torn", Input(0, (100, [1]), (MapHeader.Size + 100, [1])));
        yield return ("flags", Input(RepairHeader, (12, [1]), (MapHeader.Size + 12, [2])));
        yield return ("later-version", Input(RepairHeader, (8, [2]), (MapHeader.Size + 8, [2])));
        yield return ("other-length", Input(RepairHeader, (56, [0, 16, 0, 0]), (MapHeader.Size + 56, [0, 32])));
        yield return ("long-path", Input(RepairHeader, (120, [255, 255]), (MapHeader.Size + 120, [0])));
        yield return ("live-map", Input(0, (2 * MapHeader.Size, [0x1b, 0x06])));
        yield return ("beyond-the-end", Input(0, (2 * MapHeader.Size + 1, [0xff])));
        int even = DataStart - (2 * PageBytes), odd = DataStart - PageBytes;
        yield return ("page", Input(OtherBoot | RepairPages, (odd, [9]), (odd + PageHead, [0xaa])));
        yield return ("both-pages-torn", Input(OtherBoot, (odd, [9]), (even, [9])));
    }
}

/// <summary>A map in memory.</summary>
/// <param name="bytes">Its bytes; it does not grow.</param>
internal sealed class MemoryMapStore(byte[] bytes) : IMapStore
{
    public byte[] Bytes => bytes;

    public void Read(long offset, Span<byte> buffer)
    {
        if (offset > bytes.Length || buffer.Length > bytes.Length - offset)
            throw new DiskException(DiskError.Damaged, "the map is too short");
        bytes.AsSpan((int)offset, buffer.Length).CopyTo(buffer);
    }

    public void Write(long offset, ReadOnlySpan<byte> data)
    {
        Check.That(
            offset >= 0 && offset <= bytes.Length && data.Length <= bytes.Length - offset,
            "a map is written at its own place");
        data.CopyTo(bytes.AsSpan((int)offset));
    }

    public void Sync()
    {
        // All that was written is there.
    }

    public void Allocate(long offset, long length)
    {
        // All of it is there.
    }

    public (long Start, long End) FindData(long offset, long end) => (offset, end);
}
