namespace Xnbd.Server;

/// <summary>
/// Bounds what is in flight: bytes, and requests that hold them. Sessions that must wait are served in the order in
/// which they asked, so small requests cannot overtake a large one for ever. A session that waits must hold nothing of
/// the budget, so no circle of waiting arises. A request that is larger than the whole budget passes alone.
/// </summary>
internal sealed class RequestBudget(RequestLimits limits)
{
    private readonly object _changed = new();
    private long _bytes;
    private int _requests;
    private long _nextTicket;
    private long _served;

    /// <summary>A session is waiting.</summary>
    public bool IsContended => Volatile.Read(ref _nextTicket) != Volatile.Read(ref _served);

    /// <summary>Takes bytes for a request, if there is room and nobody waits.</summary>
    public bool TryAcquire(long bytes)
    {
        lock (_changed)
            return _nextTicket == _served && TryEnter(bytes);
    }

    /// <summary>Takes bytes that a request can do without, if few are in use and nobody waits.</summary>
    public bool TryAcquireSpare(long bytes)
    {
        lock (_changed)
        {
            return _nextTicket == _served
                && _bytes + bytes <= limits.Bytes / ServerLimits.SparePartOfBudget
                && TryEnter(bytes);
        }
    }

    /// <summary>Takes bytes for a request, and waits until there is room.</summary>
    public void Acquire(long bytes)
    {
        lock (_changed)
        {
            long ticket = _nextTicket++;
            while (_served != ticket || !TryEnter(bytes))
                Monitor.Wait(_changed);
            _served++;
            Monitor.PulseAll(_changed); // the next in the queue may fit as well
        }
    }

    /// <summary>Gives back the bytes of a request.</summary>
    public void Release(long bytes)
    {
        lock (_changed)
        {
            _bytes -= bytes;
            _requests--;
            if (_nextTicket != _served)
                Monitor.PulseAll(_changed);
        }
    }

    private bool TryEnter(long bytes)
    {
        if (_requests > 0 && (_requests >= limits.Requests || _bytes + bytes > limits.Bytes))
            return false;
        _bytes += bytes;
        _requests++;
        return true;
    }
}

/// <summary>
/// Bounds on what all connections of a server together have in flight: requests that wait, and carry data.
/// </summary>
/// <param name="Requests">The number of requests, at least 1.</param>
/// <param name="Bytes">Their bytes, at least 1; a larger request passes alone.</param>
public readonly record struct RequestLimits(int Requests, long Bytes)
{
    /// <summary>The bounds for local images: their disks answer soon, so only bytes matter.</summary>
    public static RequestLimits Default => new(int.MaxValue, ServerLimits.MaxBytesInFlight);
}
