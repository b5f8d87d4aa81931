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
    /// <exception cref="DiskException">The origin failed, or is detached.</exception>
    public async ValueTask ReadThroughAsync(long offset, Memory<byte> buffer)
    {
        long since = Stopwatch.GetTimestamp();
        byte[] own = new byte[buffer.Length]; // the read may still be under way when the queue is detached
        try
        {
            await _origin.ReadAsync(offset, own).AsTask().WaitAsync(Detaching);
        }
        catch (OperationCanceledException)
        {
            throw Replaced();
        }

        Interlocked.Add(ref _fetchedBytes, own.Length);
        own.CopyTo(buffer);
        Latency.Note(since);
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
