using Xnbd.Linux;

namespace Xnbd.Storage.Cache;

/// <summary>Who wants a fetch; in the order in which fetches are let in.</summary>
internal enum FetchPurpose
{
    /// <summary>A client waits for it.</summary>
    Miss,

    /// <summary>A client will want it.</summary>
    ReadAhead,

    /// <summary>The background copy.</summary>
    Copy,
}

/// <summary>
/// One read of the origin, and all who wait for it.
/// <para>
/// States: waiting for room; let in, and to be sent; sent; arrived, and to be stored; ended. Until it is sent, the
/// range of a miss may grow, and whatever a client misses becomes a miss. <see cref="FetchQueue"/> changes these states
/// under its lock. <see cref="FetchStore"/> alone touches <see cref="IsHeldUp"/>. Everybody who
/// waits for a fetch holds a reference, and so does the fetch itself until it has ended; the last one who leaves gives
/// the buffer back.
/// </para>
/// </summary>
internal sealed class Fetch(BlockRange range, FetchPurpose purpose)
{
    /// <summary>How much one fetch reads at most, in bytes.</summary>
    public const int MaxBytes = 1 << 20;

    /// <summary>How much one fetch reads at most, in blocks.</summary>
    public const int MaxBlocks = MaxBytes / BlockRange.BlockSize;

    /// <summary>
    /// Completes when the data have arrived. Readers go on at once, on the thread that received them.
    /// </summary>
    public TaskCompletionSource Arrived { get; } = new();

    /// <summary>Completes when the data are in the file and in the map. Fails when they will not be.</summary>
    public TaskCompletionSource Stored { get; } = new(TaskCreationOptions.RunContinuationsAsynchronously);

    /// <summary>The blocks that are fetched.</summary>
    public BlockRange Range { get; set; } = range;

    /// <summary>Who wants it.</summary>
    public FetchPurpose Purpose { get; set; } = purpose;

    /// <summary>Its place among those that wait for room, or their turn; null when it has been let in.</summary>
    public LinkedListNode<Fetch>? Place { get; set; }

    /// <summary>The fetch has not been sent, and blocks next to it may be added.</summary>
    public bool MayGrow { get; set; } = purpose == FetchPurpose.Miss;

    /// <summary>What the pace remembers of its sending.</summary>
    public FetchPace.Mark Mark { get; set; }

    /// <summary>The data, from when the fetch is sent until the last reference has gone.</summary>
    public NativeBuffer? Buffer { get; set; }

    /// <summary>How many use the fetch: at first whoever makes it, and the fetch itself.</summary>
    public int References { get; set; } = 2;

    /// <summary>Its bytes take room: they are in flight, or have arrived and are not stored.</summary>
    public bool IsCounted { get; set; }

    /// <summary>It waits for writers, before it can be stored, and has its own room.</summary>
    public bool IsHeldUp { get; set; }

    private volatile bool _isSkipped;
    private volatile bool _isStale;

    /// <summary>
    /// Some of it was not stored, because writers held the blocks and too much waited for writers already.
    /// </summary>
    public bool IsSkipped
    {
        get => _isSkipped;
        set => _isSkipped = value;
    }

    /// <summary>The origin may have changed since, or the disk is switched: it must not be stored.</summary>
    public bool IsStale
    {
        get => _isStale;
        set => _isStale = value;
    }

    /// <summary>Fails all who wait for the fetch, or will.</summary>
    public void Fail(DiskException failure)
    {
        Arrived.TrySetException(failure);
        _ = Arrived.Task.Exception; // observed, also if nobody waits
        FailStoring(failure);
    }

    /// <summary>Fails those who wait until the data are stored. Readers of the data are not concerned.</summary>
    public void FailStoring(DiskException failure)
    {
        Stored.TrySetException(failure);
        _ = Stored.Task.Exception; // observed, also if nobody waits
    }
}
