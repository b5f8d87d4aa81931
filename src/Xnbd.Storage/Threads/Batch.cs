namespace Xnbd.Storage.Threads;

/// <summary>
/// Work that is cheaper done once for many than for each: a system call that sends what has gathered. While a thread works
/// off a batch, it puts such work off to the end; without a batch, it is done at once. It must also be done before the thread
/// waits for anything: what it waits for may depend on it.
/// </summary>
public static class Batch
{
    [ThreadStatic]
    private static List<Action>? t_putOff;

    [ThreadStatic]
    private static int t_next;

    [ThreadStatic]
    private static bool t_isOpen;

    /// <summary>A batch begins on this thread.</summary>
    public static void Begin() => t_isOpen = true;

    /// <summary>Puts work off to the end of this thread's batch.</summary>
    /// <returns>False when there is no batch: then it is to be done at once.</returns>
    public static bool TryPutOff(Action work)
    {
        if (!t_isOpen)
            return false;
        List<Action> putOff = t_putOff ??= [];
        if (putOff.Count == 0 || putOff[^1] != work)
            putOff.Add(work);
        return true;
    }

    /// <summary>Does what was put off, in order; it may put off more.</summary>
    public static void Flush()
    {
        if (t_putOff is not { Count: > 0 } putOff)
            return;
        while (t_next < putOff.Count)
            putOff[t_next++](); // which may come here again, and then goes on behind it
        putOff.Clear();
        t_next = 0;
    }

    /// <summary>The batch ends: what was put off is done.</summary>
    public static void End()
    {
        Flush();
        t_isOpen = false;
    }
}
