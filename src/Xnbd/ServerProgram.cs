using Microsoft.Extensions.Logging;
using Xnbd.Programs.Serving;
using Xnbd.Server;
using Xnbd.Storage.Access;

namespace Xnbd.Programs;

/// <summary>The program <c>xnbd-server</c>: opens one disk and serves it.</summary>
internal sealed class ServerProgram : ServerBase
{
    /// <summary>The program's name.</summary>
    public const string Name = "xnbd-server";

    private readonly ServerOptions _options;
    private volatile ServedDisk? _served; // null until it is open

    private ServerProgram(ServerOptions options, LogOutput log)
        : base(options, log)
        => _options = options;

    /// <summary>Runs the program.</summary>
    /// <returns>Its exit code.</returns>
    public static int Run(string[] args)
        => Run(Name, args, ServerCommandLine.Parse, (options, log) => new ServerProgram(options, log));

    /// <inheritdoc/>
    protected override void Serve()
    {
        var runtimeThreads = new RuntimeThreads(); // before the first socket
        using ServedDisk served = _options.Proxy is { } proxy
            ? new ProxyMode(proxy, _options.ReadOnly, Log, Stopping)
            : new LocalDisk(_options.Local!, Log, Stopping);
        _served = served;
        using AccessRecord? record = OpenRecord(served.Disk.Length);
        Export export = served.ExportAs(
            _options.ExportName, record is null ? null : new RecordingDisk(served.Disk, record), CanMultiConn);
        var style = _options.ConnectedDescriptor is not null ? HandshakeStyle.None
            : _options.Oldstyle ? HandshakeStyle.Oldstyle : HandshakeStyle.FixedNewstyle;
        var server = new NbdServer(new ExportTable(export), style, Log);
        served.Attach(server, export);
        if (_options.ControlPath is { } control)
            served.OpenControl(control);
        BeginService();
        Listen(server, runtimeThreads, () => Log.LogInformation("serving {Disk}", served.Description));
        WaitForEnd(server, served.FlushAll, served.WaitUntilEnded);
    }

    /// <inheritdoc/>
    protected override void OnUser1() => _served!.Snapshots.StartBySignal();

    /// <inheritdoc/>
    protected override void OnUser2() => _served!.SwitchBySignal();

    /// <inheritdoc/>
    protected override void Abandon() => _served?.Abandon();

    private AccessRecord? OpenRecord(long diskLength)
        => _options.RecordPath is { } path
            ? new AccessRecord(path, diskLength, why => Log.LogWarning("the record '{Path}' ends: {Why}", path, why))
            : null;

    /// <summary>
    /// Whether a client may use several connections. A server of one connection does not have the others: they belong
    /// to other processes of this program. In the target mode these processes write one file, whose page cache they
    /// share, and a sync by one of them makes all writes durable. In the other modes each has its own layer, or is
    /// refused.
    /// </summary>
    private bool CanMultiConn => !_options.IsOneConnection || _options.Local is { CowTarget: false };
}
