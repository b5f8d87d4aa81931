using Xnbd.Storage.Maps;

namespace Xnbd.Storage.Overlay;

/// <content>
/// Zeroes and trim: whole blocks are marked as zero, and their space in the local file is given back.
/// </content>
internal abstract partial class OverlayDisk
{
    private static readonly ReadOnlyMemory<byte> s_zeroBlock = new byte[BlockSize];

    /// <inheritdoc/>
    public override async ValueTask ZeroAsync(
        long offset, long length, ZeroMode mode, bool durable, CancellationToken cancel = default)
    {
        if ((mode & ZeroMode.FastOnly) != 0)
            RefuseIfEdgesAreSlow(offset, length);

        // The middle comes first: it may turn out not to be fast, and then nothing may have changed.
        BlockRange inside = BlockRange.Inside(offset, length, Length);
        for (BlockRange left = inside; left.Count > 0;)
        {
            BlockRange part = left with { Count = Math.Min(left.Count, BlockLocks.MaxHeldBlocks) };
            left = left.After(part);
            await Changing.EnterAsync(part, cancel);
            try
            {
                await ((mode & ZeroMode.MayPunch) != 0 ? Discard(part) : Allocate(part, mode));
            }
            finally
            {
                Changing.Leave(part);
            }
        }

        long end = offset + length, headEnd = Math.Min(end, inside.Offset);
        long tail = inside.Count > 0 ? Math.Min(end, inside.End * BlockSize) : headEnd;
        if (offset < headEnd)
            await ZeroEdge(offset, headEnd - offset, mode, cancel);
        if (tail < end)
            await ZeroEdge(tail, end - tail, mode, cancel);

        if (durable)
            await FlushAsync();
    }

    /// <inheritdoc/>
    public override async ValueTask TrimAsync(
        long offset, long length, bool durable, CancellationToken cancel = default)
    {
        BlockRange inside = BlockRange.Inside(offset, length, Length);
        if (inside.Count > 0)
            await ZeroAsync(inside.Offset, inside.LengthOn(Length), ZeroMode.MayPunch, durable, cancel);
        else if (durable)
            await FlushAsync();
    }

    /// <summary>A part of a block can be zeroed fast only if the rest of the block is at hand.</summary>
    /// <exception cref="DiskException">The rest would have to be fetched; nothing has changed.</exception>
    private void RefuseIfEdgesAreSlow(long offset, long length)
    {
        long end = offset + length;
        bool isSlow = IsAbsentSlow && length > 0
            && ((offset % BlockSize != 0 && _map[offset / BlockSize] == BlockState.Absent)
                || (end % BlockSize != 0 && end != Length && _map[end / BlockSize] == BlockState.Absent));
        if (isSlow)
        {
            throw new DiskException(
                DiskError.NotSupported,
                $"no fast way to zero {length} bytes at {offset}: the blocks at its ends are not here yet");
        }
    }

    /// <summary>Marks blocks as zero; the caller holds them.</summary>
    private async ValueTask Discard(BlockRange range)
    {
        OwnFetched(range);
        // The space is given back first: once a block is marked, a write may come and fill it.
        for (BlockRange left = range; left.Count > 0;)
        {
            BlockRange run = _map.Run(left, out BlockState state);
            if (IsLocal(state))
                await _local.TrimAsync(run.Offset, run.LengthOn(Length), durable: false);
            left = left.After(run);
        }

        if (_map.TrySetZero(range))
            return;

        // The file alone is about to become the disk: it must hold the zeroes itself.
        await _local.ZeroAsync(range.Offset, range.LengthOn(Length), ZeroMode.MayPunch, durable: false);
        _map.Set(range, BlockState.Written);
    }

    /// <summary>Makes blocks zero and gives them space, so that later writes find it; the caller holds them.</summary>
    private async ValueTask Allocate(BlockRange range, ZeroMode mode)
    {
        OwnFetched(range);
        await _local.ZeroAsync(range.Offset, range.LengthOn(Length), mode, durable: false);
        _map.Set(range, BlockState.Written);
    }

    /// <summary>Zeroes a part of one block.</summary>
    private ValueTask ZeroEdge(long offset, long length, ZeroMode mode, CancellationToken cancel)
        => (mode & ZeroMode.MayPunch) != 0 && _map[offset / BlockSize] == BlockState.Zero
            ? ValueTask.CompletedTask
            : WriteAsync(offset, s_zeroBlock[..(int)length], durable: false, cancel);
}
