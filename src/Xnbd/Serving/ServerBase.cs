using Microsoft.Extensions.Logging;
using Xnbd.Linux;
using Xnbd.Server;
using Xnbd.Storage;

namespace Xnbd.Programs.Serving;

/// <summary>
/// What the server programs have in common: log, pid file, signals, daemon, sockets, and an end that never takes long.
/// <para>
/// The states: starting (nobody is served; it can be ended at any moment), serving, ending. A thread takes the signals
/// and another one watches the end, both from the start, since the system might refuse a thread later.
/// </para>
/// </summary>
/// <param name="options">What all servers are told.</param>
/// <param name="log">The log, which is open.</param>
internal abstract class ServerBase(ListenOptions options, LogOutput log)
{
    /// <summary>The server ends at most this time after it was told to, whatever is still under way.</summary>
    private static readonly TimeSpan s_maxStop = TimeSpan.FromSeconds(8.5); // and a second for the log

    /// <summary>
    /// The same while the server is starting, and may wait for a remote: nobody is served yet, and nothing is lost.
    /// </summary>
    private static readonly TimeSpan s_maxBreak = TimeSpan.FromSeconds(1);

    private readonly CancellationTokenSource _stop = new();
    private volatile PidFile? _pidFile;
    private volatile bool _isServing;
    private volatile bool _isSynced;
    private Supervision _supervision = null!; // there before the first thread is started
    private volatile Heartbeat? _heartbeat;

    /// <summary>Receives log messages.</summary>
    protected LogOutput Log => log;

    /// <summary>Cancelled when the server is to end.</summary>
    protected CancellationToken Stopping => _stop.Token;

    /// <summary>Opens the log and serves until the server is told to end.</summary>
    /// <typeparam name="T">The options of the program.</typeparam>
    /// <param name="name">The program's name.</param>
    /// <param name="args">Its arguments.</param>
    /// <param name="parse">Reads them; null when help or version was asked for, and printed.</param>
    /// <param name="create">Makes the server.</param>
    /// <returns>The exit code.</returns>
    public static int Run<T>(
        string name, string[] args, Func<string[], T?> parse, Func<T, LogOutput, ServerBase> create)
        where T : ListenOptions
    {
        bool isDaemon = Daemon.IsChild(name);
        bool isInetd = args.Contains("--inetd");
        if (isInetd)
            ServerSockets.KeepStdinClean(); // before any message
        LogOutput? log = null;
        try
        {
            if (parse(args) is not { } options)
                return ExitCode.Success;
            Supervision supervision = Supervision.Take();
            if (!isDaemon)
                supervision.Validate(options);
            if (options.Daemonize && !isDaemon)
                return Daemon.Start(name, args);
            int[] signals = ServerSignals.Block(); // before anything waits
            bool isDetached = options.Daemonize || options.Inetd;
            bool isElsewhere = options.LogPath is not null || options.Syslog;
            var output = new LogOutput(
                name,
                toStderr: !isDetached && !isElsewhere,
                options.LogPath,
                toSyslog: options.Syslog || (isDetached && !isElsewhere));
            output.Open();
            log = output;
            create(options, log).Serve(signals, supervision);
            return ExitCode.Success;
        }
        catch (UsageException failure)
        {
            Report(name, failure.Message, log, isInetd);
            StandardError.WriteLine($"Try '{name} --help' for more information.");
            return ExitCode.Usage;
        }
        catch (Exception failure) when (failure is FailureException or DiskException)
        {
            Report(name, Advice.Describe(failure), log, isInetd);
            return ExitCode.Failure;
        }
        catch (OperationCanceledException)
        {
            log!.LogInformation("ended before anybody was served");
            return ExitCode.Success;
        }
        finally
        {
            log?.Close();
        }
    }

    /// <summary>
    /// Opens the disks and the server, calls <see cref="BeginService"/>, <see cref="Listen"/> and
    /// <see cref="WaitForEnd"/>, and closes all.
    /// </summary>
    protected abstract void Serve();

    /// <summary>Carries out SIGUSR1; on the signals' thread, while clients are served.</summary>
    protected abstract void OnUser1();

    /// <summary>Carries out SIGUSR2; likewise.</summary>
    protected abstract void OnUser2();

    /// <summary>
    /// Carries out SIGHUP, after the log was opened again; likewise. What takes longer than a few seconds needs a
    /// thread of its own: the service manager's watchdog waits for the signals' thread.
    /// </summary>
    protected virtual void OnHangup()
    {
    }

    /// <summary>Removes what must not stay, while operations may be under way. The process ends at once.</summary>
    protected abstract void Abandon();

    /// <summary>Clients can be served, so that signals can be carried out.</summary>
    protected void BeginService() => _isServing = true;

    /// <summary>Opens the server's sockets, and starts it.</summary>
    /// <param name="server">The server.</param>
    /// <param name="runtimeThreads">Threads that must be there before a client is served.</param>
    /// <param name="opened">Called when the sockets are open.</param>
    /// <exception cref="FailureException">A socket cannot be opened; nothing is left open.</exception>
    protected void Listen(NbdServer server, RuntimeThreads runtimeThreads, Action opened)
    {
        try
        {
            var sockets = new ServerSockets(options, _supervision);
            System.Net.Sockets.Socket? connection = sockets.OpenConnection();
            if (connection is null)
                sockets.OpenListeners(server);
            opened();
            runtimeThreads.WaitUntilStarted(); // clients that have already connected wait a moment
            if (connection is not null)
            {
                StartThread("session", () =>
                {
                    server.Serve(connection);
                    Stop();
                });
            }

            server.Start();
            _pidFile?.Write();
            if (options.Daemonize)
                Daemon.SayReady();
            _supervision.Ready();
            _heartbeat!.Begin(server);
        }
        catch (Exception failure) when (failure is FailureException or IOException)
        {
            server.Stop(); // the first of two sockets may already be open
            throw new FailureException(failure.Message);
        }
    }

    /// <summary>Serves until the server is told to end; then ends all sessions, and makes all durable.</summary>
    /// <param name="server">The server.</param>
    /// <param name="sync">Makes all durable.</param>
    /// <param name="waitUntilEnded">Waits for what else uses the disks.</param>
    /// <exception cref="FailureException">The sync has failed.</exception>
    protected void WaitForEnd(NbdServer server, Func<Task> sync, Action waitUntilEnded)
    {
        _stop.Token.WaitHandle.WaitOne();
        server.Stop();
        try
        {
            sync().GetAwaiter().GetResult();
        }
        catch (DiskException failure)
        {
            throw new FailureException($"the image could not be synced: {failure.Message}");
        }

        _isSynced = true;
        waitUntilEnded(); // WatchEnd bounds all of this
        log.LogInformation("ended");
    }

    /// <summary>Ends the server, as SIGTERM does.</summary>
    protected void Stop()
    {
        _supervision.Ending();
        _stop.Cancel();
    }

    /// <summary>Reports why the program ends: on stderr, and in the log if that is elsewhere.</summary>
    private static void Report(string name, string message, LogOutput? log, bool isInetd)
    {
        StandardError.WriteLine($"{name}: {message}");
        if (log is { IsElsewhere: true })
        {
            log.LogError("{Cause}", message);
        }
        else if (isInetd)
        {
            LinuxSyslog.Open(name); // nobody sees the stderr of a super-server
            LinuxSyslog.Write(SyslogSeverity.Error, message);
        }
    }

    private static void StartThread(string threadName, Action work)
    {
        if (LinuxThread.TryStart(threadName, work) is null)
            throw new FailureException("the system has no thread to spare");
    }

    private void Serve(int[] signals, Supervision supervision)
    {
        _supervision = supervision;
        LinuxDescriptors.RaiseLimit();
        StartThread("signals", () => ServerSignals.Run(signals, CarryOut));
        StartThread("end", WatchEnd);
        _heartbeat = new Heartbeat(_supervision, log, Stopping);
        using PidFile? pidFile = options.PidFile is null ? null : PidFile.Open(options.PidFile);
        _pidFile = pidFile;
        Serve();
    }

    private void CarryOut(int signal)
    {
        try
        {
            if (signal == LinuxSignals.Hangup)
                log.Reopen(); // SIGHUP
            if (signal == LinuxSignals.Alarm)
                _heartbeat?.SignalTaken(); // SIGALRM
            else if (signal is LinuxSignals.Terminate or LinuxSignals.Interrupt)
                Stop(); // SIGTERM, SIGINT
            else if (_stop.IsCancellationRequested)
                log.LogInformation("the server ends: the signal is ignored");
            else if (!_isServing)
                log.LogInformation("the server is starting: the signal is ignored");
            else if (signal == LinuxSignals.Hangup)
                Reload();
            else if (signal == LinuxSignals.User1)
                OnUser1(); // SIGUSR1
            else
                OnUser2(); // SIGUSR2
        }
        catch (Exception failure)
        {
            log.LogError("a signal could not be carried out: {Cause}", failure.ToString()); // service goes on
        }
    }

    private void Reload()
    {
        _supervision.Reloading();
        try
        {
            OnHangup();
        }
        finally
        {
            _supervision.Ready(); // also after a failure, which the log tells: service goes on
        }
    }

    /// <summary>
    /// Ends the process if its end takes too long, or if it is told to end while it is starting. This runs on its own
    /// thread from the start, since the system might refuse one at the end.
    /// </summary>
    private void WatchEnd()
    {
        _stop.Token.WaitHandle.WaitOne();
        long start = Environment.TickCount64;
        Thread.Sleep(s_maxBreak);
        bool wasServing = _isServing;
        if (wasServing)
            Thread.Sleep(s_maxStop - TimeSpan.FromMilliseconds(Environment.TickCount64 - start));
        log.LogWarning(!wasServing ? "ended during the start"
            : _isSynced ? "not everything ended in time"
            : "the image was not synced in time; the kernel goes on writing what it holds of it");
        log.Close();
        Abandon();
        _pidFile?.Dispose();
        Environment.Exit(_isSynced || !wasServing ? ExitCode.Success : ExitCode.Failure);
    }
}
