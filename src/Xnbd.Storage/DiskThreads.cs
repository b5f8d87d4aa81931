namespace Xnbd.Storage;

/// <summary>Work that waits for a disk.</summary>
internal interface IDiskWork
{
    /// <summary>Does it, on a thread that may wait. Throws nothing.</summary>
    void Run();
}

/// <summary>
/// Threads that wait for disks, so that a session's thread need not. Started when there is more work than idle
/// threads, up to <see cref="MaxThreads"/>; they stay. Shared by all images of the process.
/// </summary>
internal static class DiskThreads
{
    /// <summary>
    /// The most requests that wait for disks at the same time. Measured with cold random reads at depth 32: 16 threads
    /// beat both 8 and 32.
    /// </summary>
    private const int MaxThreads = 16;

    private const int StackBytes = 256 * 1024;

    private static readonly object Gate = new();
    private static readonly Queue<IDiskWork> Waiting = new();
    private static int s_threads;
    private static int s_idle;

    /// <summary>Hands work over. Callers bound how much: the queue itself has no limit.</summary>
    public static void Enqueue(IDiskWork work)
    {
        lock (Gate)
        {
            Waiting.Enqueue(work);
            if (s_idle >= Waiting.Count || s_threads == MaxThreads)
            {
                Monitor.Pulse(Gate);
                return;
            }

            s_threads++;
        }

        new Thread(Work, StackBytes) { IsBackground = true, Name = "disk" }.Start();
    }

    private static void Work()
    {
        while (true)
        {
            IDiskWork? work;
            lock (Gate)
            {
                while (!Waiting.TryDequeue(out work))
                {
                    s_idle++;
                    Monitor.Wait(Gate);
                    s_idle--;
                }
            }

            work.Run();
        }
    }
}
