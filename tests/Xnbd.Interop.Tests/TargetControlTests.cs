using System.Text.Json;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>The control channel of targets and copy-on-write targets, with <c>xnbd-bgctl</c>.</summary>
public sealed class TargetControlTests : IDisposable
{
    private static readonly string s_bgctl = Path.Combine(ServerProcess.BinFolder, "xnbd-bgctl");

    private readonly TempFolder _folder = new();
    private readonly string _image;

    public TargetControlTests() => _image = _folder.Random("disk.img", 1 << 20);

    public void Dispose() => _folder.Dispose();

    private string Socket => _folder.File("ctl");

    private Task<ToolResult> Control(params string[] args) => Tool.Run(s_bgctl, [.. args, Socket]);

    [Fact]
    public async Task A_target_tells_its_state_and_its_clients()
    {
        using ServerProcess server = ServerProcess.Start(_folder, _image, "--control", Socket, "--export-name", "home");
        Assert.Equal(UnixFileMode.UserRead | UnixFileMode.UserWrite, File.GetUnixFileMode(Socket));
        using NbdTestClient client = server.Open();
        client.Read(0, 4096);
        client.Write(0, new byte[512]);
        using JsonDocument state = JsonDocument.Parse((await Control("--query", "--json")).Output);
        JsonElement root = state.RootElement;
        Assert.Equal("target", root.GetProperty("mode").GetString());
        Assert.Equal(_image, root.GetProperty("image").GetString());
        Assert.Equal(1, root.GetProperty("clients").GetInt32());
        Assert.Equal(4096, root.GetProperty("read-bytes").GetInt64());
        Assert.Equal(512, root.GetProperty("written-bytes").GetInt64());
        string text = (await Control("--query")).Output;
        Assert.Contains("image:", text, StringComparison.Ordinal);
        Assert.Contains("1 connections", text, StringComparison.Ordinal);
        string clients = (await Control("--clients")).Output;
        Assert.Matches(@"local socket +home +\d{4}-\d\d-\d\dT.* +\S.* +\S.* +2 +0", clients);
    }

    [Fact]
    public async Task A_snapshot_is_made_on_demand_and_its_name_is_said()
    {
        using ServerProcess server = ServerProcess.Start(_folder, _image, "--control", Socket);
        ToolResult made = await Control("--snapshot");
        Assert.Equal((0, ""), (made.ExitCode, made.Errors));
        string path = made.Output.Trim();
        Assert.Equal(File.ReadAllBytes(_image), File.ReadAllBytes(path));
        Assert.Contains($"snapshot:     {path}", (await Control("--query")).Output, StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_copy_on_write_target_has_no_snapshots_and_none_has_what_only_proxies_can_do()
    {
        using ServerProcess server = ServerProcess.StartMode("--cow-target", _folder, _image, "--control", Socket);
        ToolResult snapshot = await Control("--snapshot");
        Assert.Equal(1, snapshot.ExitCode);
        Assert.Contains("of the target mode's images", snapshot.Errors, StringComparison.Ordinal);
        Assert.Contains("lost when the server ends", (await Control("--query")).Output, StringComparison.Ordinal);
        ToolResult move = await Control("--move");
        Assert.Equal(1, move.ExitCode);
        Assert.Contains("there is no method 'move' in this mode", move.Errors, StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_proxy_refuses_the_option_and_lists_its_clients()
    {
        ToolResult refused = await Tool.Run(
            ServerProcess.Executable, ["--proxy", "--control", "c", "h", "1", "cache", "map", "ctl"]);
        Assert.Equal(2, refused.ExitCode);
        Assert.Contains("--control", refused.Errors, StringComparison.Ordinal);
        ToolResult inetd = await Tool.Run(ServerProcess.Executable, ["--target", "--inetd", "--control", "c", _image]);
        Assert.Equal(2, inetd.ExitCode);
    }
}
