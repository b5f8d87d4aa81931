namespace Xnbd.Storage;

/// <content>Zeroes and trim: whole blocks are marked as zero, and their space in the local file is given back.</content>
internal abstract partial class OverlayDisk
{
    /// <summary>
    /// At most so many blocks are held at a time while they are made zero: 64 MiB. Who writes there waits that long, not for
    /// the whole of a request.
    /// </summary>
    private const int BlocksAtOnce = 16 * 1024;

    private static readonly ReadOnlyMemory<byte> s_zeroBlock = new byte[BlockSize];

    /// <inheritdoc/>
    public override async ValueTask ZeroAsync(long offset, long length, ZeroMode mode, bool durable)
    {
        // The middle first: it is what may turn out not to be fast, and then nothing may have changed.
        BlockRange inside = BlockRange.Inside(offset, length, Length);
        for (long block = inside.First; block < inside.End; block += BlocksAtOnce)
        {
            var part = new BlockRange(block, Math.Min(BlocksAtOnce, inside.End - block));
            await Changing.EnterAsync(part);
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
            await ZeroEdge(offset, headEnd - offset, mode);
        if (tail < end)
            await ZeroEdge(tail, end - tail, mode);

        if (durable)
            await FlushAsync();
    }

    /// <inheritdoc/>
    public override async ValueTask TrimAsync(long offset, long length, bool durable)
    {
        BlockRange inside = BlockRange.Inside(offset, length, Length);
        if (inside.Count > 0)
            await ZeroAsync(inside.Offset, inside.LengthOn(Length), ZeroMode.MayPunch, durable);
        else if (durable)
            await FlushAsync();
    }

    /// <summary>Marks blocks as zero; the caller holds them.</summary>
    private async ValueTask Discard(BlockRange range)
    {
        // The space first: once a block is marked, a write may come and fill it.
        for (BlockRange left = range; left.Count > 0;)
        {
            BlockRange run = _map.Run(left, out BlockState state);
            if (IsLocal(state))
                await _local.TrimAsync(run.Offset, run.LengthOn(Length), durable: false);
            left = new BlockRange(run.End, left.End - run.End);
        }

        _map.Set(range, BlockState.Zero);
    }

    /// <summary>Makes blocks zero and gives them space, so that later writes find it; the caller holds them.</summary>
    private async ValueTask Allocate(BlockRange range, ZeroMode mode)
    {
        await _local.ZeroAsync(range.Offset, range.LengthOn(Length), mode, durable: false);
        _map.Set(range, BlockState.Written);
    }

    /// <summary>Zeroes a part of one block.</summary>
    private ValueTask ZeroEdge(long offset, long length, ZeroMode mode)
        => (mode & ZeroMode.MayPunch) != 0 && _map[offset / BlockSize] == BlockState.Zero
            ? ValueTask.CompletedTask
            : WriteAsync(offset, s_zeroBlock[..(int)length], durable: false);
}
