namespace Xnbd.Linux;

/// <summary>
/// The one place that starts threads. A system may refuse one at any time: by <c>ulimit -u</c>, by systemd's
/// <c>TasksMax</c>, or for want of memory. Whoever starts one has an answer to that.
/// </summary>
public static class LinuxThread
{
    /// <summary>
    /// Stack of each thread in bytes. The deepest calls, JSON and a switch on a control client's thread, need a fifth
    /// of it. The default of 8 MiB is address space that limits such as <c>ulimit -v</c> count.
    /// </summary>
    public const int StackBytes = 256 * 1024;

    /// <summary>Starts a background thread: it does not keep the process alive.</summary>
    /// <param name="name">Its name, for <c>ps</c> and debuggers; the kernel keeps 15 bytes.</param>
    /// <param name="work">What it does. It must not throw.</param>
    /// <returns>The thread; null when the system has none to give. Then nothing of the work was done.</returns>
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
