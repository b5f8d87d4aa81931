namespace Xnbd.Storage.Maps;

/// <summary>What a local file holds of a block.</summary>
public enum BlockState
{
    /// <summary>Nothing: the block is read from the source, the disk underneath.</summary>
    Absent = 0,

    /// <summary>A copy of what the source has.</summary>
    Fetched = 1,

    /// <summary>The block was made zero here; the file's bytes mean nothing.</summary>
    Zero = 2,

    /// <summary>The block was written here.</summary>
    Written = 3,
}

/// <summary>
/// Which blocks a local file holds. The map never claims a block that the file does not hold: whoever sets a block's
/// state has written (or discarded) the block's data before.
/// <para>
/// The map exists three times. In memory (<see cref="BlockStates"/>), where it is read without a lock. In the file as
/// the <em>live</em> map, which is written before each change in memory (except for copies), and so survives the death
/// of the process. The live map is right until the machine is started anew; the boot id tells. And in the file as the
/// <em>durable</em> map, which survives the death of the machine: pages with checksums, written after the data that
/// they describe was synced (<see cref="Collect"/>, sync the data, <see cref="WritePages"/>, <see cref="SyncPages"/>).
/// Blocks change state independently of each other, so the disk may be found in any mixture of older and newer pages.
/// </para>
/// <para>
/// The live map may lack copies that were made a moment ago (<see cref="SetFetched"/>): a block that it calls absent,
/// although the file has what the source has, is right all the same. So many changes cost one write
/// (<see cref="WriteBehind"/>).
/// </para>
/// <para>
/// A page gets its space in the file before its first change since the map was opened
/// (<see cref="MapFile.AllocatePage"/>). If the disk is full, that change fails; a flush of changes that were made
/// finds room. Pages that were never used are holes, which <see cref="Open"/> does not read.
/// </para>
/// <para>
/// Locks, in their order: <c>_writingBehind</c>; one of <c>_pageLocks</c>, for each change of a page; <c>_behind</c>.
/// The header has a lock of its own (<see cref="MapFile"/>), which is taken with none of these held, and is the last of
/// all.
/// </para>
/// </summary>
internal sealed class BlockMap
{
    private const int BlocksPerWord = MapLayout.BlocksPerWord;
    private const int WordsPerPage = MapLayout.WordsPerPage;
    private const int BlocksPerPage = MapLayout.BlocksPerPage;
    private const int LockCount = 64;

    private readonly MapFile _file;
    private readonly BlockStates _states;
    private readonly bool[] _hasSpace; // pages that have changed since the map was opened
    private readonly bool[] _isDirty; // pages that differ from their newest durable copy
    private readonly Lock[] _pageLocks = new Lock[LockCount];
    private readonly bool[] _isBehind; // pages whose live map in the file lacks copies that were made since
    private readonly List<int> _behind = []; // those pages
    private readonly Lock _writingBehind = new();
    private Guid _bootId;
    private volatile bool _isSealed;

    private BlockMap(MapFile file)
    {
        _file = file;
        _states = new BlockStates(BlockCount, file.PageCount);
        _hasSpace = new bool[file.PageCount];
        _isDirty = new bool[file.PageCount];
        _isBehind = new bool[file.PageCount];
        for (int i = 0; i < LockCount; i++)
            _pageLocks[i] = new Lock();
    }

    /// <summary>What the file says about itself.</summary>
    public MapHeader Header => _file.Header;

    /// <summary>The disk's number of blocks.</summary>
    public long BlockCount => BlockRange.CountOf(Header.Source.Length);

    /// <summary>Makes a map in which all blocks are absent.</summary>
    /// <param name="store">All zeroes, and long enough.</param>
    /// <param name="header">The map's header.</param>
    public static BlockMap Create(IMapStore store, MapHeader header) => new(MapFile.Create(store, header));

    /// <summary>
    /// Opens a map: its live part if the machine has not been started anew since, else its durable part. Nothing is
    /// written until <see cref="PrepareToWrite"/>.
    /// </summary>
    /// <param name="store">Where the map is kept.</param>
    /// <param name="bootId">The id of the machine's present run.</param>
    /// <exception cref="DiskException">There is no map, or it is damaged.</exception>
    public static BlockMap Open(IMapStore store, Guid bootId)
    {
        var map = new BlockMap(MapFile.Open(store)) { _bootId = bootId };
        map.Load(isLive: map.Header.BootId == bootId);
        return map;
    }

    /// <summary>Must be called once before a map that was opened is changed.</summary>
    public void PrepareToWrite()
    {
        _file.WipeTornCopies();
        if (Header.BootId != _bootId)
        {
            foreach ((int page, bool hasLive, _) in _file.UsedPages())
            {
                if (hasLive || !_states.IsUnused(page)) // of all others the live map is zeroes already
                    _file.WriteLive(page, 0, _states.Words(page));
            }
        }

        // Also if nothing was written here: a copy that is whole may not be durable, if the process died before its
        // sync.
        _file.Sync();
        if (Header.BootId != _bootId)
        {
            ChangeHeader(header => header with // from here on the live map is right
            {
                BootId = _bootId,
                Flags = header.Flags | ((header.Flags & MapFlags.Cache) != 0 ? MapFlags.MayHoldWrites : 0),
            });
        }
    }

    /// <summary>Writes and syncs a header that is made from the present one. Any thread may call this.</summary>
    /// <exception cref="DiskException">It could not be written or synced.</exception>
    public void ChangeHeader(Func<MapHeader, MapHeader> change) => _file.ChangeHeader(change);

    /// <summary>A block's state.</summary>
    public BlockState this[long block] => _states[block];

    /// <summary>Whether all blocks of a range are in one state.</summary>
    public bool IsAll(BlockRange range, BlockState state)
        => Run(range, out BlockState actual) == range && actual == state;

    /// <summary>The blocks at the start of a range that are all in one state.</summary>
    /// <param name="range">At least one block.</param>
    /// <param name="state">Their state.</param>
    public BlockRange Run(BlockRange range, out BlockState state) => _states.Run(range, out state);

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

    /// <summary>How many blocks are in a state.</summary>
    public long Count(BlockState state) => CountAll()[(int)state];

    /// <summary>
    /// How many blocks are in each state, by the state's number. If the map changes meanwhile, the numbers are
    /// approximate. It costs some nanoseconds for each 64 MiB of the disk.
    /// </summary>
    public long[] CountAll()
    {
        BlockCounts counts = CountIn(new BlockRange(0, BlockCount));
        return [counts.Absent, counts.Fetched, counts.Zero, counts.Written];
    }

    /// <summary>
    /// How many blocks of a range are in each state. If the map changes meanwhile, the numbers are approximate. Words
    /// are read at the two ends of the range alone, at most a page at each.
    /// </summary>
    public BlockCounts CountIn(BlockRange range) => _states.CountIn(range);

    /// <summary>Changes the state of blocks. The file already holds what the new state promises.</summary>
    /// <exception cref="DiskException">The live map cannot be written: no block has changed, or only the blocks of some
    /// pages.</exception>
    public void Set(BlockRange range, BlockState state) => _ = TrySet(range, state, isWritten: true);

    /// <summary>Marks blocks as zero, unless the map is sealed. The file already holds what that promises.</summary>
    /// <returns>False when the map is sealed: no block is marked, or only the blocks of some pages.</returns>
    /// <exception cref="DiskException">The live map cannot be written: no block has changed, or only the blocks of some
    /// pages.</exception>
    public bool TrySetZero(BlockRange range) => TrySet(range, BlockState.Zero, isWritten: true);

    /// <summary>
    /// Notes that the file has what the source has of absent blocks. The note survives the process only after
    /// <see cref="WriteBehind"/>: if the process dies before, the blocks are absent again.
    /// </summary>
    public void SetFetched(BlockRange range) => _ = TrySet(range, BlockState.Fetched, isWritten: false);

    /// <summary>
    /// From now on no block becomes zero in the map alone: whoever zeroes a block writes zeroes to the file.
    /// </summary>
    public void Seal()
    {
        _isSealed = true;
        foreach (Lock page in _pageLocks)
        {
            lock (page)
            {
                // Whoever changed a page without having seen the seal has finished.
            }
        }
    }

    /// <summary>No block becomes zero in the map alone.</summary>
    public bool IsSealed => _isSealed;

    /// <summary>Blocks may become zero in the map alone again.</summary>
    public void Unseal() => _isSealed = false;

    /// <summary>Writes to the live map what <see cref="SetFetched"/> has left. Any thread may call this.</summary>
    /// <exception cref="DiskException">It cannot be written; it remains to be written.</exception>
    public void WriteBehind()
    {
        // A thread that finds nothing left to write must not return before another one has written it.
        lock (_writingBehind)
            WriteAllBehind();
    }

    /// <summary>The durable map says the same as the live one.</summary>
    public bool IsCommitted => !_isDirty.AsSpan().Contains(true);

    /// <summary>Takes copies of the pages that have changed since they were last committed.</summary>
    /// <remarks>One thread at a time goes from here to <see cref="SyncPages"/>.</remarks>
    public List<(int Page, ulong[] Words)> Collect()
    {
        var pages = new List<(int, ulong[])>();
        for (int page = 0; (page = NextDirty(page)) >= 0; page++)
        {
            lock (_pageLocks[page % LockCount])
            {
                _isDirty[page] = false;
                pages.Add((page, _states.Words(page).ToArray()));
            }
        }

        return pages;
    }

    /// <summary>Writes collected pages to their next slots. The data that they describe is durable already.</summary>
    /// <exception cref="DiskException">They could not be written, and remain to be committed.</exception>
    public void WritePages(List<(int Page, ulong[] Words)> pages)
    {
        try
        {
            _file.WriteDurable(pages);
        }
        catch
        {
            foreach ((int page, _) in pages)
                Volatile.Write(ref _isDirty[page], true);
            throw;
        }
    }

    /// <summary>Makes durable the pages that were written.</summary>
    /// <exception cref="DiskException">From now on nothing is known of them.</exception>
    public void SyncPages(List<(int Page, ulong[] Words)> pages)
    {
        if (pages.Count > 0)
            _file.SyncDurable(pages);
    }

    /// <summary>Makes durable what the map says now. The data that it describes is durable already.</summary>
    public void Commit()
    {
        List<(int Page, ulong[] Words)> pages = Collect();
        WritePages(pages);
        SyncPages(pages);
    }

    /// <returns>The next page, from one on, that has changed since it was committed; negative for none.</returns>
    private int NextDirty(int page)
    {
        int ahead = _isDirty.AsSpan(page).IndexOf(true);
        return ahead < 0 ? ahead : page + ahead;
    }

    private bool TrySet(BlockRange range, BlockState state, bool isWritten)
    {
        Span<ulong> scratch = stackalloc ulong[WordsPerPage];
        while (range.Count > 0)
        {
            (long page, long first) = Math.DivRem(range.First, BlocksPerPage);
            var inPage = new BlockRange(first, Math.Min(range.Count, BlocksPerPage - first));
            lock (_pageLocks[page % LockCount])
            {
                if (state == BlockState.Zero && _isSealed)
                    return false;
                SetInPage((int)page, inPage, state, scratch, isWritten);
            }

            range = new BlockRange(range.First + inPage.Count, range.Count - inPage.Count);
        }

        return true;
    }

    /// <param name="page">The page, whose lock is held.</param>
    /// <param name="range">The blocks, counted in the page.</param>
    /// <param name="state">Their new state.</param>
    /// <param name="scratch">Room for a page.</param>
    /// <param name="isWritten">The live map is written now.</param>
    private void SetInPage(int page, BlockRange range, BlockState state, Span<ulong> scratch, bool isWritten)
    {
        if (state == BlockState.Absent && _states.IsUnused(page))
            return;
        int first = (int)(range.First / BlocksPerWord), last = (int)((range.End - 1) / BlocksPerWord);
        ReadOnlySpan<ulong> present = _states.Words(page)[first..(last + 1)];
        Span<ulong> changed = scratch[..present.Length];
        changed.Fill(BlockStates.WordOf(state));
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

        // Also of a page that the file has already: it may be a copy of the file, with holes in place of zeroes.
        if (!_hasSpace[page])
        {
            _file.AllocatePage(page);
            _hasSpace[page] = true;
        }

        if (_states.IsUnused(page))
            _states.Use(page);

        // The file comes first: whoever sees the new state may acknowledge what relies on it.
        if (isWritten)
            _file.WriteLive(page, first, changed);
        else if (!_isBehind[page])
            NoteBehind(page);
        Volatile.Write(ref _isDirty[page], true); // before the state is seen: whoever sees it can commit it
        _states.Change(page, first, changed);
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
            int page = pages[i];
            try
            {
                lock (_pageLocks[page % LockCount])
                {
                    _isBehind[page] = false;
                    _file.WriteLive(page, 0, _states.Words(page));
                }
            }
            catch
            {
                foreach (int left in pages.AsSpan(i))
                {
                    lock (_pageLocks[left % LockCount])
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

    private void Load(bool isLive)
    {
        ulong[] durable = new ulong[WordsPerPage], live = new ulong[WordsPerPage];
        foreach ((int page, bool hasLive, bool hasDurable) in _file.UsedPages())
        {
            durable.AsSpan().Clear();
            if (hasDurable)
                _file.ReadDurable(page, durable);
            if (isLive)
            {
                live.AsSpan().Clear();
                if (hasLive)
                    _file.ReadLive(page, live);
                _isDirty[page] = !live.AsSpan().SequenceEqual(durable);
            }

            ulong[] words = isLive ? live : durable;
            if (!words.AsSpan().ContainsAnyExcept(0UL))
                continue;
            _states.Use(page);
            _states.Change(page, 0, words);
        }

        for (long block = BlockCount; block < (long)_file.PageCount * BlocksPerPage; block++)
        {
            if (this[block] != BlockState.Absent)
            {
                throw new DiskException(
                    DiskError.Damaged, "its map is damaged: it describes blocks beyond the end of the disk");
            }
        }
    }
}
