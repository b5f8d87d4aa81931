namespace Xnbd.Linux;

/// <summary>The process itself: its session and its name.</summary>
public static class LinuxProcess
{
    /// <summary>Identifies the time since the machine was started last.</summary>
    public static Guid BootId { get; } = Guid.Parse(File.ReadAllText("/proc/sys/kernel/random/boot_id").Trim());

    /// <summary>Leaves the session of the terminal that started this process.</summary>
    public static Errno StartSession() => LibC.Outcome(LibC.SetSid());

    /// <summary>
    /// Ends this process as SIGTERM does when the thread that has started it ends, or no more. It does not hold if that
    /// thread has ended already.
    /// </summary>
    public static unsafe void EndWithParent(bool isWanted)
    {
        const int setParentDeathSignal = 1, terminate = 15; // PR_SET_PDEATHSIG, SIGTERM
        _ = LibC.PrCtl(setParentDeathSignal, (byte*)(nint)(isWanted ? terminate : 0), 0, 0, 0);
    }

    /// <summary>The id of the process that has started this one; another one's if that has ended.</summary>
    public static int ParentId => LibC.GetParentId();

    /// <summary>
    /// Stops the process as Ctrl-Z does, until it is continued. If nobody could continue it, nothing happens, as with
    /// Ctrl-Z.
    /// </summary>
    public static unsafe void Stop()
    {
        const int stop = 20; // SIGTSTP
        const int actionBytes = 256; // more than any C library's struct sigaction; all zeroes mean the default
        byte* byDefault = stackalloc byte[actionBytes], before = stackalloc byte[actionBytes];
        new Span<byte>(byDefault, actionBytes).Clear();
        if (LibC.SigAction(stop, byDefault, before) != 0)
            return;
        _ = LibC.Raise(stop);
        _ = LibC.SigAction(stop, before, null);
    }

    /// <summary>
    /// Sets the process's name, by which <c>pidof</c> and <c>ps</c> find it; the kernel keeps 15 bytes. It must be
    /// called on the first thread.
    /// </summary>
    public static unsafe void SetName(string name)
    {
        const int setName = 15; // PR_SET_NAME
        byte[] text = [.. System.Text.Encoding.UTF8.GetBytes(name), 0];
        fixed (byte* start = text)
            _ = LibC.PrCtl(setName, start, 0, 0, 0);
    }
}
