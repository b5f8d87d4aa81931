namespace Xnbd.Programs.Serving;

/// <summary>
/// What every server program is told: where it listens, where it logs, how it runs. All paths are full.
/// </summary>
internal abstract record ListenOptions
{
    public const int DefaultPort = 8520;

    public int? Port { get; init; }
    public string? Address { get; init; }
    public string? UnixPath { get; init; }
    public bool Daemonize { get; init; }
    public bool Inetd { get; init; }
    public int? ConnectedDescriptor { get; init; }
    public string? LogPath { get; init; }
    public bool Syslog { get; init; }
    public string? PidFile { get; init; }
}
