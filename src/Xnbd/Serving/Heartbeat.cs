using Microsoft.Extensions.Logging;
using Xnbd.Linux;
using Xnbd.Server;
using Xnbd.Storage;

namespace Xnbd.Programs.Serving;

/// <summary>
/// Tells the service manager from time to time what the server does, and that it lives. It lives if it can do what it
/// needs for every client and for its end: the thread of the signals takes a signal, each thread that accepts
/// connections responds, and the list of clients can be read. A disk that does not answer is no reason: a new process
/// could not do better.
/// <para>
/// A thread of its own does this, and ends with the process. <see cref="Begin"/> and <see cref="SignalTaken"/> are for
/// other threads.
/// </para>
/// </summary>
internal sealed class Heartbeat
{
    private static readonly TimeSpan s_statusTime = TimeSpan.FromSeconds(10);

    private readonly Supervision _supervision;
    private readonly ILogger _log;
    private readonly CancellationToken _stop;
    private readonly ManualResetEventSlim _signalTaken = new();
    private volatile NbdServer? _server;

    /// <summary>Starts the thread, if the service manager wants to be told something.</summary>
    /// <param name="supervision">The service manager.</param>
    /// <param name="log">Told when something does not respond.</param>
    /// <param name="stop">The server is to end: from then on its end is watched instead.</param>
    /// <exception cref="FailureException">There is no thread to spare.</exception>
    public Heartbeat(Supervision supervision, ILogger log, CancellationToken stop)
    {
        (_supervision, _log, _stop) = (supervision, log, stop);
        if (supervision.IsNotified && LinuxThread.TryStart("heartbeat", Run) is null)
            throw new FailureException("the system has no thread to spare");
    }

    /// <summary>The server accepts connections from now on.</summary>
    public void Begin(NbdServer server)
    {
        _server = server;
        TellStatus(server);
    }

    /// <summary>The thread of the signals has taken SIGALRM, which only this class sends.</summary>
    public void SignalTaken() => _signalTaken.Set();

    private void Run()
    {
        // At most a quarter of the watchdog's time passes until each part has responded.
        TimeSpan? limit = _supervision.Watchdog;
        TimeSpan period = limit / 2 is { } half && half < s_statusTime ? half : s_statusTime;
        TimeSpan maxResponse = (limit ?? TimeSpan.Zero) / 8;
        do
        {
            try
            {
                if (limit is not null && HasResponded(maxResponse))
                    _supervision.IsAlive();
                if (_server is { } server)
                    TellStatus(server);
            }
            catch (Exception failure)
            {
                // For example, memory is short. The service manager decides what to do if this goes on.
                _log.LogError("the service manager could not be told: {Cause}", failure.Message);
            }
        }
        while (!_stop.WaitHandle.WaitOne(period));
    }

    private bool HasResponded(TimeSpan maxTime)
    {
        _signalTaken.Reset();
        LinuxSignals.SendToSelf(LinuxSignals.Alarm);
        string? silent = !_signalTaken.Wait(maxTime) ? "the thread that takes signals"
            : _server?.Responds(maxTime) == false ? "a thread that accepts connections"
            : null;
        if (silent is not null && !_stop.IsCancellationRequested)
            _log.LogError("{Part} does not respond", silent);
        return silent is null;
    }

    private void TellStatus(NbdServer server)
    {
        ServerTraffic traffic = server.Traffic;
        _supervision.Status(
            $"{traffic.Connections} {(traffic.Connections == 1 ? "client" : "clients")}, "
            + $"{ByteCount.Describe(traffic.ReadBytes)} read, {ByteCount.Describe(traffic.WrittenBytes)} written");
    }
}
