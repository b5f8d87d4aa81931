namespace Xnbd.Storage.Threads;

/// <summary>
/// Lets any number of writers through until somebody closes it. Whoever closes it waits for those inside, and keeps new
/// ones out until the gate is opened again. A snapshot begins and ends while the gate is closed, so that each write
/// lies wholly before or wholly after that moment. Passing it costs two interlocked additions and takes no lock.
/// <para>
/// Locks: <c>_closing</c>, held while the gate is closed; then <c>_changed</c>, for those who wait. Writers inside may
/// take other locks, but must not wait for anybody who waits to enter.
/// </para>
/// </summary>
internal sealed class WriteGate
{
    private readonly Lock _closing = new();
    private readonly object _changed = new();
    private int _inside;
    private volatile bool _closed;

    /// <summary>Enters, unless the gate is closed.</summary>
    public bool TryEnter()
    {
        if (_closed)
            return false;
        Interlocked.Increment(ref _inside); // a full fence: the closer sees this count, or this thread sees it closed
        if (!_closed)
            return true;
        Leave();
        return false;
    }

    /// <summary>Enters, waiting while the gate is closed.</summary>
    public void Enter()
    {
        while (!TryEnter())
        {
            lock (_changed)
            {
                while (_closed)
                    Monitor.Wait(_changed);
            }
        }
    }

    /// <summary>Leaves.</summary>
    public void Leave()
    {
        if (Interlocked.Decrement(ref _inside) == 0 && _closed)
        {
            lock (_changed)
                Monitor.PulseAll(_changed);
        }
    }

    /// <summary>Runs an action while no writer is inside. Actions of several threads follow one another.</summary>
    public void RunClosed(Action action)
    {
        lock (_closing)
        {
            lock (_changed)
            {
                _closed = true;
                Interlocked.MemoryBarrier();
                while (Volatile.Read(ref _inside) != 0)
                    Monitor.Wait(_changed);
            }

            try
            {
                action();
            }
            finally
            {
                lock (_changed)
                {
                    _closed = false;
                    Monitor.PulseAll(_changed);
                }
            }
        }
    }
}
