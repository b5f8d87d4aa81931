namespace Xnbd.Linux;

/// <summary>
/// The only place that starts threads. A system may refuse a thread at any time: because of <c>ulimit -u</c>, of
/// systemd's <c>TasksMax</c>, or for lack of memory. Every caller must handle that.
/// </summary>
public static class LinuxThread
{
    /// <summary>
    /// Size of each thread's stack in bytes. The deepest calls, JSON and a switch on a control client's thread, need a
    /// fifth of it. The default of 8 MiB would take address space, which limits such as <c>ulimit -v</c> count.
    /// </summary>
    public const int StackBytes = 256 * 1024;

    /// <summary>Starts a background thread: it does not keep the process alive.</summary>
    /// <param name="name">The thread's name, for <c>ps</c> and debuggers; the kernel keeps 15 bytes.</param>
    /// <param name="work">The work. It must not throw.</param>
    /// <returns>The thread; null when the system refuses one. Then the work has not begun.</returns>
    public static Thread? TryStart(string name, Action work)
    {
        var thread = new Thread(work.Invoke, StackBytes) { IsBackground = true, Name = name };
        try
        {
            thread.Start();
            return thread;
        }
        catch (Exception failure) when (failure is OutOfMemoryException or ThreadStartException)
        {
            return null;
        }
    }
}
