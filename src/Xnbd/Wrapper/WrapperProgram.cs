using System.Text.Json.Nodes;
using Microsoft.Extensions.Logging;
using Xnbd.Control;
using Xnbd.Linux;
using Xnbd.Programs.Serving;
using Xnbd.Server;

namespace Xnbd.Programs.Wrapper;

/// <summary>The program <c>xnbd-wrapper</c>: serves many disks behind one address.</summary>
internal sealed class WrapperProgram : ServerBase
{
    /// <summary>The program's name.</summary>
    public const string Name = "xnbd-wrapper";

    private readonly WrapperOptions _options;
    private volatile WrapperExports? _exports; // null until the state was read

    private WrapperProgram(WrapperOptions options, LogOutput log)
        : base(options, log)
        => _options = options;

    /// <summary>Runs the program.</summary>
    /// <returns>Its exit code.</returns>
    public static int Run(string[] args)
        => Run(Name, args, Parse, (options, log) => new WrapperProgram(options, log));

    /// <returns>Null when there is nothing to serve: all was printed.</returns>
    private static WrapperOptions? Parse(string[] args)
    {
        WrapperOptions? options = WrapperCommandLine.Parse(args);
        if (options?.ImportPath is not { } path)
            return options;
        IReadOnlyDictionary<string, JsonNode?> images = NbdServerConfig.Read(
            path, line => Console.Error.WriteLine($"{Name}: {line}"));
        if (!options.Load)
        {
            Console.WriteLine(StateFile.Text(images));
            return null;
        }

        using StateFile state = StateFile.Open(options.StatePath);
        if (state.Images.FirstOrDefault(known => images.ContainsKey(known.Key)).Key is { } name)
            throw new FailureException($"the state file has an export '{name}' already: nothing was changed");
        state.Save(state.Images.Concat(images));
        Console.WriteLine($"added to '{options.StatePath}': {string.Join(", ", images.Keys)}");
        return null;
    }

    /// <inheritdoc/>
    protected override void Serve()
    {
        var runtimeThreads = new RuntimeThreads(); // before the first socket
        foreach (string option in _options.WithoutEffect)
            Log.LogInformation("{Option} has no effect: this program serves by itself", option);
        using StateFile state = StateFile.Open(_options.StatePath);
        var table = new ExportTable(_options.DefaultExport);
        var server = new NbdServer(
            table, HandshakeStyle.FixedNewstyle, Log, ServerLimits.MaxBytesInFlight);
        using var exports = new WrapperExports(_options, state, server, table, Log, Stopping);
        _exports = exports;
        var methods = new WrapperMethods(exports, server, grace => ShutDown(server, grace));
        ControlServer? control = null;
        try
        {
            Listen(server, runtimeThreads, () =>
            {
                exports.OpenAll();
                control = ServerSockets.OpenControl(_options.ControlPath, methods.Call);
                BeginService();
            });
            WaitForEnd(server, exports.FlushAll, exports.WaitUntilEnded);
        }
        finally
        {
            control?.Dispose();
        }
    }

    /// <inheritdoc/>
    protected override void OnUser1()
        => Log.LogInformation("SIGUSR1 has no meaning here: xnbd-wrapper-ctl --snapshot NAME makes snapshots");

    /// <inheritdoc/>
    protected override void OnUser2()
        => Log.LogInformation("SIGUSR2 has no meaning here: xnbd-wrapper-ctl --bgctl-switch NAME switches a proxy");

    /// <summary>
    /// Reads the state again, on a thread of its own: an export that differs may take a while to end.
    /// </summary>
    protected override void OnHangup()
    {
        if (LinuxThread.TryStart("reload", Reload) is null)
            Log.LogError("not reloaded: the system has no thread to spare");
    }

    /// <inheritdoc/>
    protected override void Abandon() => _exports?.Abandon();

    private void Reload()
    {
        try
        {
            _ = _exports!.Reload();
        }
        catch (FailureException failure)
        {
            Log.LogError("not reloaded: {Cause}", failure.Message);
        }
    }

    /// <summary>Ends the server when its clients have left, or their time is over. It returns at once.</summary>
    private void ShutDown(NbdServer server, TimeSpan grace)
    {
        Log.LogInformation("the server ends when its clients have left");
        if (LinuxThread.TryStart("shutdown", Drain) is null)
            throw new FailureException("the system has no thread to spare");

        void Drain()
        {
            server.Drain(grace);
            Stop();
        }
    }
}
