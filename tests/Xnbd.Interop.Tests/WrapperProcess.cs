using System.Net.Sockets;
using System.Text.Json.Nodes;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>A running <c>xnbd-wrapper</c> with its own state, and <c>xnbd-wrapper-ctl</c> for it.</summary>
internal sealed class WrapperProcess : IDisposable
{
    public static readonly string Program = Path.Combine(ServerProcess.BinFolder, "xnbd-wrapper");
    public static readonly string ControlProgram = Path.Combine(ServerProcess.BinFolder, "xnbd-wrapper-ctl");

    private readonly string _control;

    /// <summary>Starts it, and waits until it listens.</summary>
    /// <param name="folder">Where its sockets stand, and its state unless an option says otherwise.</param>
    /// <param name="options">Further options.</param>
    public WrapperProcess(TempFolder folder, params string[] options)
    {
        _control = folder.File("w.ctl");
        string[] state = options.Contains("--dbpath") ? [] : ["--dbpath", folder.File("w.state")];
        string socket = folder.File("w.s");
        Server = ServerProcess.StartCommand(
            socket, [Program, "--unix", socket, "--socket", _control, .. state, .. options]);
        Wait.Until(() => Server.HasExited || IsOpen(_control), "all exports are opened", 60);
    }

    public ServerProcess Server { get; }

    public NbdTestClient Open(string name) => Server.Open(name: name);

    /// <summary>Runs <c>xnbd-wrapper-ctl</c>, whatever becomes of it.</summary>
    public Task<ToolResult> Try(params string[] args) => Tool.Run(ControlProgram, ["--socket", _control, .. args]);

    /// <summary>Runs it; it must succeed.</summary>
    /// <returns>Its output.</returns>
    public async Task<string> Do(params string[] args)
    {
        ToolResult result = await Try(args);
        Assert.True(result.ExitCode == 0, $"{string.Join(' ', args)}: {result.Errors}");
        return result.Output;
    }

    /// <summary>Runs it; it must be refused with a reason.</summary>
    public async Task Refuse(string reason, params string[] args)
    {
        ToolResult result = await Try(args);
        Assert.Equal(1, result.ExitCode);
        Assert.Contains(reason, result.Errors, StringComparison.Ordinal);
    }

    /// <summary>The list, by names.</summary>
    public async Task<Dictionary<string, JsonNode>> List()
        => JsonNode.Parse(await Do("--list", "--json"))!.AsArray()
            .ToDictionary(entry => entry!["name"]!.GetValue<string>(), entry => entry!);

    /// <summary>The names of exports that are served.</summary>
    public async Task<string[]> Served()
        => [.. (await List()).Where(e => e.Value["state"]!.GetValue<string>() == "served").Select(e => e.Key).Order()];

    private static bool IsOpen(string socketPath)
    {
        try
        {
            using var socket = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
            socket.Connect(new UnixDomainSocketEndPoint(socketPath));
            return true;
        }
        catch (SocketException)
        {
            return false;
        }
    }

    public void Dispose() => Server.Dispose();
}
