using System.Net.Sockets;
using Xnbd.Linux;

namespace Xnbd.Programs;

/// <summary>
/// The runtime's own threads: those of the pool, which continue asynchronous work, those that watch the pool and the
/// sockets, and the one for timers. The runtime starts them when they are first needed. If the system refuses a thread
/// then, queued work never runs, or the process ends. So all of them are started when the program starts, and stay.
/// </summary>
internal sealed class RuntimeThreads
{
    /// <summary>
    /// Threads of the pool. The project file has the same number for the minimum and the maximum.
    /// </summary>
    private const int PoolThreads = 4;

    private static readonly TimeSpan s_maxStart = TimeSpan.FromSeconds(10);

    private static Timer? s_timer; // kept, otherwise it would never fire

    private readonly Thread? _starter;
    private bool _areStarted;

    /// <summary>Begins to start the threads.</summary>
    public RuntimeThreads()
    {
        try
        {
            new SafeSocketHandle().Dispose(); // the first socket starts the thread that watches sockets
        }
        catch (TypeInitializationException)
        {
            return; // there can be no socket in this process any more
        }

        _starter = LinuxThread.TryStart("starter", () => _areStarted = TryStart());
    }

    /// <summary>Waits until the threads have been started.</summary>
    /// <exception cref="FailureException">The system has no threads to spare.</exception>
    public void WaitUntilStarted()
    {
        _starter?.Join();
        if (!_areStarted)
        {
            throw new FailureException(
                "the system has no threads to spare: see 'ulimit -u', and TasksMax if systemd has started this");
        }
    }

    private static bool TryStart()
    {
        if (!CanStart(PoolThreads + 3)) // a thread of the pool that cannot start another one ends the process
            return false;
        var running = new CountdownEvent(PoolThreads);
        var fired = new ManualResetEventSlim();
        try
        {
            for (int i = 0; i < PoolThreads; i++)
            {
                ThreadPool.UnsafeQueueUserWorkItem(
                    _ =>
                    {
                        running.Signal();
                        running.Wait(); // each item needs its own thread
                    },
                    null);
            }

            s_timer = new Timer(_ => fired.Set(), null, 1, Timeout.Infinite);
            return running.Wait(s_maxStart) && fired.Wait(s_maxStart);
        }
        catch (Exception failure) when (failure is OutOfMemoryException or ThreadStartException)
        {
            return false;
        }
    }

    private static bool CanStart(int count)
    {
        var all = new ManualResetEventSlim();
        Thread?[] threads = [.. Enumerable.Range(0, count).Select(_ => LinuxThread.TryStart("trial", all.Wait))];
        all.Set();
        foreach (Thread? thread in threads)
            thread?.Join();
        return Array.TrueForAll(threads, thread => thread is not null);
    }
}
