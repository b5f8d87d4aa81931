using Xnbd.Programs.Serving;

namespace Xnbd.Programs;

/// <summary>
/// What <c>xnbd-server</c> is told to do. To add an option: declare and read it in <see cref="ServerCommandLine"/>,
/// give it a property here, use it in <see cref="ServerProgram"/>, and describe it in the man page (a test compares).
/// </summary>
internal sealed record ServerOptions : ListenOptions
{
    public bool ReadOnly { get; init; }

    /// <summary>The file that records what clients touch; null for none.</summary>
    public string? RecordPath { get; init; }

    /// <summary>An image of this machine; null with <see cref="Proxy"/>.</summary>
    public LocalDiskOptions? Local { get; init; }

    public ProxyOptions? Proxy { get; init; }

    /// <summary>The control socket; null for none.</summary>
    public string? ControlPath { get; init; }

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
        if (Inetd && Daemonize)
            throw new UsageException("--inetd and --daemonize exclude each other");
        if (Inetd && ConnectedDescriptor is not null)
            throw new UsageException("--inetd and --connected-fd exclude each other");
        if (ConnectedDescriptor is not null && Daemonize)
            throw new UsageException("--connected-fd and --daemonize exclude each other");
        if (IsOneConnection && PidFile is not null)
            throw new UsageException("--pidfile is for servers that listen: not for --inetd and --connected-fd");
        if (IsOneConnection && (Port is not null || Address is not null || UnixPath is not null))
            throw new UsageException(
                "a server of one connection does not listen: --lport, --laddr and --unix make no sense here");
        if (IsOneConnection && ControlPath is not null && Proxy is null)
            throw new UsageException("--control is for servers that listen: not for --inetd and --connected-fd");
        if (Protocol.NbdString.FindFault(ExportName) is { } fault)
            throw new UsageException($"--export-name: {fault}");
    }
}
