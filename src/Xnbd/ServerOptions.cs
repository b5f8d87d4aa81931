using System.CommandLine;
using Xnbd.Client;
using Xnbd.Server;
using Xnbd.Storage.Cache;
using Xnbd.Storage.Layers;

namespace Xnbd.Programs;

/// <summary>
/// The command line of <c>xnbd-server</c>. To add an option: declare it here, give it a property, read it in
/// <see cref="Parse"/>, use it in <see cref="ServerProgram"/>, and describe it in the man page (a test compares).
/// </summary>
internal sealed record ServerOptions
{
    public const int DefaultPort = 8520;

    public required string Image { get; init; }
    public int? Port { get; init; }
    public string? Address { get; init; }
    public string? UnixPath { get; init; }
    public bool ReadOnly { get; init; }
    public bool ShareImage { get; init; }

    /// <summary>The format of the image, as the user says; null if the user does not say.</summary>
    public string? Format { get; init; }
    public bool Daemonize { get; init; }
    public bool Inetd { get; init; }
    public int? ConnectedDescriptor { get; init; }
    public string? LogPath { get; init; }
    public bool Syslog { get; init; }
    public string? PidFile { get; init; }
    public bool CowTarget { get; init; }
    public string? CowDirectory { get; init; }
    public IReadOnlyList<string> CowLayers { get; init; } = [];
    public bool Force { get; init; }
    public ProxyOptions? Proxy { get; init; }
    public string ExportName { get; init; } = "";
    public bool Oldstyle { get; init; }

    /// <summary>
    /// This process serves one connection, and others may serve further connections of the same client.
    /// </summary>
    public bool IsOneConnection => Inetd || ConnectedDescriptor is not null;

    /// <summary>Reads the command line.</summary>
    /// <returns>The options; null when help or version was asked for, and printed.</returns>
    /// <exception cref="UsageException">The command line is wrong.</exception>
    public static ServerOptions? Parse(string[] args)
    {
        var target = new Option<bool>("--target") { Description = "Serve DISK_IMAGE itself: a regular file or a block device" };
        var cowTarget = new Option<bool>("--cow-target")
        {
            Description = "Serve DISK_IMAGE, which never changes; writes go to a layer of their own",
        };
        var proxy = new Option<bool>("--proxy")
        {
            Description = "Serve a remote disk, and keep here what was read or written: see the arguments",
        };
        var targetName = new Option<string>("--target-exportname")
        {
            Description = "With --proxy: the remote's export [default: its default one]",
            HelpName = "NAME",
            DefaultValueFactory = _ => "",
        };
        var remoteConnections = new Option<string?>("--remote-connections")
        {
            Description = $"With --proxy: connections to a remote that allows several [default: {ProxyOptions.DefaultConnections}]",
            HelpName = "NUMBER",
        };
        var waitRemote = new Option<string?>("--wait-remote")
        {
            Description = "With --proxy: wait so long for a remote that cannot be reached",
            HelpName = "SECONDS",
        };
        var clearBitmap = new Option<bool>("--clear-bitmap") { Description = "With --proxy: forget what is cached" };
        var rebind = new Option<bool>("--rebind") { Description = "With --proxy: the cache is right although the remote's address has changed" };
        var importBitmap = new Option<bool>("--import-bitmap") { Description = "With --proxy: take over a bitmap of the original xNBD" };
        var maxQueue = new Option<string?>("--max-queue-size")
        {
            Description = $"With --proxy: requests in flight, of clients, and to the remote [default: {ProxyOptions.DefaultRequests}]",
            HelpName = "NUMBER",
        };
        var maxBuffer = new Option<string?>("--max-buf-size")
        {
            Description = "With --proxy: bytes in flight, half of them of clients, half fetched; at least 2 MiB [default: 64 MiB]",
            HelpName = "BYTES",
        };
        var port = new Option<string?>("--lport")
        {
            Description = $"Listen on this TCP port, on all IPv4 and IPv6 addresses [default: {DefaultPort}]",
            HelpName = "PORT",
        };
        var address = new Option<string?>("--laddr") { Description = "Listen on this address only", HelpName = "ADDRESS" };
        var unix = new Option<string?>("--unix")
        {
            Description = "Listen on this Unix socket; on TCP then only if --lport or --laddr is given too",
            HelpName = "PATH",
        };
        var readOnly = new Option<bool>("--readonly") { Description = "Refuse writes; the image is opened for reading only" };
        var shareImage = new Option<bool>("--share-image")
        {
            Description = "With --target: other servers may write DISK_IMAGE at the same time "
                + "[default with --inetd and --connected-fd]",
        };
        var format = new Option<string?>("--format")
        {
            Description = "raw: DISK_IMAGE is meant to be served as it is, whatever it looks like",
            HelpName = "FORMAT",
        };
        var daemonize = new Option<bool>("--daemonize") { Description = "Go into the background once the server is listening" };
        var inetd = new Option<bool>("--inetd") { Description = "Serve the one connection that stdin is" };
        var connected = new Option<string?>("--connected-fd")
        {
            Description = "Serve the one connection that this descriptor is, negotiated already",
            HelpName = "NUMBER",
        };
        var logPath = new Option<string?>("--logpath") { Description = "Log to this file; SIGHUP opens it anew", HelpName = "FILE" };
        var syslog = new Option<bool>("--syslog") { Description = "Log to the system log [default with --daemonize and --inetd]" };
        var pidFile = new Option<string?>("--pidfile")
        {
            Description = "Write the process's number to this file; refused while another server holds it",
            HelpName = "FILE",
        };
        var exportName = new Option<string>("--export-name")
        {
            Description = "The export's name; clients that give none get it as well [default: none]",
            HelpName = "NAME",
            DefaultValueFactory = _ => "",
        };
        var oldstyle = new Option<bool>("--oldstyle") { Description = "Greet in the old style, for clients from before 2013" };
        var cowDirectory = new Option<string?>("--cow-dir")
        {
            Description = "With --cow-target: where the layer goes [default: beside DISK_IMAGE]",
            HelpName = "DIR",
        };
        var cowLayer = new Option<string[]>("--cow-layer")
        {
            Description = "With --cow-target: a layer that is kept; given several times, from the bottom up, the last one is written",
            HelpName = "FILE",
            Arity = ArgumentArity.OneOrMore,
            AllowMultipleArgumentsPerToken = false,
        };
        var force = new Option<bool>("--force") { Description = "Use layers although what they stand on has changed" };
        var image = new Argument<string[]>("DISK_IMAGE")
        {
            Description = "The image to serve; with --proxy: REMOTE_HOST REMOTE_PORT CACHE_IMAGE CACHE_BITMAP_IMAGE CONTROL_SOCKET_PATH, "
                + "or a URI in place of host and port",
            Arity = ArgumentArity.ZeroOrMore,
        };

        var command = new Command(ServerProgram.Name, "Serves a disk image as a block device over the NBD protocol.")
        {
            target, cowTarget, proxy, cowDirectory, cowLayer, force, targetName, remoteConnections, waitRemote, clearBitmap, rebind,
            importBitmap, maxQueue, maxBuffer, port, address, unix, exportName, readOnly, shareImage, format, oldstyle,
            daemonize, inetd, connected, logPath, syslog, pidFile, image,
        };

        if (CommandLine.Parse(command, args) is not { } result)
            return null;

        string[] images = result.GetValue(image) ?? [];
        if (Array.Find(images, word => word.StartsWith('-') && word.Length > 1 && !args.Contains("--")) is { } unknown)
            throw new UsageException($"unknown option '{unknown}'");

        int modes = Convert.ToInt32(result.GetValue(target)) + Convert.ToInt32(result.GetValue(cowTarget))
            + Convert.ToInt32(result.GetValue(proxy));
        if (modes == 0)
            throw new UsageException("no mode was given: use --target, --cow-target or --proxy");
        if (modes > 1)
            throw new UsageException("only one mode can be given");

        ProxyOptions? proxyOptions = null;
        if (result.GetValue(proxy))
        {
            if (result.GetValue(clearBitmap) && (result.GetValue(rebind) || result.GetValue(importBitmap)))
                throw new UsageException("--clear-bitmap forgets what --rebind and --import-bitmap keep");
            string? export = result.GetResult(targetName) is { Implicit: false } ? result.GetValue(targetName) : null;
            proxyOptions = ProxyOptions.Parse(images, export) with
            {
                Connections = CommandLine.Number("--remote-connections", result.GetValue(remoteConnections), 1, 64) ?? ProxyOptions.DefaultConnections,
                WaitSeconds = CommandLine.Number("--wait-remote", result.GetValue(waitRemote), 0, int.MaxValue) ?? 0,
                Opening = (result.GetValue(clearBitmap) ? CacheOpening.Clear : 0) | (result.GetValue(rebind) ? CacheOpening.Rebind : 0)
                    | (result.GetValue(importBitmap) ? CacheOpening.ImportBitmap : 0),
                MostRequests = CommandLine.Number("--max-queue-size", result.GetValue(maxQueue), 1, 1_000_000) ?? ProxyOptions.DefaultRequests,
                MostBytes = CommandLine.Number("--max-buf-size", result.GetValue(maxBuffer), 2 << 20, int.MaxValue) ?? ProxyOptions.DefaultBytes,
            };
        }
        else if (images.Length > 0 && RemoteUri.IsUri(images[0]) && !File.Exists(images[0]))
        {
            throw new UsageException(
                $"'{images[0]}' is a remote disk, which --proxy serves: --proxy URI CACHE_IMAGE CACHE_BITMAP_IMAGE CONTROL_SOCKET_PATH");
        }
        else if (images.Length != 1)
        {
            throw new UsageException(images.Length == 0 ? "no disk image was given" : "only one disk image can be served");
        }
        else if (((Option[])[targetName, remoteConnections, waitRemote, clearBitmap, rebind, importBitmap, maxQueue, maxBuffer])
            .FirstOrDefault(o => result.GetResult(o) is { Implicit: false }) is { } stray)
        {
            throw new UsageException($"{stray.Name} goes with --proxy only");
        }

        var options = new ServerOptions
        {
            Image = proxyOptions?.CacheImage ?? images[0],
            Proxy = proxyOptions,
            Port = CommandLine.Number("--lport", result.GetValue(port), 1, 65535),
            Address = result.GetValue(address),
            UnixPath = result.GetValue(unix),
            ReadOnly = result.GetValue(readOnly),
            ShareImage = result.GetValue(shareImage),
            Format = result.GetValue(format),
            Daemonize = result.GetValue(daemonize),
            Inetd = result.GetValue(inetd),
            ConnectedDescriptor = CommandLine.Number("--connected-fd", result.GetValue(connected), 0, int.MaxValue),
            LogPath = result.GetValue(logPath),
            Syslog = result.GetValue(syslog),
            PidFile = result.GetValue(pidFile),
            CowTarget = result.GetValue(cowTarget),
            CowDirectory = result.GetValue(cowDirectory),
            CowLayers = result.GetValue(cowLayer) ?? [],
            Force = result.GetValue(force),
            ExportName = result.GetValue(exportName)!,
            Oldstyle = result.GetValue(oldstyle),
        };
        options.Check();
        return options;
    }

    private void Check()
    {
        if (Image.Length == 0)
            throw new UsageException("the disk image's name is empty");

        if (!CowTarget && (CowDirectory is not null || CowLayers.Count > 0 || Force))
            throw new UsageException("--cow-dir, --cow-layer and --force go with --cow-target only");
        if (CowDirectory is not null && CowLayers.Count > 0)
            throw new UsageException("--cow-dir is for layers that are not kept: give --cow-layer a path instead");
        if (Force && CowLayers.Count == 0)
            throw new UsageException("--force goes with --cow-layer only");
        if (CowLayers.Contains("") || CowDirectory is "")
            throw new UsageException("--cow-layer and --cow-dir: the name is empty");

        if (ShareImage && (CowTarget || Proxy is not null))
            throw new UsageException("--share-image goes with --target only");
        if (Format is not null && Proxy is not null)
            throw new UsageException("--format goes with --target and --cow-target only");
        if (Format is not (null or ImageFormat.Raw))
        {
            throw new UsageException(
                $"--format {Format}: images are served as raw bytes only "
                + "(qemu-img converts others, qemu-nbd serves them)");
        }

        if (Inetd && Daemonize)
            throw new UsageException("--inetd and --daemonize exclude each other");
        if (Inetd && ConnectedDescriptor is not null)
            throw new UsageException("--inetd and --connected-fd exclude each other");
        if (ConnectedDescriptor is not null && Daemonize)
            throw new UsageException("--connected-fd and --daemonize exclude each other");
        if (IsOneConnection && PidFile is not null)
            throw new UsageException("--pidfile is for servers that listen: not for --inetd and --connected-fd");
        if (PidFile is "")
            throw new UsageException("--pidfile: the name is empty");
        if (IsOneConnection && (Port is not null || Address is not null || UnixPath is not null))
            throw new UsageException("a server of one connection does not listen: --lport, --laddr and --unix make no sense here");
        if (Protocol.NbdString.FindFault(ExportName) is { } fault)
            throw new UsageException($"--export-name: {fault}");
    }
}

/// <summary>What the proxy mode needs beyond all others.</summary>
internal sealed record ProxyOptions
{
    public const int DefaultConnections = 4;
    public const int DefaultRequests = 1024; // eight clients that ask for as much as a client may
    public const int DefaultBytes = 64 << 20;

    public required RemoteAddress Remote { get; init; }
    public required string CacheImage { get; init; }
    public required string Map { get; init; }
    public required string ControlSocket { get; init; }
    public int Connections { get; init; }
    public int WaitSeconds { get; init; }
    public CacheOpening Opening { get; init; }
    public int MostRequests { get; init; }
    public int MostBytes { get; init; }

    /// <summary>Of what clients wait for; when they are reached, nobody's data requests are received before others have ended.</summary>
    public RequestLimits ClientLimits => new(MostRequests, MostBytes / 2);

    /// <summary>Of what the remote is asked for.</summary>
    public CacheLimits FetchLimits => new(MostRequests, MostBytes / 2);

    /// <summary>Reads the arguments: a remote's host and port, or its URI; two files; a socket.</summary>
    public static ProxyOptions Parse(string[] words, string? exportName)
    {
        bool isUri = words.Length > 0 && RemoteUri.IsUri(words[0]);
        if (words.Length != (isUri ? 4 : 5))
        {
            const string files = "CACHE_IMAGE CACHE_BITMAP_IMAGE CONTROL_SOCKET_PATH";
            string wanted = isUri
                ? $"four arguments, if the first one is a URI: URI {files}"
                : $"five arguments, REMOTE_HOST REMOTE_PORT {files}";
            throw new UsageException($"--proxy takes {wanted}; {words.Length} were given");
        }

        if (words.Contains(""))
            throw new UsageException("an argument is empty");
        try
        {
            return new ProxyOptions
            {
                Remote = isUri ? RemoteUri.Parse(words[0], exportName) : RemoteAddress.Parse(words[0], words[1], exportName ?? ""),
                CacheImage = Path.GetFullPath(words[^3]),
                Map = Path.GetFullPath(words[^2]),
                ControlSocket = Path.GetFullPath(words[^1]),
            };
        }
        catch (FormatException failure)
        {
            throw new UsageException(failure.Message);
        }
    }
}
