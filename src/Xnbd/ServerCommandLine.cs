using System.CommandLine;
using Xnbd.Client;
using Xnbd.Programs.Serving;
using Xnbd.Storage.Cache;

namespace Xnbd.Programs;

/// <summary>
/// The command line of <c>xnbd-server</c>: its options, and how they are read into <see cref="ServerOptions"/>.
/// </summary>
internal sealed class ServerCommandLine
{
    private readonly Option<bool> _target = new("--target")
    {
        Description = "Serve DISK_IMAGE itself: a regular file or a block device",
    };
    private readonly Option<bool> _cowTarget = new("--cow-target")
    {
        Description = "Serve DISK_IMAGE, which never changes; writes go to a layer of their own",
    };
    private readonly Option<bool> _proxy = new("--proxy")
    {
        Description = "Serve a remote disk, and keep what was read or written in a cache: see the arguments",
    };
    private readonly Option<string> _targetName = new("--target-exportname")
    {
        Description = "With --proxy: the remote's export [default: its default one]",
        HelpName = "NAME",
        DefaultValueFactory = _ => "",
    };
    private readonly Option<string[]> _remote = new("--remote")
    {
        Description = "With --proxy: a further server of the same disk, for when the others are away; may be repeated",
        HelpName = "URI",
        Arity = ArgumentArity.OneOrMore,
        AllowMultipleArgumentsPerToken = false,
    };
    private readonly Option<string?> _remoteConnections = new("--remote-connections")
    {
        Description = "With --proxy: connections to a remote that allows several "
            + $"[default: {ProxyOptions.DefaultConnections}]",
        HelpName = "NUMBER",
    };
    private readonly Option<string?> _waitRemote = new("--wait-remote")
    {
        Description = "With --proxy: how long to wait for a remote that cannot be reached",
        HelpName = "SECONDS",
    };
    private readonly Option<string?> _remoteTimeout = new("--remote-timeout")
    {
        Description = "With --proxy: how long reads of missing blocks wait for a lost remote "
            + "[default: as long as it takes]",
        HelpName = "SECONDS",
    };
    private readonly Option<string?> _rate = new("--rate")
    {
        Description = "With --proxy: bytes per second of the background copy, such as 50M; clients are not limited "
            + "[default: as fast as the line]",
        HelpName = "RATE",
    };
    private readonly Option<string?> _onEvent = new("--on-event")
    {
        Description = "With --proxy: a program that is run when the remote is lost or back, "
            + "and when all is copied, verified or switched",
        HelpName = "PROGRAM",
    };
    private readonly Option<bool> _incoming = new("--incoming")
    {
        Description = "With --proxy: keep nothing until the first write of a client, or xnbd-bgctl --begin",
    };
    private readonly Option<bool> _clearBitmap = new("--clear-bitmap")
    {
        Description = "With --proxy: forget what is cached",
    };
    private readonly Option<bool> _rebind = new("--rebind")
    {
        Description = "With --proxy: the cache is valid although the remote's address has changed",
    };
    private readonly Option<bool> _importBitmap = new("--import-bitmap")
    {
        Description = "With --proxy: take over a bitmap of the original xNBD",
    };
    private readonly Option<string?> _maxQueue = new("--max-queue-size")
    {
        Description = "With --proxy: requests in flight, of clients, and to the remote "
            + $"[default: {ProxyOptions.DefaultRequests}]",
        HelpName = "NUMBER",
    };
    private readonly Option<string?> _maxBuffer = new("--max-buf-size")
    {
        Description = "With --proxy: bytes in flight, half of them of clients, half fetched; "
            + "at least 2 MiB [default: 64 MiB]",
        HelpName = "BYTES",
    };
    private readonly Option<string?> _port = new("--lport")
    {
        Description = $"Listen on this TCP port, on all IPv4 and IPv6 addresses [default: {ListenOptions.DefaultPort}]",
        HelpName = "PORT",
    };
    private readonly Option<string?> _address = new("--laddr")
    {
        Description = "Listen on this address only",
        HelpName = "ADDRESS",
    };
    private readonly Option<string?> _unix = new("--unix")
    {
        Description = "Listen on this Unix socket; on TCP then only if --lport or --laddr is given too",
        HelpName = "PATH",
    };
    private readonly Option<bool> _readOnly = new("--readonly")
    {
        Description = "Refuse writes; the image is opened for reading only",
    };
    private readonly Option<bool> _shareImage = new("--share-image")
    {
        Description = "With --target: other servers may write DISK_IMAGE at the same time "
            + "[default with --inetd and --connected-fd]",
    };
    private readonly Option<string?> _format = new("--format")
    {
        Description = "raw: serve DISK_IMAGE byte by byte, whatever it looks like",
        HelpName = "FORMAT",
    };
    private readonly Option<bool> _daemonize = new("--daemonize")
    {
        Description = "Go into the background once the server is listening",
    };
    private readonly Option<bool> _inetd = new("--inetd") { Description = "Serve one connection, on stdin" };
    private readonly Option<string?> _connected = new("--connected-fd")
    {
        Description = "Serve one connection, on this descriptor, after its handshake",
        HelpName = "NUMBER",
    };
    private readonly Option<string?> _logPath = new("--logpath")
    {
        Description = "Log to this file; SIGHUP opens it again",
        HelpName = "FILE",
    };
    private readonly Option<bool> _syslog = new("--syslog")
    {
        Description = "Log to the system log [default with --daemonize and --inetd]",
    };
    private readonly Option<string?> _pidFile = new("--pidfile")
    {
        Description = "Write the process's number to this file; refused while another server holds it",
        HelpName = "FILE",
    };
    private readonly Option<string?> _control = new("--control")
    {
        Description = "With --target and --cow-target: listen on this control socket; see xnbd-bgctl",
        HelpName = "PATH",
    };
    private readonly Option<string?> _record = new("--record")
    {
        Description = "Record what clients touch, in order; see xnbd-bgctl --prefetch",
        HelpName = "FILE",
    };
    private readonly Option<string> _exportName = new("--export-name")
    {
        Description = "The export's name; clients that give no name get this export, too [default: none]",
        HelpName = "NAME",
        DefaultValueFactory = _ => "",
    };
    private readonly Option<bool> _oldstyle = new("--oldstyle")
    {
        Description = "Greet in the old style, for clients from before 2013",
    };
    private readonly Option<string?> _cowDirectory = new("--cow-dir")
    {
        Description = "With --cow-target: where the layer goes [default: beside DISK_IMAGE]",
        HelpName = "DIR",
    };
    private readonly Option<string[]> _cowLayer = new("--cow-layer")
    {
        Description = "With --cow-target: a layer that is kept; may be repeated, from the bottom up; "
            + "the last one is written",
        HelpName = "FILE",
        Arity = ArgumentArity.OneOrMore,
        AllowMultipleArgumentsPerToken = false,
    };
    private readonly Option<bool> _force = new("--force")
    {
        Description = "Use layers although what they stand on has changed",
    };
    private readonly Argument<string[]> _image = new("DISK_IMAGE")
    {
        Description = "The image to serve; with --proxy: "
            + "REMOTE_HOST REMOTE_PORT CACHE_IMAGE CACHE_BITMAP_IMAGE CONTROL_SOCKET_PATH, "
            + "or a URI in place of host and port",
        Arity = ArgumentArity.ZeroOrMore,
    };

    private ServerCommandLine()
    {
    }

    /// <summary>Reads the command line.</summary>
    /// <returns>The options; null when help or version was asked for, and printed.</returns>
    /// <exception cref="UsageException">The command line is wrong.</exception>
    public static ServerOptions? Parse(string[] args) => new ServerCommandLine().Read(args);

    private ServerOptions? Read(string[] args)
    {
        var command = new Command(ServerProgram.Name, "Serves a disk image as a block device over the NBD protocol.")
        {
            _target, _cowTarget, _proxy, _cowDirectory, _cowLayer, _force, _targetName, _remote,
            _remoteConnections, _waitRemote, _remoteTimeout, _incoming, _rate, _onEvent, _clearBitmap, _rebind,
            _importBitmap, _maxQueue, _maxBuffer, _port, _address, _unix, _exportName, _readOnly, _shareImage,
            _format, _oldstyle, _daemonize, _inetd, _connected, _logPath, _syslog, _pidFile, _record, _control,
            _image,
        };

        if (CommandLine.Parse(command, args) is not { } result)
            return null;

        string[] images = result.GetValue(_image) ?? [];
        if (Array.Find(images, word => word.StartsWith('-') && word.Length > 1 && !args.Contains("--")) is { } unknown)
            throw new UsageException($"unknown option '{unknown}'");

        ValidateMode(result);
        ProxyOptions? proxyOptions = result.GetValue(_proxy) ? ReadProxy(result, images) : null;
        var options = new ServerOptions
        {
            Local = proxyOptions is null ? ReadLocal(result, images) : null,
            Proxy = proxyOptions,
            ControlPath = proxyOptions?.ControlSocket ?? FullPath(_control),
            Port = CommandLine.Number("--lport", result.GetValue(_port), 1, 65535),
            Address = result.GetValue(_address),
            UnixPath = FullPath(_unix),
            ReadOnly = result.GetValue(_readOnly),
            Daemonize = result.GetValue(_daemonize),
            Inetd = result.GetValue(_inetd),
            ConnectedDescriptor = CommandLine.Number("--connected-fd", result.GetValue(_connected), 0, int.MaxValue),
            LogPath = FullPath(_logPath),
            Syslog = result.GetValue(_syslog),
            PidFile = FullPath(_pidFile),
            RecordPath = FullPath(_record),
            ExportName = result.GetValue(_exportName)!,
            Oldstyle = result.GetValue(_oldstyle),
        };
        options.Validate();
        return options;

        string? FullPath(Option<string?> option) => CommandLine.FullPath(option.Name, result.GetValue(option));
    }

    private void ValidateMode(ParseResult result)
    {
        int modes = Convert.ToInt32(result.GetValue(_target)) + Convert.ToInt32(result.GetValue(_cowTarget))
            + Convert.ToInt32(result.GetValue(_proxy));
        if (modes == 0)
            throw new UsageException("no mode was given: use --target, --cow-target or --proxy");
        if (modes > 1)
            throw new UsageException("only one mode can be given");
    }

    private ProxyOptions ReadProxy(ParseResult result, string[] words)
    {
        RefuseStray(
            result,
            [_cowDirectory, _cowLayer, _force],
            "--cow-dir, --cow-layer and --force go with --cow-target only");
        RefuseStray(result, [_shareImage], "--share-image goes with --target only");
        RefuseStray(result, [_format], "--format goes with --target and --cow-target only");
        RefuseStray(result, [_control], "--control: a proxy's control socket is its last argument");
        if (result.GetValue(_clearBitmap) && (result.GetValue(_rebind) || result.GetValue(_importBitmap)))
            throw new UsageException("--clear-bitmap forgets what --rebind and --import-bitmap keep");
        string? export = result.GetResult(_targetName) is { Implicit: false } ? result.GetValue(_targetName) : null;
        return ProxyOptions.Parse(words, export, result.GetValue(_remote) ?? []) with
        {
            Connections = Number(_remoteConnections, 1, 64) ?? ProxyOptions.DefaultConnections,
            WaitSeconds = Number(_waitRemote, 0, int.MaxValue) ?? 0,
            RemoteTimeout = Number(_remoteTimeout, 0, int.MaxValue) is { } seconds
                ? TimeSpan.FromSeconds(seconds)
                : RemoteOptions.Forever,
            Opening = (result.GetValue(_clearBitmap) ? CacheOpening.Clear : 0)
                | (result.GetValue(_rebind) ? CacheOpening.Rebind : 0)
                | (result.GetValue(_importBitmap) ? CacheOpening.ImportBitmap : 0),
            Incoming = result.GetValue(_incoming),
            MaxCopyRate = CommandLine.Rate(_rate.Name, result.GetValue(_rate)) ?? 0,
            OnEvent = CommandLine.FullPath(_onEvent.Name, result.GetValue(_onEvent)),
            MaxRequests = Number(_maxQueue, 1, 1_000_000) ?? ProxyOptions.DefaultRequests,
            MaxBytes = Number(_maxBuffer, 2 << 20, int.MaxValue) ?? ProxyOptions.DefaultBytes,
        };

        int? Number(Option<string?> option, int min, int max)
            => CommandLine.Number(option.Name, result.GetValue(option), min, max);
    }

    /// <summary>Reads the arguments of the modes that serve an image of this machine.</summary>
    private LocalDiskOptions ReadLocal(ParseResult result, string[] images)
    {
        if (images.Length > 0 && RemoteUri.IsUri(images[0]) && !File.Exists(images[0]))
        {
            throw new UsageException(
                $"'{images[0]}' is a remote disk, which --proxy serves: "
                + "--proxy URI CACHE_IMAGE CACHE_BITMAP_IMAGE CONTROL_SOCKET_PATH");
        }

        if (images.Length != 1)
        {
            throw new UsageException(
                images.Length == 0 ? "no disk image was given" : "only one disk image can be served");
        }

        Option[] ofProxy =
        [
            _targetName, _remote, _remoteConnections, _waitRemote, _remoteTimeout, _incoming, _rate, _onEvent,
            _clearBitmap, _rebind, _importBitmap, _maxQueue, _maxBuffer,
        ];
        if (Array.Find(ofProxy, option => IsGiven(result, option)) is { } stray)
            throw new UsageException($"{stray.Name} goes with --proxy only");
        if (images[0].Length == 0)
            throw new UsageException("the disk image's name is empty");
        bool isCow = result.GetValue(_cowTarget), isShared = result.GetValue(_shareImage);
        if (isCow && isShared)
            throw new UsageException("--share-image goes with --target only");
        var options = new LocalDiskOptions
        {
            Image = Path.GetFullPath(images[0]),
            ReadOnly = result.GetValue(_readOnly),
            Format = result.GetValue(_format),
            IsShared = isShared || result.GetValue(_inetd) || IsGiven(result, _connected),
            CowTarget = isCow,
            CowDirectory = CommandLine.FullPath(_cowDirectory.Name, result.GetValue(_cowDirectory)),
            CowLayers =
            [
                .. (result.GetValue(_cowLayer) ?? []).Select(path => CommandLine.FullPath(_cowLayer.Name, path)!),
            ],
            Force = result.GetValue(_force),
        };
        options.Validate();
        return options;
    }

    private static bool IsGiven(ParseResult result, Option option)
        => result.GetResult(option) is { Implicit: false };

    /// <exception cref="UsageException">One of the options was given.</exception>
    private static void RefuseStray(ParseResult result, Option[] options, string message)
    {
        if (Array.Exists(options, option => IsGiven(result, option)))
            throw new UsageException(message);
    }
}
