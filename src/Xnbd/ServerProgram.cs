using System.Net.Sockets;
using Microsoft.Extensions.Logging;
using Xnbd.Linux;
using Xnbd.Server;
using Xnbd.Storage;
using Xnbd.Storage.Access;
using Xnbd.Storage.Images;
using Xnbd.Storage.Layers;

namespace Xnbd.Programs;

/// <summary>The program <c>xnbd-server</c>: composes a disk and serves it.</summary>
internal sealed class ServerProgram
{
    /// <summary>The program's name.</summary>
    public const string Name = "xnbd-server";

    /// <summary>The server ends at most this time after it was told to, whatever is still under way.</summary>
    private static readonly TimeSpan s_maxStop = TimeSpan.FromSeconds(8.5); // and a second for the log

    /// <summary>
    /// The same while the server is starting, and may wait for a remote: nobody is served yet, and nothing is lost.
    /// </summary>
    private static readonly TimeSpan s_maxBreak = TimeSpan.FromSeconds(1);

    private readonly ServerOptions _options;
    private readonly LogOutput _log;
    private readonly CancellationTokenSource _stop = new();
    private readonly ServerSignals _signals;
    private readonly ServerSockets _sockets;
    private volatile PidFile? _pidFile;
    private volatile Disk? _disk; // null until it is open
    private volatile bool _isServing;
    private volatile bool _isSynced;

    private ServerProgram(ServerOptions options, LogOutput log)
    {
        _options = options;
        _log = log;
        _signals = new ServerSignals(log, _stop);
        _sockets = new ServerSockets(options);
    }

    /// <summary>Runs the program.</summary>
    /// <returns>Its exit code.</returns>
    public static int Run(string[] args)
    {
        bool isDaemon = Daemon.IsChild();
        bool isInetd = args.Contains("--inetd");
        if (isInetd)
            ServerSockets.KeepStdinClean(); // before any message
        LogOutput? log = null;
        try
        {
            if (ServerCommandLine.Parse(args) is not { } options)
                return ExitCode.Success;
            if (options.Daemonize && !isDaemon)
                return Daemon.Start(Name, args);
            int[] signals = ServerSignals.Block(); // before anything waits
            options = options with
            {
                Image = Path.GetFullPath(options.Image),
                LogPath = options.LogPath is null ? null : Path.GetFullPath(options.LogPath),
                UnixPath = options.UnixPath is null ? null : Path.GetFullPath(options.UnixPath),
                PidFile = options.PidFile is null ? null : Path.GetFullPath(options.PidFile),
                RecordPath = options.RecordPath is null ? null : Path.GetFullPath(options.RecordPath),
                CowDirectory = options.CowDirectory is null ? null : Path.GetFullPath(options.CowDirectory),
                CowLayers = [.. options.CowLayers.Select(Path.GetFullPath)],
            };
            bool isDetached = options.Daemonize || options.Inetd;
            bool isElsewhere = options.LogPath is not null || options.Syslog;
            var output = new LogOutput(
                Name,
                toStderr: !isDetached && !isElsewhere,
                options.LogPath,
                toSyslog: options.Syslog || (isDetached && !isElsewhere));
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

    /// <summary>Reports why the program ends: on stderr, and in the log if that is elsewhere.</summary>
    private static void Report(string message, LogOutput? log, bool isInetd)
    {
        StandardError.WriteLine($"{Name}: {message}");
        if (log is { IsElsewhere: true })
        {
            log.LogError("{Cause}", message);
        }
        else if (isInetd)
        {
            LinuxSyslog.Open(Name); // nobody sees the stderr of a super-server
            LinuxSyslog.Write(SyslogSeverity.Error, message);
        }
    }

    private void Serve(int[] signals)
    {
        LinuxDescriptors.RaiseLimit();
        var runtimeThreads = new RuntimeThreads(); // before the first socket
        StartThread("signals", () => _signals.Run(signals));
        StartThread("end", WatchEnd);
        using PidFile? pidFile = _options.PidFile is null ? null : PidFile.Open(_options.PidFile);
        _pidFile = pidFile;
        using ProxyMode? proxy = _options.Proxy is null ? null
            : new ProxyMode(_options.Proxy, _options.ReadOnly, _log, _stop.Token);
        using Disk? own = proxy is null ? OpenDisk() : null;
        Disk disk = proxy?.Disk ?? own!;
        _disk = disk;
        using AccessRecord? record = OpenRecord(disk.Length);
        var exports = new ExportTable(
            new Export(
                _options.ExportName,
                Path.GetFileName(_options.Image),
                record is null ? disk : new RecordingDisk(disk, record),
                CanMultiConn)
            {
                Trail = () => proxy?.Trail ?? [],
            });
        var style = _options.ConnectedDescriptor is not null ? HandshakeStyle.None
            : _options.Oldstyle ? HandshakeStyle.Oldstyle : HandshakeStyle.FixedNewstyle;
        var server = new NbdServer(exports, style, _log, _options.Proxy?.ClientLimits);
        var snapshots = new SnapshotSignal(() => proxy is null ? disk as ImageFile : proxy.Image, _log, _stop.Token);
        if (proxy is not null)
        {
            proxy.Traffic = () => server.Traffic;
            proxy.StartControl();
        }

        _signals.BeginService(snapshots, proxy);
        _isServing = true;
        try
        {
            Start(server, disk, proxy, runtimeThreads);
        }
        catch (FailureException)
        {
            server.Stop(); // the first of two sockets may already be open
            throw;
        }

        _stop.Token.WaitHandle.WaitOne();
        End(server, proxy is null ? () => disk.FlushAsync().AsTask() : proxy.FlushAll);
    }

    /// <summary>Opens the server to clients, or to the one that was handed over.</summary>
    private void Start(NbdServer server, Disk disk, ProxyMode? proxy, RuntimeThreads runtimeThreads)
    {
        Socket? connection = _sockets.OpenConnection();
        if (connection is null)
            _sockets.OpenListeners(server);
        _log.LogInformation(
            "serving '{Image}'{Layers}, {Length} bytes, {Access}",
            _options.Image,
            proxy is not null
                ? proxy.Image is null ? $", a cache of {proxy.RemoteName}" : ", to which a proxy was switched"
                : string.Concat(_options.CowLayers.Select(path => $" + '{path}'")),
            disk.Length,
            _options.ReadOnly ? "read-only"
                : _options.CowTarget && _options.CowLayers.Count == 0 ? "changes are lost when the server ends"
                : "read-write");
        runtimeThreads.WaitUntilStarted(); // clients that have already connected wait a moment
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

    private AccessRecord? OpenRecord(long diskLength)
        => _options.RecordPath is { } path
            ? new AccessRecord(path, diskLength, why => _log.LogWarning("the record '{Path}' ends: {Why}", path, why))
            : null;

    private static void StartThread(string name, Action work)
    {
        if (LinuxThread.TryStart(name, work) is null)
            throw new FailureException("the system has no thread to spare");
    }

    /// <summary>
    /// Whether a client may use several connections. A server of one connection does not have the others: they belong
    /// to other processes of this program. In the target mode these processes write one file, whose page cache they
    /// share, and a sync by one of them makes all writes durable. In the other modes each has its own layer, or is
    /// refused.
    /// </summary>
    private bool CanMultiConn => !_options.IsOneConnection || (!_options.CowTarget && _options.Proxy is null);

    /// <summary>Opens the disk, and warns if the user may have meant something else.</summary>
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

    /// <summary>Composes the disk. This is where the modes of the server are defined.</summary>
    private Disk ComposeDisk()
    {
        if (_options.CowLayers.Count > 0)
        {
            return LayerStack.OpenKept(
                _options.Image,
                _options.CowLayers,
                _options.ReadOnly,
                _options.Force,
                what => _log.LogWarning("{What}; used all the same, as --force says", what));
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

    private void End(NbdServer server, Func<Task> sync)
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
        _signals.WaitUntilEnded(); // WatchEnd bounds all of this
        _log.LogInformation("ended");
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
        _log.LogWarning(!wasServing ? "ended during the start"
            : _isSynced ? "not everything ended in time"
            : "the image was not synced in time; the kernel goes on writing what it holds of it");
        _log.Close();
        if (_disk is { } disk)
            LayerStack.Abandon(disk);
        _pidFile?.Dispose();
        Environment.Exit(_isSynced || !wasServing ? ExitCode.Success : ExitCode.Failure);
    }
}
