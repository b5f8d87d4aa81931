using System.Net;
using System.Net.Sockets;
using System.Runtime.InteropServices;
using Microsoft.Extensions.Logging;
using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;
using Xnbd.Server;
using Xnbd.Storage;

namespace Xnbd.Programs;

/// <summary>The program <c>xnbd-server</c>: composes a disk, serves it, and minds the signals.</summary>
internal sealed class ServerProgram
{
    /// <summary>The program's name.</summary>
    public const string Name = "xnbd-server";

    /// <summary>The server ends this long after it was told to, whatever is still under way.</summary>
    private static readonly TimeSpan s_longestStop = TimeSpan.FromSeconds(8.5); // and a second for the log

    private readonly ServerOptions _options;
    private readonly LogOutput _log;
    private readonly CancellationTokenSource _stop = new();

    private ServerProgram(ServerOptions options, LogOutput log)
    {
        _options = options;
        _log = log;
    }

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
            options = options with
            {
                Image = Path.GetFullPath(options.Image),
                LogPath = options.LogPath is null ? null : Path.GetFullPath(options.LogPath),
                UnixPath = options.UnixPath is null ? null : Path.GetFullPath(options.UnixPath),
                CowDirectory = options.CowDirectory is null ? null : Path.GetFullPath(options.CowDirectory),
                CowLayers = [.. options.CowLayers.Select(Path.GetFullPath)],
            };
            bool isDetached = options.Daemonize || options.Inetd;
            bool isElsewhere = options.LogPath is not null || options.Syslog;
            var output = new LogOutput(
                Name, toStderr: !isDetached && !isElsewhere, options.LogPath, toSyslog: options.Syslog || (isDetached && !isElsewhere));
            output.Open();
            log = output;
            new ServerProgram(options, log).Serve();
            return ExitCode.Success;
        }
        catch (UsageException failure)
        {
            Report(failure.Message, log, isInetd);
            Console.Error.WriteLine($"Try '{Name} --help' for more information.");
            return ExitCode.Usage;
        }
        catch (Exception failure) when (failure is FailureException or DiskException)
        {
            Report(failure.Message, log, isInetd);
            return ExitCode.Failure;
        }
        finally
        {
            log?.Close();
        }
    }

    /// <summary>Says why the program ends: to stderr, and to where the log goes if that is elsewhere.</summary>
    private static void Report(string message, LogOutput? log, bool isInetd)
    {
        Console.Error.WriteLine($"{Name}: {message}");
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

    private void Serve()
    {
        using ProxyMode? proxy = _options.Proxy is null ? null : new ProxyMode(_options.Proxy, _options.ReadOnly, _log);
        using Disk? own = proxy is null ? OpenDisk() : null;
        Disk disk = proxy?.Disk ?? own!;
        var exports = new ExportTable(
            new Export(_options.ExportName, Path.GetFileName(_options.Image), disk, CanMultiConn));
        var style = _options.ConnectedDescriptor is not null ? HandshakeStyle.None
            : _options.Oldstyle ? HandshakeStyle.Oldstyle : HandshakeStyle.FixedNewstyle;
        var server = new NbdServer(exports, style, _log, _options.Proxy?.ClientLimits);
        var snapshots = new SnapshotSignal(() => proxy is null ? disk as ImageFile : proxy.Image, _log, _stop.Token);
        List<PosixSignalRegistration> signals =
        [
            On(PosixSignal.SIGTERM, _stop.Cancel),
            On(PosixSignal.SIGINT, _stop.Cancel),
            On(PosixSignal.SIGHUP, _log.Reopen),
            On((PosixSignal)10, snapshots.Take), // SIGUSR1
            On((PosixSignal)12, () => SwitchBySignal(proxy)), // SIGUSR2
        ];

        if (proxy is not null)
        {
            proxy.CountClients = () => server.ConnectionCount;
            proxy.StartControl();
        }

        Socket? connection = OpenConnection();
        if (connection is null)
            Listen(server);
        _log.LogInformation(
            "serving '{Image}'{Layers}, {Length} bytes, {Access}",
            _options.Image,
            _options.Proxy is { } from ? $", a cache of {from.Remote}" : string.Concat(_options.CowLayers.Select(path => $" + '{path}'")),
            disk.Length,
            _options.ReadOnly ? "read-only" : _options.CowTarget && _options.CowLayers.Count == 0 ? "changes go when the server ends" : "read-write");
        if (connection is not null)
        {
            new Thread(() =>
            {
                server.Serve(connection);
                _stop.Cancel();
            })
            { IsBackground = true, Name = "session" }.Start();
        }

        server.Start();
        if (_options.Daemonize)
            Daemon.SayReady();
        _stop.Token.WaitHandle.WaitOne();

        End(server, disk, proxy is null ? () => disk.FlushAsync().AsTask() : proxy.FlushAll, snapshots);
        foreach (PosixSignalRegistration signal in signals)
            signal.Dispose();
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

    private void End(NbdServer server, Disk disk, Func<Task> sync, SnapshotSignal snapshots)
    {
        bool isSynced = false;
        using var watchdog = new Timer(_ =>
        {
            _log.LogWarning(Volatile.Read(ref isSynced)
                ? "not everything ended in time"
                : "the image was not synced in time; the kernel goes on writing what it holds of it");
            _log.Close();
            LayerStack.Abandon(disk);
            Environment.Exit(Volatile.Read(ref isSynced) ? ExitCode.Success : ExitCode.Failure);
        });
        watchdog.Change(s_longestStop, Timeout.InfiniteTimeSpan);

        server.Stop();
        try
        {
            sync().GetAwaiter().GetResult();
        }
        catch (DiskException failure)
        {
            throw new FailureException($"the image could not be synced: {failure.Message}");
        }

        Volatile.Write(ref isSynced, true);
        snapshots.WaitUntilEnded();
        _log.LogInformation("ended");
    }

    private void SwitchBySignal(ProxyMode? proxy)
    {
        if (proxy is null)
            _log.LogInformation("SIGUSR2 has no meaning in this mode");
        else
            new Thread(proxy.SwitchBySignal) { IsBackground = true, Name = "switch" }.Start(); // it may take a while
    }

    private static PosixSignalRegistration On(PosixSignal signal, Action action)
        => PosixSignalRegistration.Create(signal, context =>
        {
            context.Cancel = true;
            action();
        });

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

    private void Listen(NbdServer server)
    {
        try
        {
            OpenListeners(server);
        }
        catch (FailureException)
        {
            server.Stop(); // the first of two sockets may be open already
            throw;
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
            catch (Exception failure) when (failure is SocketException or ArgumentException or UnauthorizedAccessException)
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
