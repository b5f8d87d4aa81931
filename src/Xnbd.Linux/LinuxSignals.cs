namespace Xnbd.Linux;

/// <summary>
/// Signals for which one thread waits, instead of handlers. A signal that all threads block stays pending until that
/// thread takes it. So from <see cref="BlockInAllThreads"/> on no signal is lost or ends the process, and taking one
/// needs no further thread. (The runtime's own handling starts a thread for each SIGINT. If there is none, the process
/// ends.)
/// </summary>
public static unsafe class LinuxSignals
{
    /// <summary>SIGHUP.</summary>
    public const int Hangup = 1;

    /// <summary>SIGINT.</summary>
    public const int Interrupt = 2;

    /// <summary>SIGUSR1.</summary>
    public const int User1 = 10;

    /// <summary>SIGUSR2.</summary>
    public const int User2 = 12;

    /// <summary>SIGALRM.</summary>
    public const int Alarm = 14;

    /// <summary>SIGTERM.</summary>
    public const int Terminate = 15;

    /// <summary>
    /// Blocks signals. It must be called at the start of the program, on its first thread: threads and child processes
    /// inherit the blocked signals from the thread that starts them.
    /// </summary>
    public static void BlockInAllThreads(params ReadOnlySpan<int> signals)
    {
        LibC.SignalSet set = SetOf(signals);
        Block(set);

        // One thread is older than the program: the one that runs finalizers.
        MakeGarbage(set);
        GC.Collect();
        GC.WaitForPendingFinalizers();
    }

    /// <summary>
    /// Whether a signal was ignored when this process was started, as SIGINT is in a shell's background job.
    /// </summary>
    public static bool IsIgnored(int signal)
    {
        const string line = "SigIgn:\t";
        string? ignored = File.ReadLines("/proc/self/status")
            .FirstOrDefault(l => l.StartsWith(line, StringComparison.Ordinal));
        return ignored is not null && (Convert.ToUInt64(ignored[line.Length..], 16) & BitOf(signal)) != 0;
    }

    /// <summary>Waits for one of several blocked signals.</summary>
    /// <returns>Its number.</returns>
    public static int Wait(params ReadOnlySpan<int> signals)
    {
        LibC.SignalSet set = SetOf(signals);
        int signal;
        do
        {
            signal = LibC.SigWaitInfo(&set, null);
        }
        while (signal < 0);
        return signal;
    }

    /// <summary>Sends a signal to this process.</summary>
    public static void SendToSelf(int signal) => _ = LibC.Kill(Environment.ProcessId, signal);

    private static ulong BitOf(int signal) => 1UL << (signal - 1);

    private static LibC.SignalSet SetOf(ReadOnlySpan<int> signals)
    {
        var set = default(LibC.SignalSet);
        foreach (int signal in signals)
            set.First |= BitOf(signal);
        return set;
    }

    private static void Block(LibC.SignalSet set)
    {
        const int block = 0; // SIG_BLOCK
        _ = LibC.SigProcMask(block, &set, null); // on Linux it applies to the calling thread
    }

    [System.Runtime.CompilerServices.MethodImpl(System.Runtime.CompilerServices.MethodImplOptions.NoInlining)]
    private static void MakeGarbage(LibC.SignalSet set) => _ = new Blocker(set);

    /// <summary>Blocks signals in the thread that runs finalizers.</summary>
    private sealed class Blocker(LibC.SignalSet set)
    {
        ~Blocker() => Block(set);
    }
}
