namespace Xnbd.Storage.Threads;

/// <summary>The order of deferred work: all work of a phase is done before any work of a later one.</summary>
public enum WorkPhase
{
    /// <summary>Sending requests and replies: somebody waits for them.</summary>
    Send,

    /// <summary>Storing what has arrived: no reader waits for it.</summary>
    Store,
}

/// <summary>
/// Work that a thread defers to the end of its batch, because it is cheaper once for many than for each (a system call
/// that sends what has gathered), or because nobody waits for it.
/// <para>
/// A receiving loop owns the batch of its thread: the session's loop, or that of a connection to a remote. It begins
/// the batch, runs the deferred work before the thread waits for anything, and ends the batch. Everybody else only
/// defers. Without a batch nothing is deferred: the caller does its work at once, or gives it to another thread.
/// </para>
/// <para>
/// All state belongs to one thread, so there is no lock. Work that runs may defer more, also of an earlier phase, and
/// may run the rest itself before it waits.
/// </para>
/// </summary>
public static class DeferredWork
{
    [ThreadStatic]
    private static Batch? t_batch;

    /// <summary>Begins a batch on this thread.</summary>
    public static void Begin() => (t_batch ??= new Batch()).IsOpen = true;

    /// <summary>Defers work to the end of this thread's batch.</summary>
    /// <param name="phase">When the work is done.</param>
    /// <param name="work">The work. If it is the last that was deferred to this phase, it is done once.</param>
    /// <returns>False when this thread has no batch: then nothing was deferred.</returns>
    public static bool TryDefer(WorkPhase phase, Action work)
    {
        if (t_batch is not { IsOpen: true } batch)
            return false;
        (phase == WorkPhase.Send ? batch.Sends : batch.Stores).Add(work);
        return true;
    }

    /// <summary>Does what was deferred so far, by phases. To be called before the thread waits.</summary>
    public static void Run()
    {
        if (t_batch is not { } batch)
            return;
        while (batch.Sends.TryTake(out Action? work) || batch.Stores.TryTake(out work))
            work();
    }

    /// <summary>Does what was deferred, and ends the batch.</summary>
    public static void End()
    {
        Run();
        if (t_batch is { } batch)
            batch.IsOpen = false;
    }

    private sealed class Batch
    {
        public readonly Phase Sends = new();
        public readonly Phase Stores = new();
        public bool IsOpen;
    }

    /// <summary>The work of one phase, in the order in which it was deferred.</summary>
    private sealed class Phase
    {
        private readonly Queue<Action> _work = new();
        private Action? _last; // the last one in the queue

        public void Add(Action work)
        {
            if (ReferenceEquals(work, _last))
                return;
            _work.Enqueue(work);
            _last = work;
        }

        public bool TryTake([System.Diagnostics.CodeAnalysis.NotNullWhen(true)] out Action? work)
        {
            if (!_work.TryDequeue(out work))
                return false;
            if (_work.Count == 0)
                _last = null; // while it runs, it may be deferred again
            return true;
        }
    }
}
