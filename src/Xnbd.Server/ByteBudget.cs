namespace Xnbd.Server;

/// <summary>
/// A number of bytes that may be in flight. Who must wait for a part of it is served in the order of asking, so that a
/// large request is not passed by small ones for ever. Who waits must hold none of it: then there is no circle.
/// </summary>
/// <param name="limit">In bytes; no single claim may be larger.</param>
internal sealed class ByteBudget(long limit)
{
    private readonly object _changed = new();
    private long _used;
    private long _nextTicket;
    private long _served;

    /// <summary>Somebody is waiting.</summary>
    public bool IsContended => Volatile.Read(ref _nextTicket) != Volatile.Read(ref _served);

    /// <summary>Bytes in flight.</summary>
    public long Used => Volatile.Read(ref _used);

    /// <summary>Claims bytes, if they are free and nobody waits.</summary>
    public bool TryAcquire(long bytes)
    {
        lock (_changed)
        {
            if (_nextTicket != _served || _used + bytes > limit)
                return false;
            _used += bytes;
            return true;
        }
    }

    /// <summary>Claims bytes, waiting until they are free.</summary>
    public void Acquire(long bytes)
    {
        lock (_changed)
        {
            long ticket = _nextTicket++;
            while (_served != ticket || _used + bytes > limit)
                Monitor.Wait(_changed);
            _served++;
            _used += bytes;
            Monitor.PulseAll(_changed); // the next in the queue may fit as well
        }
    }

    /// <summary>Gives bytes back.</summary>
    public void Release(long bytes)
    {
        lock (_changed)
        {
            _used -= bytes;
            if (_nextTicket != _served)
                Monitor.PulseAll(_changed);
        }
    }
}
