namespace Xnbd.Storage.Cache;

/// <summary>
/// How far a comparison with the origin has come, and what it has found. Any thread may read it; the figures only grow.
/// </summary>
public sealed class CacheVerification
{
    /// <summary>How many differing ranges are remembered at most; the others are only counted.</summary>
    public const int MaxListed = 1000;

    private readonly Lock _lock = new(); // guards the list
    private readonly List<BlockRange> _differences = [];
    private long _blocks;
    private long _doneBlocks;
    private long _writtenBlocks;
    private long _differentBlocks;
    private long _readBytes;

    /// <summary>Blocks that counted as fetched when the comparison began.</summary>
    public long Blocks
    {
        get => Interlocked.Read(ref _blocks);
        internal set => Interlocked.Exchange(ref _blocks, value);
    }

    /// <summary>Of those: blocks that are done with.</summary>
    public long DoneBlocks => Interlocked.Read(ref _doneBlocks);

    /// <summary>Of the blocks that are done with: those that clients have written since, so that nothing is compared.
    /// </summary>
    public long WrittenBlocks => Interlocked.Read(ref _writtenBlocks);

    /// <summary>Blocks that are not as the origin has them.</summary>
    public long DifferentBlocks => Interlocked.Read(ref _differentBlocks);

    /// <summary>Bytes that were read from the origin.</summary>
    public long ReadBytes => Interlocked.Read(ref _readBytes);

    /// <summary>
    /// Some differences may be writes of clients: the machine has died, and nobody knows what was under way then.
    /// </summary>
    public bool MayHoldWrites { get; internal set; }

    /// <summary>The ranges that differ, in order: offsets and lengths in bytes.</summary>
    /// <param name="diskLength">Length of the disk in bytes.</param>
    public IReadOnlyList<(long Offset, long Length)> Differences(long diskLength)
    {
        var ranges = new List<BlockRange>();
        lock (_lock)
        {
            foreach (BlockRange range in _differences.OrderBy(range => range.First))
            {
                if (ranges.Count > 0 && ranges[^1].End == range.First)
                    ranges[^1] = ranges[^1] with { Count = ranges[^1].Count + range.Count };
                else
                    ranges.Add(range);
            }
        }

        return [.. ranges.Select(range => (range.Offset, range.LengthOn(diskLength)))];
    }

    internal void NoteRead(long bytes) => Interlocked.Add(ref _readBytes, bytes);

    internal void NoteWritten(long blocks) => Interlocked.Add(ref _writtenBlocks, blocks);

    internal void NoteDone(long blocks) => Interlocked.Add(ref _doneBlocks, blocks);

    internal void NoteDifferent(BlockRange range)
    {
        Interlocked.Add(ref _differentBlocks, range.Count);
        lock (_lock)
        {
            if (_differences.Count < MaxListed)
                _differences.Add(range);
        }
    }
}
