using System.Diagnostics;

namespace Xnbd.Storage.Cache;

/// <content>The end of fetches when the origin changes, or is not needed any more.</content>
internal sealed partial class FetchQueue
{
    /// <summary>The task that completes when all that has arrived by now is stored, or cannot be.</summary>
    public Task WhenArrivedAreStored()
    {
        Task[] storing;
        lock (_lock)
        {
            IEnumerable<Fetch> arrived = _fetches.Where(fetch => fetch.Arrived.Task.IsCompletedSuccessfully);
            storing = [.. arrived.Select(fetch => fetch.Stored.Task)];
        }

        return Task.WhenAll(storing);
    }

    /// <summary>
    /// The origin has changed: nobody joins the present fetches any more, and they are not stored. They still reach
    /// those who asked for them.
    /// </summary>
    public void Forget()
    {
        lock (_lock)
        {
            foreach (Fetch fetch in _fetches)
                fetch.IsStale = true;
            _fetches.Clear();
        }
    }

    /// <summary>
    /// Fails all that waits for the origin, and all that will, as <see cref="DiskError.Replaced"/>. Reads of the origin
    /// that are under way go on until it is closed; their data are not stored.
    /// </summary>
    public void Detach()
    {
        List<Fetch> left;
        CancellationTokenSource detaching;
        lock (_lock)
        {
            _isDetached = true;
            left = [.. _fetches.Where(fetch => !fetch.Arrived.Task.IsCompleted)];
            foreach (Fetch fetch in left)
            {
                fetch.IsStale = true;
                _fetches.Remove(fetch);
            }

            foreach (TaskCompletionSource<int> turn in _turns)
                turn.TrySetResult(1); // the fetch will say why there is none
            _turns.Clear();
            detaching = _detaching;
        }

        left.ForEach(fetch => fetch.Fail(Replaced())); // outside of the lock: who waits goes on here
        detaching.Cancel();
    }

    /// <summary>The origin is needed again, since the disk is not replaced after all.</summary>
    public void Reattach()
    {
        lock (_lock)
        {
            _isDetached = false;
            _detaching = new CancellationTokenSource();
        }
    }

    /// <summary>Reads the origin as it is now: no other read is joined, and nothing is kept.</summary>
    /// <param name="offset">Offset in bytes.</param>
    /// <param name="buffer">At least one byte.</param>
    /// <param name="cancel">Ends the waiting.</param>
    /// <exception cref="DiskException">The origin failed, or is detached.</exception>
    public async ValueTask ReadThroughAsync(long offset, Memory<byte> buffer, CancellationToken cancel = default)
    {
        long since = Stopwatch.GetTimestamp();
        byte[] own = new byte[buffer.Length];
        await ReadOrigin(offset, own, cancel);
        Interlocked.Add(ref _fetchedBytes, own.Length);
        own.CopyTo(buffer);
        Latency.Note(since);
    }

    /// <summary>
    /// Reads the origin, and waits no longer than that makes sense. The read may go on when this has ended, so its
    /// buffer must belong to nobody else.
    /// </summary>
    private async Task ReadOrigin(long offset, byte[] own, CancellationToken cancel)
    {
        try
        {
            Task read = _origin.ReadAsync(offset, own, cancel).AsTask();
            await read.WaitAsync(Detaching).WaitAsync(cancel);
        }
        catch (OperationCanceledException) when (!cancel.IsCancellationRequested)
        {
            throw Replaced();
        }
    }

    /// <summary>
    /// Whoever has waited for a fetch will not any more. If nobody else does, and it still waits for room or its turn,
    /// it is dropped: otherwise clients that come and leave while the origin is away would leave more and more behind.
    /// One that was let in goes on.
    /// </summary>
    private void GiveUp(Fetch fetch)
    {
        lock (_lock)
        {
            if (fetch.Place is { } place && fetch.References == 2)
            {
                Unqueue(fetch, place);
                _fetches.Remove(fetch);
            }
        }
    }

    private CancellationToken Detaching
    {
        get
        {
            lock (_lock)
                return _detaching.Token;
        }
    }

    private static DiskException Replaced()
        => new(DiskError.Replaced, "nobody waits for the remote any more, since the disk is being switched");
}
