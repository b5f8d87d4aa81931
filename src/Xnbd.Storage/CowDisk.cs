using System.Buffers;

namespace Xnbd.Storage;

/// <summary>
/// A disk whose writes go to a layer, over a base that is never written. A block is read from the layer if that holds it,
/// is zero if it was zeroed here, and else comes from the base.
/// <para>
/// A block becomes <see cref="BlockState.Written"/> as a whole, once its data is in the layer: a write to a part of it fetches
/// the rest from the base first. From then on writes go straight to the layer, without a lock. All that changes a block's
/// state, or relies on a block that is not in the layer staying so, holds the block in <c>_changing</c>; so a fetched
/// rest never overwrites what somebody wrote meanwhile.
/// </para>
/// <para>
/// What survives: after the death of the process, all that was completed, as the map's live part says so. After the death
/// of the machine, what a flush or a durable operation covered: first the layer's data is synced, then the map is committed
/// (<see cref="Commit"/>). A disposable layer does neither: it is of no use to anybody after such a death.
/// </para>
/// The type's other file: <c>CowDisk.Zeroing.cs</c> (zeroes and trim).
/// </summary>
internal sealed partial class CowDisk : Disk
{
    private const int BlockSize = BlockRange.BlockSize;

    private readonly Disk _base;
    private readonly Disk _layer;
    private readonly BlockMap _map;
    private readonly LayerFile? _file;
    private readonly bool _isDisposable;
    private readonly BlockLocks _changing = new();
    private readonly SharedRounds _commits;

    /// <summary>Composes the disk; it owns its parts from now on.</summary>
    /// <param name="baseDisk">The base; it is only read.</param>
    /// <param name="layer">The layer's data, as long as the base.</param>
    /// <param name="map">Which blocks the layer holds.</param>
    /// <param name="readOnly">The disk is not to be written.</param>
    public CowDisk(Disk baseDisk, Disk layer, BlockMap map, bool readOnly)
    {
        _base = baseDisk;
        _layer = layer;
        _map = map;
        _isDisposable = (map.Header.Flags & MapFlags.Disposable) != 0;
        _commits = new SharedRounds(Commit);
        Features = DiskFeatures.Layered | (readOnly ? DiskFeatures.ReadOnly : DiskFeatures.Trim);
    }

    /// <summary>Composes the disk of a base and a layer's file; it owns both from now on.</summary>
    public CowDisk(Disk baseDisk, LayerFile file, bool readOnly)
        : this(baseDisk, file.Data, file.Map, readOnly) => _file = file;

    /// <inheritdoc/>
    public override long Length => _base.Length;

    /// <inheritdoc/>
    public override DiskFeatures Features { get; }

    /// <summary>The layer's file.</summary>
    internal LayerFile File => _file!;

    /// <summary>What the layer stands on.</summary>
    internal Disk Base => _base;

    /// <summary>
    /// To be called once after opening, before anything is written. If the process died, blocks may have changed state
    /// without a commit; then an earlier state must never come back, or a write that was under way and did not happen might
    /// after the death of the machine: its data may stand in the file.
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
            return _layer.TryWrite(offset, data);

        if (range != BlockRange.Inside(offset, data.Length, Length) || !_changing.TryEnter(range))
            return false;
        try
        {
            if (!_layer.TryWrite(offset, data))
                return false;
            _map.Set(range, BlockState.Written);
            return true;
        }
        finally
        {
            _changing.Leave(range);
        }
    }

    /// <inheritdoc/>
    public override FileRange TryLocate(long offset, int length, bool findHoles)
    {
        int run = Run(offset, length, out BlockState state);
        return state switch
        {
            BlockState.Written => _layer.TryLocate(offset, run, findHoles),
            BlockState.Absent => _base.TryLocate(offset, run, findHoles),
            _ => findHoles ? FileRange.Hole(run) : FileRange.None,
        };
    }

    /// <inheritdoc/>
    public override async ValueTask ReadAsync(long offset, Memory<byte> buffer)
    {
        while (buffer.Length > 0)
        {
            int length = Run(offset, buffer.Length, out BlockState state);
            if (!TryReadRun(offset, buffer.Span[..length], state))
                await (state == BlockState.Absent ? _base : _layer).ReadAsync(offset, buffer[..length]);
            offset += length;
            buffer = buffer[length..];
        }
    }

    /// <inheritdoc/>
    public override async ValueTask WriteAsync(long offset, ReadOnlyMemory<byte> data, bool durable)
    {
        if (data.Length > 0)
        {
            var range = BlockRange.Touching(offset, data.Length);
            if (_map.IsAll(range, BlockState.Written))
            {
                await WriteLayer(offset, data);
            }
            else
            {
                await _changing.EnterAsync(range);
                try
                {
                    await WriteChanging(offset, data);
                }
                finally
                {
                    _changing.Leave(range);
                }
            }
        }

        if (durable)
            await FlushAsync();
    }

    /// <inheritdoc/>
    public override ValueTask FlushAsync()
        => _isDisposable || (Features & DiskFeatures.ReadOnly) != 0 ? ValueTask.CompletedTask : new ValueTask(_commits.RunAsync());

    /// <inheritdoc/>
    public override async ValueTask PrefetchAsync(long offset, long length)
    {
        while (length > 0)
        {
            int run = Run(offset, (int)Math.Min(length, int.MaxValue), out BlockState state);
            if (state != BlockState.Zero)
                await (state == BlockState.Absent ? _base : _layer).PrefetchAsync(offset, run);
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
            bool isTaken = state switch
            {
                BlockState.Zero => extents.Add(run, isHole: true),
                BlockState.Written => await AddExtents(_layer, offset, run, 0, extents),
                _ => await AddExtents(_base, offset, run, 1, extents),
            };
            if (!isTaken)
                return;
            offset += run;
        }
    }

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (!disposing)
            return;
        _file?.Dispose();
        _layer.Dispose();
        _base.Dispose();
    }

    /// <summary>Adds the extents of a disk underneath.</summary>
    /// <returns>False when the answer ends before the run does.</returns>
    private static async ValueTask<bool> AddExtents(Disk disk, long offset, long length, int depth, ExtentList extents)
    {
        var parts = new ExtentList(extents.Room + 1); // the first of them may join the last one there
        await disk.GetExtentsAsync(offset, length, parts);
        foreach (Extent part in parts.Extents)
        {
            if (!extents.Add(part.Length, part.IsHole, part.Depth + depth))
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

    private bool TryReadRun(long offset, Span<byte> buffer, BlockState state)
    {
        switch (state)
        {
            case BlockState.Written:
                return _layer.TryRead(offset, buffer);
            case BlockState.Absent:
                return _base.TryRead(offset, buffer);
            default:
                buffer.Clear();
                return true;
        }
    }

    private ValueTask WriteLayer(long offset, ReadOnlyMemory<byte> data)
        => _layer.TryWrite(offset, data.Span) ? ValueTask.CompletedTask : _layer.WriteAsync(offset, data, durable: false);

    /// <summary>A write to blocks of which some are not in the layer yet; the caller holds them.</summary>
    private async ValueTask WriteChanging(long offset, ReadOnlyMemory<byte> data)
    {
        var range = BlockRange.Touching(offset, data.Length);
        long end = offset + data.Length, whole = offset, wholeEnd = end;
        if (offset % BlockSize != 0 && _map[range.First] != BlockState.Written)
        {
            whole = Math.Min(end, (range.First + 1) * BlockSize);
            await WriteMerged(range.First, offset, data[..(int)(whole - offset)]);
        }

        if (whole < end && end % BlockSize != 0 && end != Length && _map[range.End - 1] != BlockState.Written)
        {
            wholeEnd = Math.Max(whole, (range.End - 1) * BlockSize);
            await WriteMerged(range.End - 1, wholeEnd, data[(int)(wholeEnd - offset)..]);
        }

        if (whole < wholeEnd)
            await WriteLayer(whole, data[(int)(whole - offset)..(int)(wholeEnd - offset)]);
        _map.Set(range, BlockState.Written);
    }

    /// <summary>Writes a whole block to the layer: a part that is new, and the rest as it is.</summary>
    private async ValueTask WriteMerged(long block, long offset, ReadOnlyMemory<byte> part)
    {
        long start = block * BlockSize;
        int length = (int)Math.Min(BlockSize, Length - start);
        byte[] rented = ArrayPool<byte>.Shared.Rent(BlockSize);
        try
        {
            Memory<byte> merged = rented.AsMemory(0, length);
            BlockState state = _map[block];
            if (!TryReadRun(start, merged.Span, state))
                await _base.ReadAsync(start, merged);
            part.CopyTo(merged[(int)(offset - start)..]);
            await WriteLayer(start, merged);
        }
        finally
        {
            ArrayPool<byte>.Shared.Return(rented);
        }
    }

    /// <summary>Makes durable what has completed: the data, then the pages of the map that speak of it.</summary>
    private async ValueTask Commit()
    {
        var pages = _map.Collect();
        await _layer.FlushAsync();
        _map.Commit(pages); // on the disk thread that has synced the data
    }
}
