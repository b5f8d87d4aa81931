using Xnbd.Linux;

namespace Xnbd.Storage.Threads;

/// <summary>Work that waits for a disk.</summary>
internal interface IDiskWork
{
    /// <summary>Does the work, on a thread that may wait. Throws nothing.</summary>
    void Run();
}

/// <summary>
/// Threads that wait for disks, so that a session's thread need not. They are started when there is more work than idle
/// threads, up to a maximum, and end when they have had nothing to do for a while. Each image has its own: one whose
/// disk never answers takes no thread of another image.
/// <para>
/// <c>_gate</c> guards the queue and the counts. Work runs while no lock is held. If the system has no thread to give,
/// the thread that hands work over does it itself (<see cref="WorkHere"/>).
/// </para>
/// </summary>
internal sealed class DiskThreads
{
    /// <summary>
    /// How many requests of one kind wait for disks at the same time at most. Measured with cold random reads at depth
    /// 32: 16 threads beat both 8 and 32.
    /// </summary>
    private const int MaxThreads = 16;

    /// <summary>
    /// How long a thread without work stays. Starting another one takes some 100 microseconds.
    /// </summary>
    private static readonly TimeSpan s_idleTime = TimeSpan.FromSeconds(10);

    private readonly object _gate = new();
    private readonly Queue<IDiskWork> _waiting = new();
    private readonly string _name;
    private readonly int _maxThreads;
    private int _threads;
    private int _idle;

    /// <summary>
    /// The groups whose work this thread does in their place: it also does what is handed over meanwhile.
    /// </summary>
    [ThreadStatic]
    private static List<DiskThreads>? t_replaced;

    private readonly Func<string, Action, Thread?> _tryStart;

    private readonly TimeSpan _idleTime;

    /// <summary>Makes a group of threads, of which none is started yet.</summary>
    /// <param name="name">Their name.</param>
    /// <param name="maxThreads">How many there may be.</param>
    /// <param name="tryStart">Starts a thread; <see cref="LinuxThread.TryStart"/> unless given.</param>
    /// <param name="idleTime">How long a thread without work stays; 10 s unless given.</param>
    internal DiskThreads(
        string name, int maxThreads, Func<string, Action, Thread?>? tryStart = null, TimeSpan? idleTime = null)
    {
        (_name, _maxThreads) = (name, maxThreads);
        (_tryStart, _idleTime) = (tryStart ?? LinuxThread.TryStart, idleTime ?? s_idleTime);
    }

    /// <summary>For reads: they never queue up behind a slow flush, or a long zeroing.</summary>
    public static DiskThreads NewReaders() => new("disk reader", MaxThreads);

    /// <summary>For all that changes or syncs.</summary>
    public static DiskThreads NewWriters() => new("disk writer", MaxThreads);

    /// <summary>
    /// For questions where data and holes are. In a badly fragmented file the kernel may take long to answer one.
    /// However many are asked, they keep two threads busy, and no read waits behind them.
    /// </summary>
    public static DiskThreads NewLookers() => new("disk looker", 2);

    /// <summary>Threads that are there at present.</summary>
    internal int Count
    {
        get
        {
            lock (_gate)
                return _threads;
        }
    }

    /// <summary>Hands work over. Callers bound how much: the queue itself has no limit.</summary>
    public void Enqueue(IDiskWork work)
    {
        lock (_gate)
        {
            _waiting.Enqueue(work);
            if (_idle >= _waiting.Count || _threads == _maxThreads)
            {
                Monitor.Pulse(_gate);
                return;
            }

            _threads++;
        }

        if (_tryStart(_name, Work) is not null)
            return;
        lock (_gate)
            _threads--;
        if (t_replaced?.Contains(this) != true)
            WorkHere();
    }

    /// <summary>
    /// Does the work that waits, since the system has no thread to give. If there are threads, they do it. Else the
    /// last caller that could not start one does all of it: until then each such caller has counted as a thread, on
    /// which the others have relied. Work that hands over more does not go deeper: this loop does that, too.
    /// </summary>
    private void WorkHere()
    {
        (t_replaced ??= []).Add(this);
        try
        {
            while (true)
            {
                IDiskWork? work;
                lock (_gate)
                {
                    if (_threads > 0 || !_waiting.TryDequeue(out work))
                        return;
                }

                DeferredWork.Run(); // the work may wait, and somebody else may wait for what this thread has deferred
                work.Run();
            }
        }
        finally
        {
            _ = t_replaced.Remove(this);
        }
    }

    /// <summary>Whether other work waits. If so, long work gives its place up from time to time.</summary>
    public bool HasWaiting
    {
        get
        {
            lock (_gate)
                return _waiting.Count > 0;
        }
    }

    /// <summary>
    /// At most half of the threads are at work. Then further work begins at once, also if others hand work over at the
    /// same moment, and also if the disk on which those threads wait never answers.
    /// </summary>
    public bool IsMostlyIdle
    {
        get
        {
            lock (_gate)
                return _waiting.Count == 0 && _threads - _idle <= _maxThreads / 2;
        }
    }

    private void Work()
    {
        while (true)
        {
            IDiskWork? work;
            lock (_gate)
            {
                while (!_waiting.TryDequeue(out work))
                {
                    _idle++;
                    bool isWoken = Monitor.Wait(_gate, _idleTime);
                    _idle--;
                    if (isWoken || _waiting.Count > 0)
                        continue;
                    _threads--;
                    return;
                }
            }

            work.Run();
        }
    }
}
