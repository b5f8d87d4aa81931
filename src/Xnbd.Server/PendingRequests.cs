namespace Xnbd.Server;

/// <summary>
/// The pending requests of one connection, and the order in which their replies go out. A request is in flight from
/// <see cref="Add"/> to <see cref="Remove"/>; its reply waits to be sent from <see cref="Finish"/> to
/// <see cref="Dequeue"/>.
/// <para>
/// Replies go out as they become ready, or in the order of the requests (<see cref="KeepsOrder"/>). In the first case
/// the cookies of requests whose reply is not ready are known; in the second, the requests' order is.
/// </para>
/// All members may be used by any thread, unless they say otherwise. One lock, <c>_finished</c>, guards all fields; no
/// other lock is taken and nothing is sent while it is held.
/// </summary>
/// <param name="keepsOrder">Replies go out in the order of the requests from the start.</param>
internal sealed class PendingRequests(bool keepsOrder)
{
    private readonly Queue<PendingRequest> _finished = new();
    private readonly Queue<PendingRequest> _order = new();
    private readonly HashSet<ulong> _cookies = [];
    private int _count;
    private bool _isAwaited;
    private bool _keepsOrder = keepsOrder;

    /// <summary>Requests in flight: those whose replies have not been sent completely.</summary>
    public int Count
    {
        get
        {
            lock (_finished)
                return _count;
        }
    }

    /// <summary>
    /// No request is in flight. For the session's thread, which alone adds requests; it takes no lock.
    /// </summary>
    public bool IsEmpty => Volatile.Read(ref _count) == 0;

    /// <summary>
    /// Replies go out in the order of the requests. For the session's thread, which alone changes it.
    /// </summary>
    public bool KeepsOrder => _keepsOrder;

    /// <summary>From now on replies go out in the order of the requests. No request is in flight.</summary>
    public void KeepOrder()
    {
        lock (_finished)
            _keepsOrder = true;
    }

    /// <summary>A request is in flight from now on.</summary>
    public void Add(PendingRequest pending)
    {
        lock (_finished)
        {
            _count++;
            if (_keepsOrder)
                _order.Enqueue(pending);
            else
                _cookies.Add(pending.Request.Cookie);
        }
    }

    /// <summary>Whether a request with this cookie is in flight and its reply is not ready yet.</summary>
    public bool Contains(ulong cookie)
    {
        lock (_finished)
            return _cookies.Contains(cookie);
    }

    /// <summary>The reply of a request has been built. It is ready to be sent as soon as the order allows it.</summary>
    public void Finish(PendingRequest pending)
    {
        lock (_finished)
        {
            // From now on the client may use the cookie again: all later replies go out behind this one.
            _cookies.Remove(pending.Request.Cookie);
            pending.IsFinished = true;
            if (!_keepsOrder)
                _finished.Enqueue(pending);
            while (_order.TryPeek(out PendingRequest? oldest) && oldest.IsFinished)
                _finished.Enqueue(_order.Dequeue());
            if (_isAwaited)
                Monitor.Pulse(_finished);
        }
    }

    /// <summary>The number of replies that are ready to be sent.</summary>
    public int FinishedCount
    {
        get
        {
            lock (_finished)
                return _finished.Count;
        }
    }

    /// <summary>The next request whose reply is ready to be sent. For the thread that is sending.</summary>
    public bool TryPeek(out PendingRequest pending)
    {
        lock (_finished)
            return _finished.TryPeek(out pending!);
    }

    /// <summary>
    /// Copies the next replies one behind the other, as many as fit as a whole. For the thread that is sending.
    /// </summary>
    /// <returns>Bytes copied.</returns>
    public int CopyReplies(Span<byte> destination)
    {
        int length = 0;
        lock (_finished)
        {
            foreach (PendingRequest pending in _finished)
            {
                ReadOnlySpan<byte> reply = pending.UnsentBytes;
                if (reply.Length > destination.Length - length)
                    break;
                reply.CopyTo(destination[length..]);
                length += reply.Length;
            }
        }

        return length;
    }

    /// <summary>The next reply has been sent, or is dropped. For the thread that is sending.</summary>
    /// <returns>True when no other reply is ready.</returns>
    public bool Dequeue()
    {
        lock (_finished)
        {
            _finished.Dequeue();
            return _finished.Count == 0;
        }
    }

    /// <summary>A request is no longer in flight. What it held has been given back.</summary>
    public void Remove()
    {
        lock (_finished)
        {
            _count--;
            if (_isAwaited)
                Monitor.Pulse(_finished);
        }
    }

    /// <summary>
    /// Waits until a reply is ready to be sent, or until no more than <paramref name="maxCount"/> requests are in
    /// flight, or until a time is over. For the session's thread, which must have done its deferred work before.
    /// </summary>
    /// <param name="maxCount">How many may be left in flight.</param>
    /// <param name="maxTime">How long it waits at most.</param>
    /// <returns>False when no more than that are in flight.</returns>
    public bool WaitForReply(int maxCount, TimeSpan maxTime)
    {
        lock (_finished)
        {
            _isAwaited = true;
            while (_count > maxCount && _finished.Count == 0 && Monitor.Wait(_finished, maxTime))
            {
            }

            _isAwaited = false;
            return _count > maxCount;
        }
    }
}
