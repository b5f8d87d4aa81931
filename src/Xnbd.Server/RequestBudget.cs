namespace Xnbd.Server;

/// <summary>
/// How much may be in flight: bytes, and requests that hold them. Who must wait for a part of it is served in the order of
/// asking, so that a large request is not passed by small ones for ever. Who waits must hold none of it: then there is no
/// circle. A request that is larger than all of it passes alone.
/// </summary>
internal sealed class RequestBudget(RequestLimits limits)
{
    private readonly object _changed = new();
    private long _bytes;
    private int _requests;
    private long _nextTicket;
    private long _served;

    /// <summary>Somebody is waiting.</summary>
    public bool IsContended => Volatile.Read(ref _nextTicket) != Volatile.Read(ref _served);

    /// <summary>Lets a request in, if there is room and nobody waits.</summary>
    public bool TryAcquire(long bytes)
    {
        lock (_changed)
            return _nextTicket == _served && TryEnter(bytes);
    }

    /// <summary>Lets a request in, waiting until there is room.</summary>
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

    /// <summary>A request has ended.</summary>
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

/// <summary>Bounds of what all connections of a server together have in flight, of requests that carry data and wait for it.</summary>
/// <param name="Requests">At least 1.</param>
/// <param name="Bytes">Of them, at least 1; a larger request passes alone.</param>
public readonly record struct RequestLimits(int Requests, long Bytes)
{
    /// <summary>Of a server of local images: its disks answer soon, so bytes alone matter.</summary>
    public static RequestLimits Default => new(int.MaxValue, ServerLimits.MaxBytesInFlight);
}
