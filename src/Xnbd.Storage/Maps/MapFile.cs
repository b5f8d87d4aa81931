using System.Runtime.InteropServices;

namespace Xnbd.Storage.Maps;

/// <summary>
/// A map as it stands in its file: the header, the live map, and the pages of the durable map. This type knows where
/// each of them stands and which copy counts; <see cref="BlockMap"/> knows what their words mean.
/// <para>
/// Invariants: a copy of the header or of a page is written over the older one of two, so that a torn write leaves the
/// newer one. A torn copy of a page is wiped before its slot is written again.
/// </para>
/// <para>
/// Threads: any thread may change the header, and any may write to the live map. One thread at a time writes and syncs
/// durable pages (a commit). The lock <c>_headerLock</c> is held while the header is written and synced. That is
/// harmless: of requests, only a flush whose sync has failed changes a header, and whoever holds the lock takes no
/// other one.
/// </para>
/// </summary>
internal sealed class MapFile
{
    private readonly IMapStore _store;
    private readonly ulong[] _sequences; // the sequence number of each page's newest durable copy
    private readonly List<long> _tornSlots = []; // offsets of slots whose copies are torn
    private readonly Lock _headerLock = new();
    private volatile MapHeader _header;

    private MapFile(IMapStore store, MapHeader header)
    {
        if (!BitConverter.IsLittleEndian)
            throw new PlatformNotSupportedException("maps are read and written on little-endian machines only");
        _store = store;
        _header = header;
        _sequences = new ulong[MapLayout.PageCount(header.Source.Length)];
    }

    /// <summary>The header as it was last written or read.</summary>
    public MapHeader Header => _header;

    /// <summary>How many pages the map has.</summary>
    public int PageCount => _sequences.Length;

    /// <summary>Makes the file of a map in which all blocks are absent.</summary>
    /// <param name="store">All zeroes, and long enough.</param>
    /// <param name="header">The map's header.</param>
    public static MapFile Create(IMapStore store, MapHeader header)
    {
        var file = new MapFile(store, header);
        file.Allocate(0, MapLayout.HeadersLength);
        file.ChangeHeader(_ => header);
        return file;
    }

    /// <summary>Opens a file. Nothing is written.</summary>
    /// <exception cref="DiskException">
    /// The header is damaged or cannot be read, or its version is a later one.
    /// </exception>
    public static MapFile Open(IMapStore store)
        => new(store, ReadHeader(store) ?? throw new DiskException(DiskError.Damaged, "its header is damaged"));

    /// <summary>Reads the header.</summary>
    /// <returns>The newer one of two whole copies; null when no copy is whole.</returns>
    /// <exception cref="DiskException">The header cannot be read, or its version is a later one.</exception>
    public static MapHeader? ReadHeader(IMapStore store)
    {
        Span<byte> copies = stackalloc byte[2 * MapHeader.Size];
        store.Read(0, copies);
        MapHeader? first = MapHeader.TryRead(copies[..MapHeader.Size]);
        MapHeader? second = MapHeader.TryRead(copies[MapHeader.Size..]);
        return first is null || second?.Sequence > first.Sequence ? second : first;
    }

    /// <summary>Writes and syncs a header that is made from the present one. Its sequence number is set here.</summary>
    /// <exception cref="DiskException">It could not be written or synced.</exception>
    public void ChangeHeader(Func<MapHeader, MapHeader> change)
    {
        lock (_headerLock)
        {
            MapHeader header = change(_header) with { Sequence = _header.Sequence + 1 };
            Span<byte> copy = stackalloc byte[MapHeader.Size];
            header.Write(copy);
            _store.Write(MapLayout.HeaderOffset(header.Sequence), copy);
            if ((header.Flags & MapFlags.Disposable) == 0)
                _store.Sync();
            _header = header;
        }
    }

    /// <summary>
    /// Finds the pages that were ever used, in order, and perhaps others: of all others both maps are zeroes. The last
    /// page is always among them, since reading it shows whether the file is long enough.
    /// </summary>
    /// <returns>Of each page also which of the two maps may be other than zeroes there.</returns>
    public IEnumerable<(int Page, bool HasLive, bool HasDurable)> UsedPages()
    {
        bool[] hasLive = FindData(MapLayout.LiveOffset(0), MapLayout.WordsPerPage * sizeof(ulong));
        bool[] hasDurable = FindData(SlotOffset(0, 0), 2 * MapLayout.PageBytes);
        hasDurable[^1] = true;
        for (int page = 0; page < PageCount; page++)
        {
            if (hasLive[page] || hasDurable[page])
                yield return (page, hasLive[page], hasDurable[page]);
        }
    }

    /// <summary>
    /// Gives a page its space in the file, for the live map and for both durable copies. A disposable layer has no
    /// durable copies.
    /// </summary>
    /// <exception cref="DiskException">There is no space.</exception>
    public void AllocatePage(int page)
    {
        const int liveBytes = MapLayout.WordsPerPage * sizeof(ulong);
        Allocate(MapLayout.LiveOffset((long)page * MapLayout.WordsPerPage), liveBytes);
        Allocate(SlotOffset(page, 0), 2 * MapLayout.PageBytes);
    }

    /// <summary>Reads a page's words of the live map.</summary>
    public void ReadLive(int page, Span<ulong> words)
        => _store.Read(MapLayout.LiveOffset((long)page * MapLayout.WordsPerPage), MemoryMarshal.AsBytes(words));

    /// <summary>Writes words of the live map.</summary>
    /// <param name="page">The page.</param>
    /// <param name="first">Index of the first word in the page.</param>
    /// <param name="words">The words.</param>
    public void WriteLive(int page, int first, ReadOnlySpan<ulong> words)
        => _store.Write(
            MapLayout.LiveOffset(((long)page * MapLayout.WordsPerPage) + first), MemoryMarshal.AsBytes(words));

    /// <summary>Reads a page of the durable map: the newer one of its whole copies.</summary>
    /// <exception cref="DiskException">Both copies are torn, or the page cannot be read.</exception>
    public void ReadDurable(int page, Span<ulong> words)
    {
        Span<byte> slots = stackalloc byte[2 * MapLayout.PageBytes];
        _store.Read(SlotOffset(page, 0), slots);
        ReadOnlySpan<byte> even = slots[..MapLayout.PageBytes], odd = slots[MapLayout.PageBytes..];
        ulong? evenSequence = MapPage.SequenceOf(even, page, 0, _header.Id);
        ulong? oddSequence = MapPage.SequenceOf(odd, page, 1, _header.Id);
        if (evenSequence is null || oddSequence is null)
            _tornSlots.Add(SlotOffset(page, evenSequence is null ? 0UL : 1));
        bool isEven = oddSequence is null || evenSequence > oddSequence;
        _sequences[page] = (isEven ? evenSequence : oddSequence) ?? throw new DiskException(
            DiskError.Damaged, $"its map is damaged: both copies of page {page} have wrong checksums");
        MapPage.ContentOf(isEven ? even : odd).CopyTo(words);
    }

    /// <summary>
    /// Overwrites torn copies of pages with zeroes. This comes before their slots are written again: the sectors that a
    /// torn copy lacks might be in the next copy, and complete the torn one.
    /// </summary>
    public void WipeTornCopies()
    {
        foreach (long slot in _tornSlots)
            _store.Write(slot, new byte[MapLayout.PageBytes]);
        _tornSlots.Clear();
    }

    /// <summary>
    /// Writes pages of the durable map to their next slots. The data that they describe is durable already.
    /// </summary>
    /// <exception cref="DiskException">They could not be written.</exception>
    public void WriteDurable(List<(int Page, ulong[] Words)> pages)
    {
        Span<byte> copy = stackalloc byte[MapLayout.PageBytes];
        foreach ((int page, ulong[] words) in pages)
        {
            ulong sequence = _sequences[page] + 1;
            MapPage.Write(copy, page, sequence, words, _header.Id);
            _store.Write(SlotOffset(page, sequence), copy);
        }
    }

    /// <summary>Makes durable the pages that <see cref="WriteDurable"/> wrote.</summary>
    /// <exception cref="DiskException">From now on nothing is known of them.</exception>
    public void SyncDurable(List<(int Page, ulong[] Words)> pages)
    {
        _store.Sync();
        foreach ((int page, _) in pages)
            _sequences[page]++;
    }

    /// <summary>Makes durable all that was written.</summary>
    public void Sync() => _store.Sync();

    /// <summary>Finds the pages of which a part of the file may hold something.</summary>
    /// <param name="start">Where the part begins.</param>
    /// <param name="pageBytes">What a page has there.</param>
    private bool[] FindData(long start, int pageBytes)
    {
        bool[] hasData = new bool[PageCount];
        for (long end = start + ((long)PageCount * pageBytes), at = start; at < end;)
        {
            (long dataStart, long dataEnd) = _store.FindData(at, end);
            if (dataStart >= end)
                break;
            int first = (int)((dataStart - start) / pageBytes), last = (int)((dataEnd - 1 - start) / pageBytes);
            hasData.AsSpan(first..(last + 1)).Fill(true);
            at = dataEnd;
        }

        return hasData;
    }

    private void Allocate(long offset, long length)
    {
        if ((_header.Flags & MapFlags.Disposable) == 0)
            _store.Allocate(offset, length);
    }

    private long SlotOffset(int page, ulong sequence) => MapLayout.SlotOffset(_header.Source.Length, page, sequence);
}
