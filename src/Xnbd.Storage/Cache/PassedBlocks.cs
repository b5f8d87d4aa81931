namespace Xnbd.Storage.Cache;

/// <summary>
/// Blocks of the origin that have passed through while nothing is kept: by them another server of it is recognized. The
/// last ones are remembered, as the origin may change.
/// <para>
/// Any thread may call anything; <c>_lock</c> guards the fields, and is a leaf. Nothing survives the process.
/// </para>
/// </summary>
internal sealed class PassedBlocks
{
    /// <summary>How many blocks are remembered: twice as many as are compared, since some may be zeroes.</summary>
    private const int MaxBlocks = 2 * DiskSamples.MaxCount;

    /// <summary>How many blocks of one read are remembered: a long read must not displace all others.</summary>
    private const int MaxOfRead = 2;

    private readonly Lock _lock = new();
    private readonly Dictionary<long, byte[]> _blocks = []; // by offset
    private readonly Queue<long> _order = new(); // of the offsets, from the oldest on

    /// <summary>Remembers blocks of a read: the first ones that it has as a whole.</summary>
    /// <param name="offset">Offset in bytes.</param>
    /// <param name="data">What was read there.</param>
    public void Note(long offset, ReadOnlySpan<byte> data)
    {
        long skip = -offset & (BlockRange.BlockSize - 1);
        for (int i = 0; i < MaxOfRead && data.Length - skip >= BlockRange.BlockSize; i++)
        {
            Remember(offset + skip, data.Slice((int)skip, BlockRange.BlockSize));
            skip += BlockRange.BlockSize;
        }
    }

    /// <summary>Forgets all blocks.</summary>
    public void Clear()
    {
        lock (_lock)
        {
            _blocks.Clear();
            _order.Clear();
        }
    }

    /// <summary>
    /// Chooses from the blocks. Some may have changed since: of the right disk most are the same, of another one hardly
    /// any.
    /// </summary>
    public DiskSamples Take()
    {
        lock (_lock)
        {
            IEnumerable<(long, byte[])> inOrder
                = _blocks.OrderBy(block => block.Key).Select(block => (block.Key, block.Value));
            return DiskSamples.Choose([.. inOrder], mayHoldWrites: true);
        }
    }

    private void Remember(long offset, ReadOnlySpan<byte> data)
    {
        byte[] copy = data.ToArray();
        lock (_lock)
        {
            if (!_blocks.ContainsKey(offset))
            {
                if (_order.Count == MaxBlocks)
                    _blocks.Remove(_order.Dequeue());
                _order.Enqueue(offset);
            }

            _blocks[offset] = copy;
        }
    }
}
