using System.Net;
using System.Net.Sockets;
using Microsoft.Extensions.Logging;
using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;
using Xnbd.Server;
using Xnbd.Storage;
using Xnbd.Storage.Images;
using Xnbd.Storage.Layers;

namespace Xnbd.Programs;

/// <summary>The program <c>xnbd-server</c>: composes a disk, serves it, and minds the signals.</summary>
internal sealed class ServerProgram
{
    /// <summary>The program's name.</summary>
    public const string Name = "xnbd-server";

    /// <summary>The server ends this long after it was told to, whatever is still under way.</summary>
    private static readonly TimeSpan s_longestStop = TimeSpan.FromSeconds(8.5); // and a second for the log

    /// <summary>
    /// The same while it is starting, and may be waiting for a remote: nobody is served yet, and nothing is lost.
    /// </summary>
    private static readonly TimeSpan s_longestBreak = TimeSpan.FromSeconds(1);

    private readonly ServerOptions _options;
    private readonly LogOutput _log;
    private readonly CancellationTokenSource _stop = new();
    private volatile PidFile? _pidFile;
    private volatile ProxyMode? _proxy; // null until it is open, and in the other modes
    private volatile SnapshotSignal? _snapshots; // null until the disk is open
    private volatile Thread? _switching; // the last switch by SIGUSR2
    private volatile Disk? _disk; // null until it is open
    private volatile bool _isServing;
    private volatile bool _isSynced;

    private ServerProgram(ServerOptions options, LogOutput log)
    {
        _options = options;
        _log = log;
    }

    private static readonly int[] s_signals =
        [LinuxSignals.Terminate, LinuxSignals.Interrupt, LinuxSignals.Hangup, LinuxSignals.User1, LinuxSignals.User2];

    /// <summary>Runs the program.</summary>
    /// <returns>Its exit code.</returns>
    public static int Run(string[] args)
    {
        bool isDaemon = Daemon.IsChild();
        bool isInetd = args.Contains("--inetd");
        if (isInetd)
            KeepStdinClean(); // before the first word can be said
        LogOutput? log = null;
        try
        {
            if (ServerOptions.Parse(args) is not { } options)
                return ExitCode.Success;
            if (options.Daemonize && !isDaemon)
                return Daemon.Start(Name, args);
            bool isIgnored = LinuxSignals.IsIgnored(LinuxSignals.Interrupt); // in a shell's background job
            int[] signals = [.. s_signals.Where(signal => signal != LinuxSignals.Interrupt || !isIgnored)];
            LinuxSignals.BlockInAllThreads(signals); // before anything waits
            options = options with
            {
                Image = Path.GetFullPath(options.Image),
                LogPath = options.LogPath is null ? null : Path.GetFullPath(options.LogPath),
                UnixPath = options.UnixPath is null ? null : Path.GetFullPath(options.UnixPath),
                PidFile = options.PidFile is null ? null : Path.GetFullPath(options.PidFile),
                CowDirectory = options.CowDirectory is null ? null : Path.GetFullPath(options.CowDirectory),
                CowLayers = [.. options.CowLayers.Select(Path.GetFullPath)],
            };
            bool isDetached = options.Daemonize || options.Inetd;
            bool isElsewhere = options.LogPath is not null || options.Syslog;
            var output = new LogOutput(
                Name, toStderr: !isDetached && !isElsewhere, options.LogPath, toSyslog: options.Syslog || (isDetached && !isElsewhere));
            output.Open();
            log = output;
            new ServerProgram(options, log).Serve(signals);
            return ExitCode.Success;
        }
        catch (UsageException failure)
        {
            Report(failure.Message, log, isInetd);
            StandardError.WriteLine($"Try '{Name} --help' for more information.");
            return ExitCode.Usage;
        }
        catch (Exception failure) when (failure is FailureException or DiskException)
        {
            Report(Advice.Describe(failure), log, isInetd);
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

    /// <summary>Says why the program ends: to stderr, and to where the log goes if that is elsewhere.</summary>
    private static void Report(string message, LogOutput? log, bool isInetd)
    {
        StandardError.WriteLine($"{Name}: {message}");
        if (log is { IsElsewhere: true })
        {
            log.LogError("{Cause}", message);
        }
        else if (isInetd)
        {
            LinuxSyslog.Open(Name); // a super-server shows stderr to nobody
            LinuxSyslog.Write(SyslogSeverity.Error, message);
        }
    }

    /// <summary>
    /// An Internet super-server makes the connection stdout and stderr as well: a message there would corrupt the stream.
    /// </summary>
    private static void KeepStdinClean()
    {
        using var stdin = new SafeFileHandle(0, ownsHandle: false);
        _ = LinuxFile.Status(stdin, out FileStatus connection);
        foreach (int descriptor in (ReadOnlySpan<int>)[1, 2])
        {
            using var other = new SafeFileHandle(descriptor, ownsHandle: false);
            if (LinuxFile.Status(other, out FileStatus status) != Errno.None || status.IsSameFile(connection))
                LinuxProcess.RedirectToNull(descriptor);
        }
    }

    private void Serve(int[] signals)
    {
        LinuxDescriptors.RaiseLimit();
        var runtimeThreads = new RuntimeThreads(); // before the first socket
        StartThread("signals", () => MindSignals(signals));
        StartThread("end", WatchEnd);
        using PidFile? pidFile = _options.PidFile is null ? null : PidFile.Open(_options.PidFile);
        _pidFile = pidFile;
        using ProxyMode? proxy = _options.Proxy is null ? null
            : new ProxyMode(_options.Proxy, _options.ReadOnly, _log, _stop.Token);
        using Disk? own = proxy is null ? OpenDisk() : null;
        Disk disk = proxy?.Disk ?? own!;
        _disk = disk;
        var exports = new ExportTable(
            new Export(_options.ExportName, Path.GetFileName(_options.Image), disk, CanMultiConn));
        var style = _options.ConnectedDescriptor is not null ? HandshakeStyle.None
            : _options.Oldstyle ? HandshakeStyle.Oldstyle : HandshakeStyle.FixedNewstyle;
        var server = new NbdServer(exports, style, _log, _options.Proxy?.ClientLimits);
        var snapshots = new SnapshotSignal(() => proxy is null ? disk as ImageFile : proxy.Image, _log, _stop.Token);
        _snapshots = snapshots;
        if (proxy is not null)
        {
            proxy.CountClients = () => server.ConnectionCount;
            proxy.StartControl();
        }

        _proxy = proxy;
        _isServing = true;
        try
        {
            Start(server, disk, runtimeThreads);
        }
        catch (FailureException)
        {
            server.Stop(); // the first of two sockets may be open already
            throw;
        }

        _stop.Token.WaitHandle.WaitOne();
        End(server, proxy is null ? () => disk.FlushAsync().AsTask() : proxy.FlushAll, snapshots);
    }

    /// <summary>Opens the server to clients, or to the one that was handed over.</summary>
    private void Start(NbdServer server, Disk disk, RuntimeThreads runtimeThreads)
    {
        Socket? connection = OpenConnection();
        if (connection is null)
            OpenListeners(server);
        _log.LogInformation(
            "serving '{Image}'{Layers}, {Length} bytes, {Access}",
            _options.Image,
            _options.Proxy is { } from ? $", a cache of {from.Remote}" : string.Concat(_options.CowLayers.Select(path => $" + '{path}'")),
            disk.Length,
            _options.ReadOnly ? "read-only" : _options.CowTarget && _options.CowLayers.Count == 0 ? "changes go when the server ends" : "read-write");
        runtimeThreads.WaitUntilStarted(); // clients that have connected by now wait a moment
        if (connection is not null)
        {
            StartThread("session", () =>
            {
                server.Serve(connection);
                _stop.Cancel();
            });
        }

        try
        {
            server.Start();
        }
        catch (IOException failure)
        {
            throw new FailureException(failure.Message);
        }

        _pidFile?.Write();
        if (_options.Daemonize)
            Daemon.SayReady();
    }

    private static void StartThread(string name, Action work)
    {
        if (LinuxThread.TryStart(name, work) is null)
            throw new FailureException("the system has no thread to spare");
    }

    /// <summary>
    /// Whether what is promised for several connections of one client holds. A server of one connection does not have
    /// the others: other processes of this program do. They write one file in the target mode, whose page cache all
    /// processes share, and which a sync by one of them makes durable for all. In the other modes each has a layer of
    /// its own, or is refused.
    /// </summary>
    private bool CanMultiConn => !_options.IsOneConnection || (!_options.CowTarget && _options.Proxy is null);

    /// <summary>Opens what is served, and warns of what the user may not have meant.</summary>
    private Disk OpenDisk()
    {
        Disk disk = ComposeDisk();
        if (_options.Format is null && LayerStack.ImageOf(disk) is { } image)
        {
            if (image.Length == 0)
            {
                _log.LogWarning(
                    "'{Image}' is empty: clients see a disk of 0 bytes (if that is meant: --format raw)",
                    _options.Image);
            }
            else if (ImageFormat.Find(image) is { } format)
            {
                _log.LogWarning(
                    "'{Image}' looks like {Article} {Format} image; it is served as raw bytes "
                        + "(if that is meant: --format raw)",
                    _options.Image,
                    format[0] is 'x' ? "an" : "a",
                    format);
            }
        }

        return disk;
    }

    /// <summary>Composes what is served: the modes of the server are here.</summary>
    private Disk ComposeDisk()
    {
        if (_options.CowLayers.Count > 0)
        {
            return LayerStack.OpenKept(
                _options.Image, _options.CowLayers, _options.ReadOnly, _options.Force, what => _log.LogWarning("{What}; used all the same, as --force says", what));
        }

        if (_options.CowTarget)
        {
            return LayerStack.OpenDisposable(
                _options.Image,
                _options.CowDirectory,
                _options.ReadOnly,
                path => _log.LogWarning("removed a layer that a killed server left: {Path}", path));
        }

        ImageFile image = OpenTarget();
        foreach (string abandoned in _options.ReadOnly ? [] : image.RemoveAbandonedSnapshots())
            _log.LogWarning("removed an unfinished snapshot that a killed server left: {Path}", abandoned);
        return image;
    }

    private ImageFile OpenTarget()
    {
        bool isShared = _options.ShareImage || _options.IsOneConnection;
        try
        {
            return ImageFile.Open(_options.Image, _options.ReadOnly, isShared ? ImageUse.Shared : ImageUse.OnlyWriter);
        }
        catch (InUseException failure) when (failure.Conflict == UseConflict.AnotherWriter)
        {
            throw new FailureException(
                failure.Message
                + "; servers that are meant to write one image together need --share-image, each of them");
        }
    }

    private void End(NbdServer server, Func<Task> sync, SnapshotSignal snapshots)
    {
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
        snapshots.WaitUntilEnded();
        _switching?.Join(); // it uses the disk; WatchEnd bounds all of this
        _log.LogInformation("ended");
    }

    /// <summary>
    /// Ends the process when that takes too long, or when it is told to end amid its start. A thread of its own from
    /// the start on: at the end the system might have none to give.
    /// </summary>
    private void WatchEnd()
    {
        _stop.Token.WaitHandle.WaitOne();
        long start = Environment.TickCount64;
        Thread.Sleep(s_longestBreak);
        bool wasServing = _isServing;
        if (wasServing)
            Thread.Sleep(s_longestStop - TimeSpan.FromMilliseconds(Environment.TickCount64 - start));
        _log.LogWarning(!wasServing ? "ended amid the start"
            : _isSynced ? "not everything ended in time"
            : "the image was not synced in time; the kernel goes on writing what it holds of it");
        _log.Close();
        if (_disk is { } disk)
            LayerStack.Abandon(disk);
        _pidFile?.Dispose();
        Environment.Exit(_isSynced || !wasServing ? ExitCode.Success : ExitCode.Failure);
    }

    /// <summary>Takes signals, one after the other, from before the disk is opened until the process ends.</summary>
    private void MindSignals(int[] signals)
    {
        while (true)
        {
            int signal = LinuxSignals.Wait(signals);
            try
            {
                Mind(signal);
            }
            catch (Exception failure)
            {
                _log.LogError("a signal could not be carried out: {Cause}", failure.ToString()); // service goes on
            }
        }
    }

    private void Mind(int signal)
    {
        if (signal == LinuxSignals.Hangup)
            _log.Reopen(); // SIGHUP
        else if (signal is LinuxSignals.Terminate or LinuxSignals.Interrupt)
            _stop.Cancel(); // SIGTERM, SIGINT
        else if (_stop.IsCancellationRequested)
            _log.LogInformation("the server ends: the signal is ignored");
        else if (!_isServing)
            _log.LogInformation("the server is starting: the signal is ignored");
        else if (signal == LinuxSignals.User1)
            _snapshots!.Take(); // SIGUSR1
        else
            SwitchBySignal(); // SIGUSR2
    }

    /// <summary>Starts a switch, since it may take a while.</summary>
    private void SwitchBySignal()
    {
        if (_proxy is not { } proxy)
            _log.LogInformation("SIGUSR2 has no meaning in this mode");
        else if (_switching is { IsAlive: true })
            _log.LogWarning("it is being switched already; the signal is ignored");
        else if ((_switching = LinuxThread.TryStart("switch", () => Switch(proxy))) is null)
            _log.LogError("not switched: the system has no thread to spare");
    }

    private void Switch(ProxyMode proxy)
    {
        try
        {
            proxy.SwitchBySignal();
        }
        catch (Exception failure)
        {
            _log.LogError("not switched: {Cause}", failure.ToString()); // service goes on
        }
    }

    /// <summary>The connection that was handed over; null when the server is to listen.</summary>
    private Socket? OpenConnection()
    {
        if (!_options.Inetd && _options.ConnectedDescriptor is null)
            return null;
        int number = _options.ConnectedDescriptor ?? 0;
        string name = _options.Inetd ? "stdin" : $"descriptor {number}";
        var handle = new SafeSocketHandle(number, ownsHandle: true);
        if (LinuxFile.Status(handle, out FileStatus status) != Errno.None)
            throw new FailureException($"{name} is not open");
        if (status.Kind != FileKind.Socket)
            throw new FailureException($"{name} is not a socket");
        _ = LinuxSocket.SetBlocking(handle);
        try
        {
            return new Socket(handle);
        }
        catch (SocketException failure)
        {
            throw new FailureException($"{name} cannot be used: {failure.Message}");
        }
    }

    private void OpenListeners(NbdServer server)
    {
        if (_options.UnixPath is { } path)
        {
            try
            {
                server.Listen(path);
            }
            catch (Exception failure) when (failure is IOException or ArgumentException)
            {
                throw new FailureException($"cannot listen on '{path}': {failure.Message}");
            }
        }

        if (_options.UnixPath is not null && _options.Port is null && _options.Address is null)
            return;
        int port = _options.Port ?? ServerOptions.DefaultPort;
        string place = _options.Address is null ? $"port {port}" : $"address {_options.Address}, port {port}";
        try
        {
            server.Listen(new IPEndPoint(Resolve(_options.Address), port));
        }
        catch (Exception failure) when (failure is SocketException or ArgumentException)
        {
            throw new FailureException($"cannot listen on {place}: {failure.Message}");
        }
    }

    private static IPAddress Resolve(string? address)
    {
        if (address is null)
            return IPAddress.IPv6Any;
        if (IPAddress.TryParse(address, out IPAddress? parsed))
            return parsed;
        IPAddress[] found = Dns.GetHostAddresses(address);
        return found.Length > 0 ? found[0] : throw new ArgumentException("the name has no address");
    }
}
