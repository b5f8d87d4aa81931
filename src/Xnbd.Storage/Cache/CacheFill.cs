using System.Numerics;
using System.Runtime.CompilerServices;
using Xnbd.Storage.Maps;
using Xnbd.Storage.Overlay;

namespace Xnbd.Storage.Cache;

/// <summary>
/// Fills the cache with all that is missing. It asks the origin where zeroes are, a step ahead of what is being
/// fetched, keeps long zeroes as holes of the file, and fetches the rest.
/// <para>
/// An answer from before a change of the origin is not used. Each answer carries the number of changes at its time,
/// which is compared while the blocks are held. Whoever calls <see cref="Forget"/> looks at all
/// blocks afterwards.
/// </para>
/// Threads: several may run at once. Blocks are held in <c>BlockLocks</c> while their zeroes are kept. What was kept
/// survives like every copy: see <see cref="FetchStore"/>.
/// </summary>
/// <param name="origin">Tells where zeroes are.</param>
/// <param name="local">The cache's file.</param>
/// <param name="map">Which blocks the file holds.</param>
/// <param name="changing">Blocks whose state is being changed.</param>
/// <param name="turn">Completes when another piece should be fetched, and tells its size in blocks.</param>
/// <param name="fetch">Fetches what is absent of a range, until it is stored.</param>
internal sealed class CacheFill(
    Disk origin,
    Disk local,
    BlockMap map,
    BlockLocks changing,
    Func<CancellationToken, Task<int>> turn,
    Func<BlockRange, Task> fetch)
{
    /// <summary>How much the origin is asked about at once, in blocks: 1 GiB.</summary>
    internal const int AskedBlocks = (1 << 30) / BlockRange.BlockSize;

    /// <summary>How many extents an answer has at most: this bounds the memory for it.</summary>
    internal const int MaxExtents = 4096;

    /// <summary>What lies next to a miss is copied next, to the end of this unit, in blocks: 256 KiB.</summary>
    private const int NeighbourBlocks = 64;

    /// <summary>Shorter zeroes are fetched with what surrounds them.</summary>
    private const int MinZeroBytes = FetchStore.UnitBytes;

    /// <summary>No list is added to one that is longer.</summary>
    private const int MaxPreferred = 1_000_000;

    private const long NoMiss = -1;

    private int _originChanges; // how often the answers have become stale
    private long _zeroBytes;
    private long _missed = NoMiss; // the block that a client missed last, if nobody has asked for what lies behind it
    private readonly Lock _preferring = new(); // guards the list; a leaf
    private readonly LinkedList<BlockRange> _preferred = [];
    private long _preferredBlocks; // of the list; this one and the next are read without the lock
    private long _preferredTotal; // blocks that were added since the list was empty

    private long Length => map.Header.Source.Length;

    /// <summary>Bytes that were made zero here, because the origin says that they are.</summary>
    public long ZeroBytes => Interlocked.Read(ref _zeroBytes);

    /// <summary>A client has missed a block: what lies behind it is copied next.</summary>
    /// <param name="block">The index of the block.</param>
    public void NoteMiss(long block) => Volatile.Write(ref _missed, block);

    /// <summary>The origin has changed: what it has said so far is not used any more.</summary>
    public void Forget() => Interlocked.Increment(ref _originChanges);

    /// <summary>
    /// Adds ranges that are copied before the rest of the disk, by a run that is under way, or else by the next one.
    /// </summary>
    /// <param name="ranges">Ranges inside the disk, in the order in which they are copied.</param>
    /// <exception cref="DiskException">A million ranges wait already.</exception>
    public void Prefer(IEnumerable<BlockRange> ranges)
    {
        lock (_preferring)
        {
            if (_preferred.Count >= MaxPreferred)
                throw new DiskException(DiskError.NoMemory, "too many ranges wait to be fetched already");
            if (_preferred.Count == 0)
                _preferredTotal = 0;
            foreach (BlockRange range in ranges.Where(range => range.Count > 0))
            {
                _preferred.AddLast(range);
                _preferredBlocks += range.Count;
                _preferredTotal += range.Count;
            }
        }
    }

    /// <summary>The ranges of <see cref="Prefer"/> that are left are not copied before the rest.</summary>
    public void PreferNothing()
    {
        lock (_preferring)
        {
            _preferred.Clear();
            _preferredBlocks = 0;
        }
    }

    /// <summary>
    /// Fetches what is missing. The order: what lies next to a client's last miss, what is preferred, and then all,
    /// from the start of the disk, where the zeroes that the origin knows of are kept.
    /// </summary>
    /// <param name="all">False: what is preferred, and nothing else.</param>
    /// <param name="maxBlocks">How many blocks one request fetches at most; 1 to <see cref="Fetch.MaxBlocks"/>.</param>
    /// <param name="parallel">How many requests are under way, or being stored, at once.</param>
    /// <param name="cancel">Ends the work; what was fetched stays.</param>
    /// <exception cref="DiskException">The origin failed, or what was fetched cannot be kept.</exception>
    public async Task RunAsync(bool all, int maxBlocks, int parallel, CancellationToken cancel)
    {
        var options = new ParallelOptions { MaxDegreeOfParallelism = parallel, CancellationToken = cancel };
        await Parallel.ForEachAsync(
            Pieces(all, maxBlocks), options, async (range, _) => await fetch(range).WaitAsync(cancel));
        map.WriteBehind(); // also what others have just stored
    }

    /// <summary>What is to be fetched, in order, each piece when it is its turn.</summary>
    private async IAsyncEnumerable<BlockRange> Pieces(
        bool all, int maxBlocks, [EnumeratorCancellation] CancellationToken cancel = default)
    {
        Task<Answer?>? asked = null; // about what lies behind a miss
        var near = new LinkedList<BlockRange>();
        await foreach (BlockRange range in all ? Missing(cancel) : AsyncEnumerable.Empty<BlockRange>())
        {
            for (BlockRange left = range; left.Count > 0;)
            {
                int blocks = await NextPieceBlocks(maxBlocks, cancel);
                if (near.Count == 0) // what lies behind later misses, and not behind all of them
                    asked ??= AskForZeroes(TakeNeighbours(), BlockRange.BlockSize);
                if (asked is { IsCompleted: true })
                {
                    if (await asked is { } answer)
                    {
                        await foreach (BlockRange part in DataOf(answer, cancel))
                            near.AddLast(part);
                    }

                    asked = null;
                }

                BlockRange piece = TakeFirst(near, blocks, out _);
                if (piece.Count == 0)
                    piece = TakePreferred(blocks);
                if (piece.Count == 0)
                {
                    left = FromFirstAbsent(left);
                    if (left.Count == 0)
                        break;
                    piece = ReadAhead.FirstPiece(map.Run(left, out _), blocks);
                    left = left.After(piece);
                }

                yield return piece;
            }
        }

        while (PreferredBlocks > 0)
        {
            int blocks = await NextPieceBlocks(maxBlocks, cancel);
            if (TakePreferred(blocks) is { Count: > 0 } piece)
                yield return piece;
        }
    }

    /// <summary>
    /// Waits for the next turn. A piece has a power of two of blocks, and begins at a multiple of that, so that zeroes
    /// fill whole units of what is stored.
    /// </summary>
    private async Task<int> NextPieceBlocks(int maxBlocks, CancellationToken cancel)
    {
        int blocks = await turn(cancel);
        return blocks >= maxBlocks ? maxBlocks : 1 << BitOperations.Log2((uint)Math.Max(1, blocks));
    }

    /// <summary>How many blocks are still preferred; some of them may be local.</summary>
    public long PreferredBlocks => Volatile.Read(ref _preferredBlocks);

    /// <summary>How many blocks have been preferred, since none was.</summary>
    public long PreferredTotal => Volatile.Read(ref _preferredTotal);

    /// <summary>The next blocks that are preferred, and absent; none if there are none.</summary>
    private BlockRange TakePreferred(int maxBlocks)
    {
        lock (_preferring)
        {
            BlockRange piece = TakeFirst(_preferred, maxBlocks, out long passed);
            _preferredBlocks -= passed;
            return piece;
        }
    }

    /// <summary>What lies behind the block that a client missed last; often nothing.</summary>
    private BlockRange TakeNeighbours()
    {
        long missed = Interlocked.Exchange(ref _missed, NoMiss);
        if (missed == NoMiss)
            return default;
        long end = Math.Min((missed / NeighbourBlocks * NeighbourBlocks) + NeighbourBlocks, map.BlockCount);
        return new BlockRange(missed + 1, end - missed - 1);
    }

    /// <summary>A range without the local blocks at its start: clients may have missed them meanwhile.</summary>
    private BlockRange FromFirstAbsent(BlockRange range)
    {
        while (range.Count > 0)
        {
            BlockRange run = map.Run(range, out BlockState state);
            if (state == BlockState.Absent)
                break;
            range = range.After(run);
        }

        return range;
    }

    /// <summary>Takes the first blocks of some ranges that are absent; none if all are local.</summary>
    /// <param name="ranges">Ranges of at least one block.</param>
    /// <param name="maxBlocks">How many blocks are taken at most.</param>
    /// <param name="passed">How many blocks the ranges have lost: those, and local ones.</param>
    private BlockRange TakeFirst(LinkedList<BlockRange> ranges, int maxBlocks, out long passed)
    {
        passed = 0;
        while (ranges.First is { } first)
        {
            BlockRange run = map.Run(first.Value, out BlockState state);
            BlockRange piece = run with { Count = Math.Min(run.Count, maxBlocks) };
            if (state != BlockState.Absent)
                piece = run;
            first.Value = first.Value.After(piece);
            passed += piece.Count;
            if (first.Value.Count == 0)
                ranges.RemoveFirst();
            if (state == BlockState.Absent)
                return piece;
        }

        return default;
    }

    /// <summary>What is missing, in order. Zeroes on the way are kept.</summary>
    private async IAsyncEnumerable<BlockRange> Missing([EnumeratorCancellation] CancellationToken cancel = default)
    {
        var all = new BlockRange(0, map.BlockCount);
        Task<Answer?> next = AskForZeroes(all);
        while (await next is { } answer)
        {
            cancel.ThrowIfCancellationRequested();
            next = AskForZeroes(all.After(answer.Range)); // while this answer is being worked off
            await foreach (BlockRange range in DataOf(answer, cancel))
                yield return range;
        }
    }

    /// <summary>What an answer says is data, in order. Zeroes on the way are kept.</summary>
    private async IAsyncEnumerable<BlockRange> DataOf(
        Answer answer, [EnumeratorCancellation] CancellationToken cancel = default)
    {
        long done = answer.Range.First;
        foreach (BlockRange zeroes in answer.Zeroes.Append(new BlockRange(answer.Range.End, 0)))
        {
            if (done < zeroes.First)
                yield return new BlockRange(done, zeroes.First - done);
            await KeepZeroes(zeroes, answer.OriginChanges, cancel);
            done = zeroes.End;
        }
    }

    /// <summary>Looks for absent blocks, and asks the origin which of them are zeroes.</summary>
    /// <param name="left">The blocks that are looked at.</param>
    /// <param name="minZeroBytes">
    /// Shorter zeroes count as data. Those behind a miss may be a part of longer ones.
    /// </param>
    /// <returns>What the origin says of the blocks from the first absent one on; null when all are local.</returns>
    private async Task<Answer?> AskForZeroes(BlockRange left, int minZeroBytes = MinZeroBytes)
    {
        // Not about the first absent blocks alone: clients may have made the rest a thousand pieces, and each question
        // takes a round trip. What is local is passed over later.
        left = FromFirstAbsent(left);
        if (left.Count == 0)
            return null;

        BlockRange range = left with { Count = Math.Min(AskedBlocks, left.Count) };
        int originChanges = Volatile.Read(ref _originChanges);
        var extents = new ExtentList(MaxExtents);
        await origin.GetExtentsAsync(range.Offset, range.LengthOn(Length), extents);
        var zeroes = new List<BlockRange>();
        long offset = range.Offset;
        foreach (Extent extent in extents.Extents)
        {
            BlockRange whole = BlockRange.Inside(offset, extent.Length, Length);
            if (extent.IsHole && whole.Count > 0 && whole.LengthOn(Length) >= minZeroBytes)
                zeroes.Add(whole);
            offset += extent.Length;
        }

        // An answer that ends within the first block is of no use: that block is fetched.
        long answered = BlockRange.Inside(range.Offset, offset - range.Offset, Length).Count;
        return new Answer(range with { Count = Math.Max(1, answered) }, zeroes, originChanges);
    }

    private Task KeepZeroes(BlockRange zeroes, int originChanges, CancellationToken cancel)
        => changing.ForEachAsync(map, zeroes, state => state == BlockState.Absent, async part =>
        {
            if (Volatile.Read(ref _originChanges) != originChanges)
                return;
            await local.ZeroAsync(part.Offset, part.LengthOn(Length), ZeroMode.MayPunch, durable: false);
            map.SetFetched(part);
            Interlocked.Add(ref _zeroBytes, part.LengthOn(Length));
        }, cancel: cancel);

    /// <summary>What the origin has said.</summary>
    /// <param name="Range">The blocks that it speaks of: at least one; the first was absent.</param>
    /// <param name="Zeroes">Those that are zeroes, in order.</param>
    /// <param name="OriginChanges">How often the origin had changed when it was asked.</param>
    private sealed record Answer(BlockRange Range, List<BlockRange> Zeroes, int OriginChanges);
}
