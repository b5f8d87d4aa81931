namespace Xnbd.Storage.Maps;

/// <summary>
/// Where the parts of a map stand in its file (docs/formats.md): two copies of the header, the live map, and two slots
/// for each page of the durable map. All offsets and lengths are bytes.
/// </summary>
internal static class MapLayout
{
    /// <summary>
    /// How many blocks one 64-bit word of a map describes: two bits each, the first block in the lowest.
    /// </summary>
    public const int BlocksPerWord = 32;

    /// <summary>Length of a slot, which holds one copy of a page.</summary>
    public const int PageBytes = 4096;

    /// <summary>Length of the words of a page that precede its part of the map.</summary>
    public const int PageHeadBytes = 32;

    /// <summary>How many words of the map one page holds.</summary>
    public const int WordsPerPage = (PageBytes - PageHeadBytes) / sizeof(ulong);

    /// <summary>How many blocks one page describes.</summary>
    public const int BlocksPerPage = WordsPerPage * BlocksPerWord;

    /// <summary>Length of both copies of the header, with which the file begins.</summary>
    public const int HeadersLength = 2 * MapHeader.Size;

    /// <summary>How many pages the map of a disk has, at least 1.</summary>
    public static long PageCount(long diskLength)
        => Math.Max(1, (BlockRange.CountOf(diskLength) + BlocksPerPage - 1) / BlocksPerPage);

    /// <summary>How much of its file a map takes.</summary>
    public static long FileLength(long diskLength)
        => DurableStart(diskLength) + (PageCount(diskLength) * 2 * PageBytes);

    /// <summary>Where the copy of the header with this sequence number stands.</summary>
    public static long HeaderOffset(ulong sequence) => (long)(sequence % 2) * MapHeader.Size;

    /// <summary>Where a word of the live map stands.</summary>
    public static long LiveOffset(long wordIndex) => HeadersLength + (wordIndex * sizeof(ulong));

    /// <summary>Where the copy of a page with this sequence number stands.</summary>
    public static long SlotOffset(long diskLength, int page, ulong sequence)
        => DurableStart(diskLength) + ((((long)page * 2) + (long)(sequence % 2)) * PageBytes);

    private static long DurableStart(long diskLength)
    {
        long liveBytes = PageCount(diskLength) * WordsPerPage * sizeof(ulong);
        return HeadersLength + ((liveBytes + PageBytes - 1) / PageBytes * PageBytes);
    }
}
