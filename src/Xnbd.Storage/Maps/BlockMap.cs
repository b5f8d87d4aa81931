using System.Buffers.Binary;
using System.IO.Hashing;
using System.Numerics;
using System.Runtime.InteropServices;

namespace Xnbd.Storage.Maps;

/// <summary>What a local file holds of a block.</summary>
public enum BlockState
{
    /// <summary>Nothing: the block stands in the source, the disk underneath.</summary>
    Absent = 0,

    /// <summary>What the source has: a copy.</summary>
    Fetched = 1,

    /// <summary>It was made zero here; the file's bytes mean nothing.</summary>
    Zero = 2,

    /// <summary>It was written here.</summary>
    Written = 3,
}

/// <summary>
/// Which blocks a local file holds. It never claims a block that the file does not hold: whoever sets a block's state has
/// written (or discarded) the block's data before.
/// <para>
/// It stands in three places. In memory, where it is read without a lock. In the file as the <em>live</em> map, which is
/// written first at each change (but of a copy), and so survives the death of the process: it is right as long as the machine has not
/// been started anew, which the boot id tells. And in the file as the <em>durable</em> map: pages with checksums, each in
/// two slots that are written in turn, and only after the data they speak of has been synced (<see cref="Collect"/>, sync
/// the data, <see cref="WritePages"/>, <see cref="SyncPages"/>). It survives the death of the machine. Blocks change state independently of each
/// other, so any mixture of older and newer pages is a state in which the disk may be found.
/// </para>
/// <para>
/// The file is written with system calls, not through a mapping: on a full disk, a copy-on-write file system would end
/// the process with SIGBUS, where a call fails with an error for one request.
/// </para>
/// <para>
/// The live map may be behind by copies (<see cref="SetFetched"/>): a block that it calls absent, although the file has what
/// the source has, is right all the same. So many changes cost one write (<see cref="WriteBehind"/>).
/// </para>
/// Locks: <c>_writingBehind</c>, then one of <c>_locks</c> for each page, then <c>_behind</c>.
/// </summary>
internal sealed class BlockMap
{
    private const int BlocksPerWord = 32;
    private const ulong EachBlock = 0x5555_5555_5555_5555; // the lower bit of each block's two

    /// <summary>A page of the durable map: 4096 bytes, of which 32 are its head (sequence, index, checksum).</summary>
    private const int PageBytes = 4096;
    private const int PageHead = 32;
    private const int WordsPerPage = (PageBytes - PageHead) / sizeof(ulong);

    /// <summary>How many blocks one page speaks of.</summary>
    internal const int BlocksPerPage = WordsPerPage * BlocksPerWord;

    private const int LockCount = 64;

    private readonly IMapStore _store;
    private readonly ulong[] _words;
    private readonly ulong[] _sequences; // of each page's newest durable copy
    private readonly bool[] _isDirty; // pages that differ from their newest durable copy
    private readonly Lock[] _locks = new Lock[LockCount];
    private readonly bool[] _isBehind; // pages whose live map in the file lacks copies that were made since
    private readonly List<int> _behind = []; // those pages
    private readonly Lock _writingBehind = new();
    private readonly Lock _changingHeader = new();
    private readonly List<long> _torn = []; // slots, as offsets in bytes, whose copies are torn
    private Guid _bootId;
    private volatile bool _isSealed;

    private BlockMap(IMapStore store, MapHeader header)
    {
        if (!BitConverter.IsLittleEndian)
            throw new PlatformNotSupportedException("maps are read and written on little-endian machines only");
        _store = store;
        Header = header;
        int pages = (int)PagesOf(header.Source.Length);
        _words = new ulong[pages * WordsPerPage];
        _sequences = new ulong[pages];
        _isDirty = new bool[pages];
        _isBehind = new bool[pages];
        for (int i = 0; i < LockCount; i++)
            _locks[i] = new Lock();
    }

    /// <summary>What the file says about itself.</summary>
    public MapHeader Header { get; private set; }

    /// <summary>The disk's number of blocks.</summary>
    public long BlockCount => BlockRange.CountOf(Header.Source.Length);

    /// <summary>How much of a file a map takes, in bytes.</summary>
    /// <param name="diskLength">The disk's length, in bytes.</param>
    public static long FileLength(long diskLength) => DurableStart(diskLength) + (PagesOf(diskLength) * 2 * PageBytes);

    private static long PagesOf(long diskLength)
        => Math.Max(1, (BlockRange.CountOf(diskLength) + BlocksPerPage - 1) / BlocksPerPage);

    private static long LiveStart => 2 * MapHeader.Size;

    private static long DurableStart(long diskLength)
        => LiveStart + (((PagesOf(diskLength) * WordsPerPage * sizeof(ulong)) + PageBytes - 1) / PageBytes * PageBytes);

    /// <summary>Makes a map in which all blocks are absent.</summary>
    /// <param name="store">All zeroes, and long enough.</param>
    /// <param name="header">Its header.</param>
    public static BlockMap Create(IMapStore store, MapHeader header)
    {
        var map = new BlockMap(store, header);
        map.WriteHeader(header);
        return map;
    }

    /// <summary>
    /// Opens a map: by its live part, if the machine has been up since it was used, else by its durable part. Nothing is written,
    /// until <see cref="PrepareToWrite"/>.
    /// </summary>
    /// <param name="store">Where it is kept.</param>
    /// <param name="bootId">The present boot.</param>
    /// <exception cref="DiskException">It is no map, or it is damaged.</exception>
    public static BlockMap Open(IMapStore store, Guid bootId)
    {
        MapHeader header = ReadHeader(store)
            ?? throw new DiskException(DiskError.Damaged, "its header is damaged");
        var map = new BlockMap(store, header) { _bootId = bootId };
        map.Load(isLive: header.BootId == bootId);
        return map;
    }

    /// <summary>To be called once before a map that was opened is changed.</summary>
    public void PrepareToWrite()
    {
        // A torn copy must go before its slot is written again: what is missing of it might be in the next one, and
        // complete it. And a copy that is whole may still not be durable, if the process died before it was synced.
        foreach (long slot in _torn)
            _store.Write(slot, new byte[PageBytes]);
        _torn.Clear();
        if (Header.BootId != _bootId)
        {
            const int piece = BlocksPerPage; // in words, about a hundred KiB
            for (int at = 0; at < _words.Length; at += piece)
            {
                WriteLive(at, _words.AsSpan(at, Math.Min(piece, _words.Length - at)));
            }
        }

        _store.Sync();
        if (Header.BootId != _bootId)
        {
            MapFlags flags = Header.Flags | ((Header.Flags & MapFlags.Cache) != 0 ? MapFlags.MayHoldWrites : 0);
            WriteHeader(Header with { BootId = _bootId, Flags = flags }); // from here on the live map is right
        }
    }

    /// <summary>Reads a header.</summary>
    /// <returns>Null when there is none that is whole.</returns>
    /// <exception cref="DiskException">It cannot be read, or is of a later version.</exception>
    public static MapHeader? ReadHeader(IMapStore store)
    {
        Span<byte> copies = stackalloc byte[2 * MapHeader.Size];
        store.Read(0, copies);
        MapHeader? first = MapHeader.TryRead(copies[..MapHeader.Size]);
        MapHeader? second = MapHeader.TryRead(copies[MapHeader.Size..]);
        return first is null || second?.Sequence > first.Sequence ? second : first;
    }

    /// <summary>Writes a header that differs from the present one; any thread may.</summary>
    public void ChangeHeader(Func<MapHeader, MapHeader> change)
    {
        lock (_changingHeader)
            WriteHeader(change(Header));
    }

    /// <summary>Writes and syncs a new header; its sequence is set here.</summary>
    public void WriteHeader(MapHeader header)
    {
        header = header with { Sequence = Header.Sequence + 1 };
        Span<byte> copy = stackalloc byte[MapHeader.Size];
        header.Write(copy);
        _store.Write((long)(header.Sequence % 2) * MapHeader.Size, copy);
        if ((header.Flags & MapFlags.Disposable) == 0)
            _store.Sync();
        Header = header;
    }

    /// <summary>A block's state.</summary>
    public BlockState this[long block]
        => (BlockState)((Volatile.Read(ref _words[block / BlocksPerWord]) >> (int)(block % BlocksPerWord * 2)) & 3);

    /// <summary>Whether all blocks of a range are in one state.</summary>
    public bool IsAll(BlockRange range, BlockState state) => Run(range, out BlockState actual) == range && actual == state;

    /// <summary>The blocks at the start of a range, as many as have one state.</summary>
    /// <param name="range">At least one block.</param>
    /// <param name="state">Their state.</param>
    public BlockRange Run(BlockRange range, out BlockState state)
    {
        state = this[range.First];
        if (range.Count == 1)
            return range;
        ulong pattern = (ulong)state * EachBlock;
        long block = range.First;
        while (block < range.End)
        {
            int at = (int)(block % BlocksPerWord);
            ulong differing = (Volatile.Read(ref _words[block / BlocksPerWord]) ^ pattern) >> (at * 2);
            long same = Math.Min(BitOperations.TrailingZeroCount(differing) / 2, BlocksPerWord - at);
            block += same;
            if (same < BlocksPerWord - at)
                break;
        }

        // The first block had this state when it was looked at, whatever has become of it since.
        return range with { Count = Math.Max(1, Math.Min(block, range.End) - range.First) };
    }

    /// <summary>All blocks, in order, as runs of one state.</summary>
    public IEnumerable<(BlockRange Run, BlockState State)> Runs()
    {
        for (var left = new BlockRange(0, BlockCount); left.Count > 0;)
        {
            BlockRange run = Run(left, out BlockState state);
            yield return (run, state);
            left = left.After(run);
        }
    }

    /// <summary>Changes the state of blocks. What the new state promises of the file has been done.</summary>
    /// <exception cref="DiskException">The live map cannot be written: no block has changed, or those of some
    /// pages.</exception>
    public void Set(BlockRange range, BlockState state) => _ = TrySet(range, state, isWritten: true);

    /// <summary>Marks blocks as zero, unless the map is sealed. What that promises of the file has been done.</summary>
    /// <returns>False when the map is sealed: none of the blocks is marked, or those of some pages.</returns>
    /// <exception cref="DiskException">The live map cannot be written: no block has changed, or those of some
    /// pages.</exception>
    public bool TrySetZero(BlockRange range) => TrySet(range, BlockState.Zero, isWritten: true);

    /// <summary>From now on no block becomes zero: whoever makes one zero does so in the file.</summary>
    public void Seal()
    {
        _isSealed = true;
        foreach (Lock page in _locks)
        {
            lock (page)
            {
                // Those that have not seen the seal are done.
            }
        }
    }

    /// <summary>No block becomes zero.</summary>
    public bool IsSealed => _isSealed;

    /// <summary>Blocks may become zero again.</summary>
    public void Unseal() => _isSealed = false;

    /// <summary>
    /// Notes that the file has what the source has of absent blocks. Only <see cref="WriteBehind"/> makes that survive the
    /// process: until then, an earlier death makes them absent again.
    /// </summary>
    public void SetFetched(BlockRange range) => _ = TrySet(range, BlockState.Fetched, isWritten: false);

    private bool TrySet(BlockRange range, BlockState state, bool isWritten)
    {
        Span<ulong> scratch = stackalloc ulong[WordsPerPage];
        while (range.Count > 0)
        {
            long page = range.First / BlocksPerPage;
            long count = Math.Min(range.Count, ((page + 1) * BlocksPerPage) - range.First);
            lock (_locks[page % LockCount])
            {
                if (state == BlockState.Zero && _isSealed)
                    return false;
                SetInPage(page, range with { Count = count }, state, scratch, isWritten);
            }

            range = new BlockRange(range.First + count, range.Count - count);
        }

        return true;
    }

    /// <summary>Writes to the live map what <see cref="SetFetched"/> has left; any thread may.</summary>
    /// <exception cref="DiskException">It cannot be written; it stays to be done.</exception>
    public void WriteBehind()
    {
        lock (_writingBehind) // who finds nothing left to write must not be ahead of who is writing it
            WriteAllBehind();
    }

    private void WriteAllBehind()
    {
        int[] pages;
        lock (_behind)
        {
            pages = [.. _behind];
            _behind.Clear();
        }

        for (int i = 0; i < pages.Length; i++)
        {
            int page = pages[i], first = page * WordsPerPage;
            try
            {
                lock (_locks[page % LockCount])
                {
                    _isBehind[page] = false;
                    WriteLive(first, _words.AsSpan(first, WordsPerPage));
                }
            }
            catch
            {
                foreach (int left in pages.AsSpan(i))
                {
                    lock (_locks[left % LockCount])
                        NoteBehind(left);
                }

                throw;
            }
        }
    }

    private void NoteBehind(int page)
    {
        _isBehind[page] = true;
        lock (_behind)
            _behind.Add(page);
    }

    private void WriteLive(int firstWord, ReadOnlySpan<ulong> words)
        => _store.Write(LiveStart + ((long)firstWord * sizeof(ulong)), MemoryMarshal.AsBytes(words));

    /// <summary>How many blocks are in a state.</summary>
    public long Count(BlockState state) => CountAll()[(int)state];

    /// <summary>How many blocks are in each state, by its number; of a map that changes meanwhile, about so many.</summary>
    public long[] CountAll()
    {
        long fetched = 0, zero = 0, written = 0;
        for (int i = 0; i < _words.Length; i++)
        {
            ulong word = Volatile.Read(ref _words[i]);
            if (word == 0)
                continue;
            ulong low = word & EachBlock, high = (word >> 1) & EachBlock;
            fetched += BitOperations.PopCount(low & ~high);
            zero += BitOperations.PopCount(high & ~low);
            written += BitOperations.PopCount(high & low);
        }

        return [BlockCount - fetched - zero - written, fetched, zero, written];
    }

    /// <summary>The durable map says the same as the live one.</summary>
    public bool IsCommitted => !_isDirty.AsSpan().Contains(true);

    /// <summary>Takes the pages that have changed since they were last committed, as they stand now.</summary>
    /// <remarks>Of several threads that commit, one at a time goes from here to <see cref="SyncPages"/>.</remarks>
    public List<(int Page, ulong[] Words)> Collect()
    {
        var pages = new List<(int, ulong[])>();
        for (int page = 0; page < _isDirty.Length; page++)
        {
            if (!Volatile.Read(ref _isDirty[page]))
                continue;
            lock (_locks[page % LockCount])
            {
                _isDirty[page] = false;
                pages.Add((page, _words.AsSpan(page * WordsPerPage, WordsPerPage).ToArray()));
            }
        }

        return pages;
    }

    /// <summary>Writes collected pages to their next slots. The data that they speak of is durable already.</summary>
    /// <exception cref="DiskException">They could not be written, and stay to be committed.</exception>
    public void WritePages(List<(int Page, ulong[] Words)> pages)
    {
        try
        {
            Span<byte> copy = stackalloc byte[PageBytes];
            foreach ((int page, ulong[] words) in pages)
            {
                ulong sequence = _sequences[page] + 1;
                WritePage(copy, page, sequence, words);
                _store.Write(SlotOffset(page, sequence), copy);
            }
        }
        catch
        {
            PutBack(pages);
            throw;
        }
    }

    /// <summary>Makes pages durable that were written.</summary>
    /// <exception cref="DiskException">Nothing is known of them from now on.</exception>
    public void SyncPages(List<(int Page, ulong[] Words)> pages)
    {
        if (pages.Count == 0)
            return;
        _store.Sync();
        foreach ((int page, _) in pages)
            _sequences[page]++;
    }

    /// <summary>Makes durable what the map says now.</summary>
    public void Commit()
    {
        List<(int Page, ulong[] Words)> pages = Collect();
        WritePages(pages);
        SyncPages(pages);
    }

    /// <summary>Marks collected pages as still to be committed.</summary>
    private void PutBack(List<(int Page, ulong[] Words)> pages)
    {
        foreach ((int page, _) in pages)
            Volatile.Write(ref _isDirty[page], true);
    }

    private void SetInPage(long page, BlockRange range, BlockState state, Span<ulong> scratch, bool isWritten)
    {
        int first = (int)(range.First / BlocksPerWord), last = (int)((range.End - 1) / BlocksPerWord);
        Span<ulong> present = _words.AsSpan(first, last - first + 1);
        Span<ulong> changed = scratch[..present.Length];
        changed.Fill((ulong)state * EachBlock);
        int head = (int)(range.First % BlocksPerWord), tail = (int)(range.End % BlocksPerWord);
        ulong keptBefore = (1UL << (head * 2)) - 1;
        ulong keptBehind = tail == 0 ? 0 : ulong.MaxValue << (tail * 2);
        if (present.Length == 1)
            (keptBefore, keptBehind) = (keptBefore | keptBehind, keptBefore | keptBehind);
        changed[0] = (changed[0] & ~keptBefore) | (present[0] & keptBefore);
        if (present.Length > 1)
            changed[^1] = (changed[^1] & ~keptBehind) | (present[^1] & keptBehind);
        if (changed.SequenceEqual(present))
            return;

        // The file first: who sees the new state may acknowledge what relies on it.
        if (isWritten)
            WriteLive(first, changed);
        else if (!_isBehind[page])
            NoteBehind((int)page);
        Volatile.Write(ref _isDirty[page], true); // before the state is seen: whoever sees it can commit it
        for (int i = 0; i < changed.Length; i++)
            Volatile.Write(ref present[i], changed[i]);
    }

    private void Load(bool isLive)
    {
        byte[] slots = new byte[2 * PageBytes];
        ulong[] live = new ulong[WordsPerPage];
        for (int page = 0; page < _sequences.Length; page++)
        {
            _store.Read(SlotOffset(page, 0), slots);
            ulong[] durable = ReadNewer(page, slots, out _sequences[page]);
            ulong[] words = durable;
            if (isLive)
            {
                words = live;
                _store.Read(LiveStart + ((long)page * WordsPerPage * sizeof(ulong)), MemoryMarshal.AsBytes(live.AsSpan()));
                _isDirty[page] = !live.AsSpan().SequenceEqual(durable);
            }

            if (words.AsSpan().ContainsAnyExcept(0UL)) // untouched memory takes no space
                words.CopyTo(_words, page * WordsPerPage);
        }

        for (long block = BlockCount; block < (long)_words.Length * BlocksPerWord; block++)
        {
            if (this[block] != BlockState.Absent)
                throw new DiskException(DiskError.Damaged, "its map is damaged: it speaks of blocks beyond the end of the disk");
        }
    }

    private ulong[] ReadNewer(int page, byte[] slots, out ulong sequence)
    {
        ReadOnlySpan<byte> even = slots.AsSpan(0, PageBytes), odd = slots.AsSpan(PageBytes);
        ulong? evenSequence = SequenceOf(page, even), oddSequence = SequenceOf(page, odd);
        if (evenSequence is null || oddSequence is null)
            _torn.Add(SlotOffset(page, evenSequence is null ? 0UL : 1));
        bool isEven = oddSequence is null || evenSequence > oddSequence;
        sequence = (isEven ? evenSequence : oddSequence)
            ?? throw new DiskException(DiskError.Damaged, $"its map is damaged: both copies of page {page} have wrong checksums");
        return MemoryMarshal.Cast<byte, ulong>(isEven ? even : odd)[(PageHead / sizeof(ulong))..].ToArray();
    }

    /// <returns>Null when the copy is torn. One that was never written is all zeroes, and the oldest.</returns>
    private ulong? SequenceOf(int page, ReadOnlySpan<byte> copy)
    {
        ReadOnlySpan<ulong> words = MemoryMarshal.Cast<byte, ulong>(copy);
        if (!words.ContainsAnyExcept(0UL))
            return 0;
        return words[1] == (ulong)page && words[2] == Checksum(words) ? words[0] : null;
    }

    private void WritePage(Span<byte> copy, int page, ulong sequence, ulong[] content)
    {
        copy.Clear();
        Span<ulong> words = MemoryMarshal.Cast<byte, ulong>(copy);
        words[0] = sequence;
        words[1] = (ulong)page;
        content.CopyTo(words[(PageHead / sizeof(ulong))..]);
        words[2] = Checksum(words);
    }

    /// <summary>Of all but the checksum itself; seeded, so that another map's page is not taken for one of this map.</summary>
    private ulong Checksum(ReadOnlySpan<ulong> words)
    {
        var hash = new XxHash3(BinaryPrimitives.ReadInt64LittleEndian(Header.Id.ToByteArray()));
        hash.Append(MemoryMarshal.AsBytes(words[..2]));
        hash.Append(MemoryMarshal.AsBytes(words[3..]));
        return hash.GetCurrentHashAsUInt64();
    }

    private long SlotOffset(int page, ulong sequence)
        => DurableStart(Header.Source.Length) + ((((long)page * 2) + (long)(sequence % 2)) * PageBytes);
}
