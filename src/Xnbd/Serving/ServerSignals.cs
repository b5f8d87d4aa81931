using Xnbd.Linux;

namespace Xnbd.Programs.Serving;

/// <summary>The signals of the server programs. One thread takes them one after the other.</summary>
internal static class ServerSignals
{
    private static readonly int[] s_all =
    [
        LinuxSignals.Terminate, LinuxSignals.Interrupt, LinuxSignals.Hangup, LinuxSignals.User1, LinuxSignals.User2,
        LinuxSignals.Alarm,
    ];

    /// <summary>
    /// Blocks the signals in all threads, so that one of ours can take them. It must be called before anything waits.
    /// </summary>
    /// <returns>Those to be taken: not SIGINT if it was ignored, as in a shell's background job.</returns>
    public static int[] Block()
    {
        bool isIgnored = LinuxSignals.IsIgnored(LinuxSignals.Interrupt);
        int[] signals = [.. s_all.Where(signal => signal != LinuxSignals.Interrupt || !isIgnored)];
        LinuxSignals.BlockInAllThreads(signals);
        return signals;
    }

    /// <summary>Takes signals until the process ends. For a thread of its own.</summary>
    /// <param name="signals">Those that <see cref="Block"/> has blocked.</param>
    /// <param name="carryOut">Carries one out; it throws nothing.</param>
    public static void Run(int[] signals, Action<int> carryOut)
    {
        while (true)
            carryOut(LinuxSignals.Wait(signals));
    }
}
