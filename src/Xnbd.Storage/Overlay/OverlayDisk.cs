using System.Buffers;
using Xnbd.Storage.Maps;
using Xnbd.Storage.Threads;

namespace Xnbd.Storage.Overlay;

/// <summary>
/// A disk that stands over another one, the source, which is never written. A local file holds the blocks that were
/// written here (and, in a cache, those that were fetched), and a <see cref="BlockMap"/> says which. A block is read
/// from the file; or it is zero, if it was zeroed here; or the derived disk reads it from the source.
/// <para>
/// A block becomes <see cref="BlockState.Written"/> as a whole, once its data are in the file: a write to a part of an
/// absent block reads the rest from the source first. From then on writes go straight to the file, without a lock.
/// Whatever changes a block's state, or relies on a block staying absent, holds the block in <see cref="Changing"/>. So
/// a rest that was read never overwrites what somebody wrote meanwhile.
/// </para>
/// <para>
/// What survives: after the death of the process, all that was completed, since the map's live part says so. After the
/// death of the machine, what a flush or a durable operation covered: first the file's data are synced, then the map is
/// committed (<see cref="Commit"/>). A disposable layer does neither: nobody can use it after such a death.
/// </para>
/// <para>
/// Locks: blocks held in <see cref="Changing"/>, then the map's own. Any thread may call anything. One commit runs at a
/// time.
/// </para>
/// The type's other file: <c>OverlayDisk.Zeroing.cs</c> (zeroes and trim).
/// </summary>
internal abstract partial class OverlayDisk : Disk
{
    private const int BlockSize = BlockRange.BlockSize;

    private readonly Disk _local;
    private readonly BlockMap _map;
    private readonly bool _isDisposable;
    private readonly GroupCommit _commits;
    private DiskException? _lost; // the sync that failed; only the commit that runs touches it

    /// <summary>Composes the disk; it owns its parts from now on.</summary>
    /// <param name="local">The local file's data, as long as the source.</param>
    /// <param name="map">Which blocks it holds.</param>
    /// <param name="features">What the disk can do.</param>
    protected OverlayDisk(Disk local, BlockMap map, DiskFeatures features)
    {
        _local = local;
        _map = map;
        _isDisposable = (map.Header.Flags & MapFlags.Disposable) != 0;
        _commits = new GroupCommit(Commit);
        Features = features;
    }

    /// <inheritdoc/>
    public override long Length => _map.Header.Source.Length;

    /// <inheritdoc/>
    public override DiskFeatures Features { get; }

    /// <summary>Which blocks the local file holds.</summary>
    internal BlockMap Map => _map;

    /// <summary>The local file.</summary>
    protected Disk Local => _local;

    /// <summary>Blocks whose state is being changed.</summary>
    protected BlockLocks Changing { get; } = new();

    /// <summary>
    /// Whether reading what the local file does not hold is never fast, as it comes from another machine.
    /// </summary>
    protected virtual bool IsAbsentSlow => false;

    /// <summary>As <see cref="Disk.IsFar"/>, of what is read and the local file does not hold.</summary>
    protected virtual bool IsAbsentFar(long offset, long length) => IsAbsentSlow;

    /// <summary>Reads what the local file does not hold, if that needs no waiting.</summary>
    protected abstract bool TryReadAbsent(long offset, Span<byte> buffer);

    /// <summary>Reads what the local file does not hold.</summary>
    protected abstract ValueTask ReadAbsentAsync(long offset, Memory<byte> buffer, CancellationToken cancel);

    /// <summary>As <see cref="Disk.TryLocate"/>, of what the local file does not hold.</summary>
    protected abstract FileRange TryLocateAbsent(long offset, int length, bool findHoles);

    /// <summary>As <see cref="Disk.PrefetchAsync"/>, of what the local file does not hold.</summary>
    protected abstract ValueTask PrefetchAbsentAsync(long offset, long length, CancellationToken cancel);

    /// <summary>
    /// As <see cref="Disk.GetExtentsAsync"/>, of what the local file does not hold. Depths are counted from the source.
    /// </summary>
    protected abstract ValueTask GetAbsentExtentsAsync(long offset, long length, ExtentList extents);

    /// <summary>Whether the local file holds a block of this state.</summary>
    protected static bool IsLocal(BlockState state) => state is BlockState.Written or BlockState.Fetched;

    /// <summary>
    /// Commits what a process that died has left. To be called once after opening, before anything is written. Blocks
    /// may have changed state without a commit. Their earlier state must never come back: a write that was under way,
    /// and did not happen, might otherwise happen after a death of the machine, since its data may be in the file.
    /// </summary>
    public ValueTask SettleAsync() => _map.IsCommitted ? ValueTask.CompletedTask : FlushAsync();

    /// <inheritdoc/>
    public override bool TryRead(long offset, Span<byte> buffer)
    {
        while (buffer.Length > 0)
        {
            int length = Run(offset, buffer.Length, out BlockState state);
            if (!TryReadRun(offset, buffer[..length], state))
                return false;
            offset += length;
            buffer = buffer[length..];
        }

        return true;
    }

    /// <inheritdoc/>
    public override bool TryWrite(long offset, ReadOnlySpan<byte> data)
    {
        var range = BlockRange.Touching(offset, data.Length);
        if (_map.IsAll(range, BlockState.Written))
            return _local.TryWrite(offset, data);

        if (range != BlockRange.Inside(offset, data.Length, Length) || !Changing.TryEnter(range))
            return false;
        try
        {
            OwnFetched(range);
            if (!_local.TryWrite(offset, data))
                return false;
            if (!_map.IsAll(range, BlockState.Written))
                _map.Set(range, BlockState.Written);
            return true;
        }
        finally
        {
            Changing.Leave(range);
        }
    }

    /// <inheritdoc/>
    public override FileRange TryLocate(long offset, int length, bool findHoles)
    {
        int run = Run(offset, length, out BlockState state);
        return state switch
        {
            BlockState.Absent => TryLocateAbsent(offset, run, findHoles),
            BlockState.Zero => findHoles ? FileRange.Hole(run) : FileRange.None,
            _ => _local.TryLocate(offset, run, findHoles),
        };
    }

    /// <inheritdoc/>
    public override bool IsFar(long offset, long length, bool isWrite)
    {
        var range = BlockRange.Touching(offset, length);
        if (!isWrite)
            return HasFar(range);
        long end = offset + length; // only a block that is written in part is needed
        return (offset % BlockSize != 0 && HasFar(range with { Count = 1 }))
            || (end % BlockSize != 0 && end != Length && HasFar(new BlockRange(range.End - 1, 1)));
    }

    /// <inheritdoc/>
    public override async ValueTask ReadAsync(long offset, Memory<byte> buffer, CancellationToken cancel = default)
    {
        while (buffer.Length > 0)
        {
            int length = Run(offset, buffer.Length, out BlockState state);
            if (!TryReadRun(offset, buffer.Span[..length], state))
            {
                await (state == BlockState.Absent
                    ? ReadAbsentAsync(offset, buffer[..length], cancel)
                    : _local.ReadAsync(offset, buffer[..length], cancel));
            }

            offset += length;
            buffer = buffer[length..];
        }
    }

    /// <inheritdoc/>
    public override async ValueTask WriteAsync(
        long offset, ReadOnlyMemory<byte> data, bool durable, CancellationToken cancel = default)
    {
        if (data.Length > 0)
        {
            var range = BlockRange.Touching(offset, data.Length);
            if (_map.IsAll(range, BlockState.Written))
            {
                await WriteLocal(offset, data);
            }
            else
            {
                await Changing.EnterAsync(range, cancel);
                try
                {
                    await WriteChanging(offset, data, cancel);
                }
                finally
                {
                    Changing.Leave(range);
                }
            }
        }

        if (durable)
            await FlushAsync();
    }

    /// <inheritdoc/>
    public override ValueTask FlushAsync()
        => _isDisposable || (Features & DiskFeatures.ReadOnly) != 0 ? ValueTask.CompletedTask : FlushAll();

    /// <summary>
    /// Makes durable all that is in the file and in the map, also of a disk that clients may not write.
    /// </summary>
    internal ValueTask FlushAll() => new(_commits.RunAsync());

    /// <inheritdoc/>
    public override async ValueTask PrefetchAsync(long offset, long length, CancellationToken cancel = default)
    {
        while (length > 0)
        {
            int run = Run(offset, (int)Math.Min(length, int.MaxValue), out BlockState state);
            if (state != BlockState.Zero)
            {
                await (state == BlockState.Absent
                    ? PrefetchAbsentAsync(offset, run, cancel)
                    : _local.PrefetchAsync(offset, run, cancel));
            }

            offset += run;
            length -= run;
        }
    }

    /// <inheritdoc/>
    public override async ValueTask GetExtentsAsync(long offset, long length, ExtentList extents)
    {
        long end = offset + length;
        while (offset < end)
        {
            int run = Run(offset, (int)Math.Min(end - offset, int.MaxValue), out BlockState state);
            bool isTaken = state == BlockState.Zero
                ? extents.Add(run, isHole: true)
                : await AddExtents(isAbsent: state == BlockState.Absent, offset, run, extents);
            if (!isTaken)
                return;
            offset += run;
        }
    }

    /// <summary>Adds the extents of the local file, or of the source.</summary>
    /// <returns>False when the answer ends before the run does.</returns>
    private async ValueTask<bool> AddExtents(bool isAbsent, long offset, long length, ExtentList extents)
    {
        var parts = new ExtentList(extents.Room + 1); // the first of them may join the last one there
        await (isAbsent ? GetAbsentExtentsAsync(offset, length, parts) : _local.GetExtentsAsync(offset, length, parts));
        foreach (Extent part in parts.Extents)
        {
            if (!extents.Add(part.Length, part.IsHole, isAbsent ? part.Depth + 1 : 1))
                return false;
        }

        return parts.Length >= length;
    }

    /// <summary>How many of the bytes from an offset on are in blocks of one state.</summary>
    private int Run(long offset, int length, out BlockState state)
    {
        BlockRange run = _map.Run(BlockRange.Touching(offset, length), out state);
        return (int)Math.Min(length, (run.End * BlockSize) - offset);
    }

    /// <summary>Whether some of these blocks are read from another machine.</summary>
    private bool HasFar(BlockRange range)
    {
        for (BlockRange left = range; left.Count > 0;)
        {
            BlockRange run = _map.Run(left, out BlockState state);
            if (state == BlockState.Absent && IsAbsentFar(run.Offset, run.LengthOn(Length)))
                return true;
            left = left.After(run);
        }

        return false;
    }

    private bool TryReadRun(long offset, Span<byte> buffer, BlockState state)
    {
        switch (state)
        {
            case BlockState.Absent:
                return TryReadAbsent(offset, buffer);
            case BlockState.Zero:
                buffer.Clear();
                return true;
            default:
                return _local.TryRead(offset, buffer);
        }
    }

    private ValueTask WriteLocal(long offset, ReadOnlyMemory<byte> data)
        => _local.TryWrite(offset, data.Span)
            ? ValueTask.CompletedTask
            : _local.WriteAsync(offset, data, durable: false);

    /// <summary>A write to blocks of which some are not in the file yet; the caller holds them.</summary>
    private async ValueTask WriteChanging(long offset, ReadOnlyMemory<byte> data, CancellationToken cancel)
    {
        var range = BlockRange.Touching(offset, data.Length);
        OwnFetched(range);
        long end = offset + data.Length, whole = offset, wholeEnd = end;
        if (offset % BlockSize != 0 && !IsLocal(_map[range.First]))
        {
            whole = Math.Min(end, (range.First + 1) * BlockSize);
            await WriteMerged(range.First, offset, data[..(int)(whole - offset)], cancel);
        }

        if (whole < end && end % BlockSize != 0 && end != Length && !IsLocal(_map[range.End - 1]))
        {
            wholeEnd = Math.Max(whole, (range.End - 1) * BlockSize);
            await WriteMerged(range.End - 1, wholeEnd, data[(int)(wholeEnd - offset)..], cancel);
        }

        if (whole < wholeEnd)
            await WriteLocal(whole, data[(int)(whole - offset)..(int)(wholeEnd - offset)]);
        if (!_map.IsAll(range, BlockState.Written))
            _map.Set(range, BlockState.Written);
    }

    /// <summary>
    /// Blocks that are as the source has them are about to change; the caller holds them. They count as written from
    /// now on: if the process dies, or the disk is full, before all of it is done, a block must not count as fetched
    /// that holds something else.
    /// </summary>
    private void OwnFetched(BlockRange range)
    {
        for (BlockRange left = range; left.Count > 0;)
        {
            BlockRange run = _map.Run(left, out BlockState state);
            if (state == BlockState.Fetched)
                _map.Set(run, BlockState.Written);
            left = left.After(run);
        }
    }

    /// <summary>Writes a whole block to the file: a part that is new, and the rest as it is.</summary>
    private async ValueTask WriteMerged(
        long block, long offset, ReadOnlyMemory<byte> part, CancellationToken cancel)
    {
        long start = block * BlockSize;
        int length = (int)Math.Min(BlockSize, Length - start);
        byte[] rented = ArrayPool<byte>.Shared.Rent(BlockSize);
        try
        {
            Memory<byte> merged = rented.AsMemory(0, length);
            BlockState state = _map[block];
            if (!TryReadRun(start, merged.Span, state))
                await ReadAbsentAsync(start, merged, cancel);
            part.CopyTo(merged[(int)(offset - start)..]);
            await WriteLocal(start, merged);
        }
        finally
        {
            ArrayPool<byte>.Shared.Return(rented);
        }
    }

    /// <summary>Makes durable what has completed: the data, then the pages of the map that speak of it.</summary>
    /// <exception cref="DiskException">
    /// If a sync has failed, data may be lost, and every later commit fails, too. If the map could not be written, it
    /// may be the next time.
    /// </exception>
    private async ValueTask Commit()
    {
        if (_lost is { } earlier)
            throw Lost(earlier);
        var pages = _map.Collect();
        try
        {
            await _local.FlushAsync();
        }
        catch (DiskException failure)
        {
            throw Lose(failure);
        }

        _map.WritePages(pages); // on the disk thread that has synced the data; on this thread if the sync was faster
        try
        {
            _map.SyncPages(pages);
        }
        catch (DiskException failure)
        {
            throw Lose(failure);
        }
    }

    private DiskException Lose(DiskException failure)
    {
        _lost = failure;
        SyncHasFailed();
        return Lost(failure);
    }

    /// <summary>What was not durable before may be lost.</summary>
    protected virtual void SyncHasFailed()
    {
    }

    private static DiskException Lost(DiskException failure)
        => new(
            DiskError.Io,
            $"a sync has failed and may have lost data; nothing is called durable any more ({failure.Message})");
}
