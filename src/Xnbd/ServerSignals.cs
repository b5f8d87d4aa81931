using Microsoft.Extensions.Logging;
using Xnbd.Linux;

namespace Xnbd.Programs;

/// <summary>
/// The signals of <c>xnbd-server</c>. One thread takes them one after the other, from before the disk is opened until
/// the process ends. SIGUSR1 and SIGUSR2 are carried out while clients are served, and ignored before and after.
/// </summary>
/// <param name="log">For what becomes of them; SIGHUP opens it anew.</param>
/// <param name="stop">SIGTERM and SIGINT cancel it.</param>
internal sealed class ServerSignals(LogOutput log, CancellationTokenSource stop)
{
    private static readonly int[] s_all =
        [LinuxSignals.Terminate, LinuxSignals.Interrupt, LinuxSignals.Hangup, LinuxSignals.User1, LinuxSignals.User2];

    private volatile ServedParts? _served;
    private volatile Thread? _switching; // the last switch by SIGUSR2

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
    public void Run(int[] signals)
    {
        while (true)
        {
            int signal = LinuxSignals.Wait(signals);
            try
            {
                CarryOut(signal);
            }
            catch (Exception failure)
            {
                log.LogError("a signal could not be carried out: {Cause}", failure.ToString()); // service goes on
            }
        }
    }

    /// <summary>Clients are served from now on.</summary>
    /// <param name="snapshots">Takes the snapshots.</param>
    /// <param name="proxy">The proxy to be switched; null in the other modes.</param>
    public void BeginService(SnapshotSignal snapshots, ProxyMode? proxy) => _served = new ServedParts(snapshots, proxy);

    /// <summary>Waits until no snapshot and no switch is under way: both use the disk.</summary>
    public void WaitUntilEnded()
    {
        _served?.Snapshots.WaitUntilEnded();
        _switching?.Join();
    }

    private void CarryOut(int signal)
    {
        if (signal == LinuxSignals.Hangup)
            log.Reopen(); // SIGHUP
        else if (signal is LinuxSignals.Terminate or LinuxSignals.Interrupt)
            stop.Cancel(); // SIGTERM, SIGINT
        else if (stop.IsCancellationRequested)
            log.LogInformation("the server ends: the signal is ignored");
        else if (_served is not { } served)
            log.LogInformation("the server is starting: the signal is ignored");
        else if (signal == LinuxSignals.User1)
            served.Snapshots.Take(); // SIGUSR1
        else
            SwitchBySignal(served.Proxy); // SIGUSR2
    }

    /// <summary>Starts a switch on a thread of its own, since it may take a while.</summary>
    private void SwitchBySignal(ProxyMode? proxy)
    {
        if (proxy is null)
            log.LogInformation("SIGUSR2 has no meaning in this mode");
        else if (_switching is { IsAlive: true })
            log.LogWarning("it is being switched already; the signal is ignored");
        else if ((_switching = LinuxThread.TryStart("switch", proxy.SwitchBySignal)) is null)
            log.LogError("not switched: the system has no thread to spare");
    }

    private sealed record ServedParts(SnapshotSignal Snapshots, ProxyMode? Proxy);
}
