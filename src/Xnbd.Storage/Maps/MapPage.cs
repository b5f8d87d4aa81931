using System.Buffers.Binary;
using System.IO.Hashing;
using System.Runtime.InteropServices;

namespace Xnbd.Storage.Maps;

/// <summary>
/// The format of one page of the durable map (docs/formats.md): four words of head, then a part of the map. Pure: bytes
/// in, values out.
/// </summary>
internal static class MapPage
{
    // Indices of words.
    private const int SequenceAt = 0;
    private const int PageAt = 1;
    private const int ChecksumAt = 2;
    private const int ContentAt = MapLayout.PageHeadBytes / sizeof(ulong);

    /// <summary>The sequence number of a copy.</summary>
    /// <param name="slot">The copy.</param>
    /// <param name="page">The index of the page that it should be.</param>
    /// <param name="parity">The number of its slot, 0 or 1.</param>
    /// <param name="mapId">The id of its map.</param>
    /// <returns>
    /// Null when the copy is torn, or has a number that no copy in this slot is written with. A copy that was never
    /// written is all zeroes, and the oldest.
    /// </returns>
    public static ulong? SequenceOf(ReadOnlySpan<byte> slot, int page, ulong parity, Guid mapId)
    {
        ReadOnlySpan<ulong> words = MemoryMarshal.Cast<byte, ulong>(slot);
        if (!words.ContainsAnyExcept(0UL))
            return 0;
        ulong sequence = words[SequenceAt];
        bool mayBeHere = sequence is not (0 or ulong.MaxValue) && sequence % 2 == parity;
        bool isWhole = words[PageAt] == (ulong)page && words[ChecksumAt] == Checksum(words, mapId);
        return mayBeHere && isWhole ? sequence : null;
    }

    /// <summary>The part of the map that a copy holds.</summary>
    public static ReadOnlySpan<ulong> ContentOf(ReadOnlySpan<byte> slot)
        => MemoryMarshal.Cast<byte, ulong>(slot)[ContentAt..];

    /// <summary>Writes a copy.</summary>
    public static void Write(Span<byte> slot, int page, ulong sequence, ReadOnlySpan<ulong> content, Guid mapId)
    {
        slot.Clear();
        Span<ulong> words = MemoryMarshal.Cast<byte, ulong>(slot);
        words[SequenceAt] = sequence;
        words[PageAt] = (ulong)page;
        content.CopyTo(words[ContentAt..]);
        words[ChecksumAt] = Checksum(words, mapId);
    }

    /// <summary>
    /// The checksum of all words but itself. The id is its seed, so that another map's page is not taken for one of
    /// this map.
    /// </summary>
    private static ulong Checksum(ReadOnlySpan<ulong> words, Guid mapId)
    {
        Span<byte> id = stackalloc byte[16];
        mapId.TryWriteBytes(id);
        Span<ulong> others = stackalloc ulong[(MapLayout.PageBytes / sizeof(ulong)) - 1];
        words[..ChecksumAt].CopyTo(others);
        words[(ChecksumAt + 1)..].CopyTo(others[ChecksumAt..]);
        return XxHash3.HashToUInt64(MemoryMarshal.AsBytes(others), BinaryPrimitives.ReadInt64LittleEndian(id));
    }
}
