using Xnbd.Storage.Layers;

namespace Xnbd.Programs;

/// <summary>
/// What <c>xnbd-server</c> is told to do. To add an option: declare and read it in <see cref="ServerCommandLine"/>,
/// give it a property here, use it in <see cref="ServerProgram"/>, and describe it in the man page (a test compares).
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

    /// <summary>The format of the image that the user has given; null for none.</summary>
    public string? Format { get; init; }
    public bool Daemonize { get; init; }
    public bool Inetd { get; init; }
    public int? ConnectedDescriptor { get; init; }
    public string? LogPath { get; init; }
    public bool Syslog { get; init; }
    public string? PidFile { get; init; }

    /// <summary>The file that records what clients touch; null for none.</summary>
    public string? RecordPath { get; init; }
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

    /// <summary>Checks that the options go together.</summary>
    /// <exception cref="UsageException">They do not.</exception>
    public void Validate()
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
        if (RecordPath is "")
            throw new UsageException("--record: the name is empty");
        if (IsOneConnection && (Port is not null || Address is not null || UnixPath is not null))
            throw new UsageException(
                "a server of one connection does not listen: --lport, --laddr and --unix make no sense here");
        if (Protocol.NbdString.FindFault(ExportName) is { } fault)
            throw new UsageException($"--export-name: {fault}");
    }
}
