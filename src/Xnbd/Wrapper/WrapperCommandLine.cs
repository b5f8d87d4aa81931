using System.CommandLine;
using Xnbd.Programs.Serving;
using Xnbd.Protocol;

namespace Xnbd.Programs.Wrapper;

/// <summary>The command line of <c>xnbd-wrapper</c>.</summary>
internal static class WrapperCommandLine
{
    /// <summary>Reads the command line.</summary>
    /// <returns>The options; null when help or version was asked for, and printed.</returns>
    /// <exception cref="UsageException">The command line is wrong.</exception>
    public static WrapperOptions? Parse(string[] args)
    {
        var images = new Option<string[]>("--imgfile")
        {
            Description = "Export this image, by the name as it is given here; may be repeated",
            HelpName = "IMAGE",
            Arity = ArgumentArity.OneOrMore,
            AllowMultipleArgumentsPerToken = false,
        };
        var address = new Option<string?>("--laddr")
        {
            Description = "Listen on this address only",
            HelpName = "ADDRESS",
        };
        var port = new Option<string?>("--lport")
        {
            Description = "Listen on this TCP port, on all IPv4 and IPv6 addresses "
                + $"[default: {ListenOptions.DefaultPort}]",
            HelpName = "PORT",
        };
        var oldPort = new Option<string?>("--port") { Hidden = true };
        var unix = new Option<string?>("--unix")
        {
            Description = "Listen on this Unix socket; on TCP then only if --lport or --laddr is given too",
            HelpName = "PATH",
        };
        var socket = new Option<string?>("--socket")
        {
            Description = $"The control socket, for xnbd-wrapper-ctl [default: {WrapperOptions.DefaultSocket}]",
            HelpName = "PATH",
        };
        var state = new Option<string?>("--dbpath")
        {
            Description = $"The file that keeps which exports there are [default: {WrapperOptions.DefaultState}]",
            HelpName = "PATH",
        };
        var defaultExport = new Option<string?>("--default-export")
        {
            Description = "The export that clients get who give no name [default: they are refused]",
            HelpName = "NAME",
        };
        var cow = new Option<bool>("--cow")
        {
            Description = "Serve all targets as copy-on-write targets; what is written is lost at the end",
        };
        var readOnly = new Option<bool>("--readonly") { Description = "Refuse writes to all exports" };
        var maxBuffer = new Option<string?>("--max-buf-size")
        {
            Description = "Of each proxy: bytes in flight, at least 2 MiB [default: 64 MiB]",
            HelpName = "BYTES",
        };
        var maxQueue = new Option<string?>("--max-queue-size")
        {
            Description = $"Of each proxy: requests in flight [default: {ProxyOptions.DefaultRequests}]",
            HelpName = "NUMBER",
        };
        var daemonize = new Option<bool>("--daemonize")
        {
            Description = "Go into the background once the server is listening",
        };
        var logPath = new Option<string?>("--logpath")
        {
            Description = "Log to this file; SIGHUP opens it again",
            HelpName = "FILE",
        };
        var syslog = new Option<bool>("--syslog")
        {
            Description = "Log to the system log [default with --daemonize]",
        };
        var pidFile = new Option<string?>("--pidfile")
        {
            Description = "Write the process's number to this file; refused while another server holds it",
            HelpName = "FILE",
        };
        var import = new Option<string?>("--import-nbd-server")
        {
            Description = "Do not serve; print the state that this configuration of nbd-server means",
            HelpName = "CONFIG",
        };
        var load = new Option<bool>("--load")
        {
            Description = "With --import-nbd-server: add its exports to the state file",
        };
        var server = new Option<string?>("--xnbd-server")
        {
            Description = "Without effect: this program serves by itself",
            HelpName = "PATH",
        };
        var bgctl = new Option<string?>("--xnbd-bgctl")
        {
            Description = "Without effect: no other program is needed",
            HelpName = "PATH",
        };
        var oldServer = new Option<string?>("--xnbd-binary") { Hidden = true };
        var command = new Command(WrapperProgram.Name, "Serves many disks behind one address, by their names.")
        {
            images, address, port, oldPort, unix, socket, state, defaultExport, cow, readOnly, maxBuffer, maxQueue,
            daemonize, logPath, syslog, pidFile, import, load, server, bgctl, oldServer,
        };
        if (CommandLine.Parse(command, args) is not { } result)
            return null;

        string[] names = result.GetValue(images) ?? [];
        if (names.Contains(""))
            throw new UsageException("--imgfile: the name is empty");
        if (names.Distinct().Count() < names.Length)
            throw new UsageException("--imgfile: an image was given twice");
        if (names.Select(NbdString.FindFault).FirstOrDefault(found => found is not null) is { } fault)
            throw new UsageException($"--imgfile: {fault}");
        if (result.GetValue(defaultExport) is "")
            throw new UsageException("--default-export: the name is empty");
        if (result.GetValue(load) && result.GetValue(import) is null)
            throw new UsageException("--load goes with --import-nbd-server only");
        Option[] withoutEffect = [server, bgctl, oldServer];
        return new WrapperOptions
        {
            Images = [.. names.Select(name => (name, Path.GetFullPath(name)))],
            Address = result.GetValue(address),
            Port = CommandLine.Number("--lport", result.GetValue(port) ?? result.GetValue(oldPort), 1, 65535),
            UnixPath = FullPath(unix),
            ControlPath = FullPath(socket) ?? WrapperOptions.DefaultSocket,
            StatePath = FullPath(state) ?? WrapperOptions.DefaultState,
            DefaultExport = result.GetValue(defaultExport),
            Cow = result.GetValue(cow),
            ReadOnly = result.GetValue(readOnly),
            MaxBytes = CommandLine.Number(maxBuffer.Name, result.GetValue(maxBuffer), 2 << 20, int.MaxValue)
                ?? ProxyOptions.DefaultBytes,
            MaxRequests = CommandLine.Number(maxQueue.Name, result.GetValue(maxQueue), 1, 1_000_000)
                ?? ProxyOptions.DefaultRequests,
            Daemonize = result.GetValue(daemonize),
            LogPath = FullPath(logPath),
            Syslog = result.GetValue(syslog),
            PidFile = FullPath(pidFile),
            ImportPath = FullPath(import),
            Load = result.GetValue(load),
            WithoutEffect =
            [
                .. withoutEffect.Where(option => result.GetResult(option) is { Implicit: false })
                    .Select(option => option.Name),
            ],
        };

        string? FullPath(Option<string?> option) => CommandLine.FullPath(option.Name, result.GetValue(option));
    }
}
