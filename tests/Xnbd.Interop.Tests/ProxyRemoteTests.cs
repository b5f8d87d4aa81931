using System.Diagnostics;
using System.Text.Json;
using Xnbd.Protocol;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>A proxy whose remote goes away, comes back, or is replaced by another server.</summary>
public sealed class ProxyRemoteTests : IDisposable
{
    private const int Size = 4 << 20;

    private readonly TempFolder _folder = new();
    private readonly byte[] _bytes;
    private readonly string _image;

    public ProxyRemoteTests()
    {
        _image = _folder.Random("origin.img", Size);
        _bytes = File.ReadAllBytes(_image);
    }

    public void Dispose() => _folder.Dispose();

    private static Task<ToolResult> Control(params string[] args) => Tool.Run(Proxies.Control, args);

    private Task<JsonElement> Query() => Proxies.Query(_folder);

    private ServerProcess Serve(string name, string? image = null)
        => ServerProcess.Start(
            _folder.File(name), ["--target", "--readonly", "--unix", _folder.File(name), image ?? _image]);

    private string Host(string name) => "unix:" + _folder.File(name);

    private ServerProcess Start(string name, params string[] options)
        => Proxies.Start(_folder, Host(name), "-", options);

    private string Refused(string name, params string[] options)
        => Assert.Throws<InvalidOperationException>(() => Start(name, options).Dispose()).Message;

    private static void Logs(ServerProcess proxy, string text)
        => Wait.Until(() => proxy.Log.Contains(text, StringComparison.Ordinal), $"the log says: {text}");

    [Fact]
    public void Without_patience_misses_fail_at_once_and_a_cache_is_served_without_its_remote()
    {
        string[] options = ["--remote-timeout", "0"];
        Assert.Contains("there is no such socket", Refused("r", options), StringComparison.Ordinal); // nor a map
        using (ServerProcess origin = Serve("r"))
        using (ServerProcess proxy = Start("r", options))
        using (NbdTestClient client = proxy.Open())
        {
            Assert.Equal(_bytes[..4096], client.Read(0, 4096));
            Wait.Until(() => Query().Result.GetProperty("cached-blocks").GetInt64() == 1, "it is kept");
            origin.Kill();
            File.Delete(_folder.File("r"));
            Wait.Until(() => Query().Result.GetProperty("remote-connections").GetInt64() == 0, "it is lost");
            MustBeAway(client);
            client.Dispose();
            Assert.Equal(0, proxy.Stop());
        }

        using ServerProcess again = Start("r", options);
        Logs(again, "reads of missing blocks fail until it is there");
        using NbdTestClient next = again.Open();
        MustBeAway(next);
        using ServerProcess back = Serve("r");
        Wait.Until(() => Query().Result.GetProperty("remote-connections").GetInt64() > 0, "it is back");
        Assert.Equal(_bytes, next.Read(0, Size));

        void MustBeAway(NbdTestClient client)
        {
            long start = Stopwatch.GetTimestamp();
            Assert.Equal(NbdError.Io, client.Try(NbdCommand.Read, 1 << 20, 4096));
            Assert.Equal(_bytes[..4096], client.Read(0, 4096));
            Assert.InRange(Stopwatch.GetElapsedTime(start).TotalSeconds, 0, 3);
        }
    }

    [Fact]
    public void A_miss_waits_as_long_as_it_was_told_to_and_a_hit_does_not_wait()
    {
        using ServerProcess origin = Serve("r");
        using ServerProcess proxy = Start("r", "--remote-timeout", "2");
        using NbdTestClient missing = proxy.Open(), local = proxy.Open();
        Assert.Equal(_bytes[..4096], local.Read(0, 4096));
        Wait.Until(() => Query().Result.GetProperty("cached-blocks").GetInt64() == 1, "it is kept");
        origin.Signal(19); // it is silent, and not gone
        Wait.Until(
            () => File.ReadAllText($"/proc/{origin.Id}/stat").Contains(") T ", StringComparison.Ordinal), "it stands");
        try
        {
            long start = Stopwatch.GetTimestamp();
            missing.SendRequest(NbdCommand.Read, 1 << 20, 4096);
            Assert.Equal(_bytes[..4096], local.Read(0, 4096));
            Assert.InRange(Stopwatch.GetElapsedTime(start).TotalSeconds, 0, 1.5);
            Assert.Equal(NbdError.Io, missing.ReceiveReply().Error);
            Assert.InRange(Stopwatch.GetElapsedTime(start).TotalSeconds, 1.5, 8);
        }
        finally
        {
            origin.Signal(18);
        }

        Wait.Until(() => Query().Result.GetProperty("remote-connections").GetInt64() > 0, "it is back");
        Assert.Equal(_bytes, missing.Read(0, Size));
        Assert.Contains(
            "--remote-timeout -1: not a number", Refused("r", "--remote-timeout=-1"), StringComparison.Ordinal);
    }

    [Fact]
    public async Task Further_servers_take_over_if_they_have_the_same_disk()
    {
        string wrongImage = _folder.Random("wrong.img", Size, seed: 5), socket = Proxies.Socket(_folder);
        string Uri(string name) => $"nbd+unix:///?socket={_folder.File(name)}";
        string[] options = ["--remote", Uri("b"), "--remote", Uri("c")];
        using ServerProcess first = Serve("a"), wrong = Serve("b", wrongImage), third = Serve("c");
        using (ServerProcess proxy = Start("a", options))
        using (NbdTestClient client = proxy.Open())
        {
            Assert.Equal(_bytes[..4096], client.Read(0, 4096));
            Wait.Until(() => Query().Result.GetProperty("cached-blocks").GetInt64() == 1, "it is kept");
            first.Kill();
            Assert.Equal(_bytes, client.Read(0, Size));
            Assert.Equal(Uri("c"), (await Query()).GetProperty("remote").GetString());
            Logs(proxy, "is another disk");
            ToolResult refused = await Control("--reconnect", socket, Uri("b"));
            Assert.Equal((1, ""), (refused.ExitCode, refused.Output));
            Assert.Contains("is not the one that was fetched", refused.Errors, StringComparison.Ordinal);
            client.Dispose();
            Assert.Equal(0, proxy.Stop());
        }

        File.Delete(_folder.File("a"));
        using (ServerProcess again = Start("a", options)) // nor is the wrong one believed at the start
        {
            Assert.Equal(Uri("c"), (await Query()).GetProperty("remote").GetString());
            await Tool.Succeed(Proxies.Control, "--reconnect", socket, Uri("c"));
            Assert.Equal(0, again.Stop());
        }

        // The map names the third one now. Another disk is refused even though nothing is missing.
        Assert.Contains("is another disk", Refused("b"), StringComparison.Ordinal);
        Assert.Contains("is another disk", Refused("b", "--rebind"), StringComparison.Ordinal);
        using (ServerProcess same = Serve("d"))
        {
            Assert.Contains("--rebind", Refused("d"), StringComparison.Ordinal);
            Start("d", "--rebind", "--remote", Uri("c")).Dispose();
        }

        Assert.Contains("a URI is wanted", Refused("a", "--remote", "host"), StringComparison.Ordinal);
    }

    [Fact]
    public async Task As_long_as_nothing_is_kept_a_server_is_recognized_by_what_has_passed_through()
    {
        string wrongImage = _folder.Random("wrong.img", Size, seed: 5), socket = Proxies.Socket(_folder);
        string Uri(string name) => $"nbd+unix:///?socket={_folder.File(name)}";
        using ServerProcess first = Serve("a"), wrong = Serve("b", wrongImage), third = Serve("c");
        using ServerProcess proxy = Start("a", "--incoming", "--remote", Uri("b"), "--remote", Uri("c"));
        using NbdTestClient client = proxy.Open();
        Assert.Equal(_bytes[..8192], client.Read(0, 8192));
        ToolResult refused = await Control("--reconnect", socket, Uri("b"));
        Assert.Equal((1, ""), (refused.ExitCode, refused.Output));
        Assert.Contains("another disk", refused.Errors, StringComparison.Ordinal);
        first.Kill();
        Assert.Equal(_bytes, client.Read(0, Size));
        Assert.Equal(Uri("c"), (await Query()).GetProperty("remote").GetString());
        client.Dispose();
        Assert.Equal(0, proxy.Stop());
    }

    [Fact]
    public void After_a_restart_only_the_server_that_was_used_last_need_not_have_the_same_blocks()
    {
        string[] options = ["--remote", $"nbd+unix:///?socket={_folder.File("second")}"];
        using (ServerProcess second = Serve("second"))
        using (ServerProcess proxy = Start("first", options))
        using (NbdTestClient client = proxy.Open())
        {
            Assert.Equal(_bytes[..65536], client.Read(0, 65536));
            client.Dispose();
            Assert.Equal(0, proxy.Stop());
        }

        File.Delete(_folder.File("second"));
        using ServerProcess another = Serve("first", _folder.Random("another.img", Size, seed: 2));
        Assert.Contains("it is another disk", Refused("first", options), StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_job_that_waits_for_a_lost_remote_can_be_cancelled_or_goes_on_when_it_is_back()
    {
        string socket = Proxies.Socket(_folder);
        ServerProcess origin = Serve("r");
        using ServerProcess proxy = Start("r");
        origin.Kill();
        origin.Dispose();
        File.Delete(_folder.File("r"));
        await Tool.Succeed(Proxies.Control, "--cache-all", "--detach", socket);
        long start = Stopwatch.GetTimestamp();
        Assert.Contains("cancelled", await Tool.Succeed(Proxies.Control, "--cancel", socket), StringComparison.Ordinal);
        Assert.InRange(Stopwatch.GetElapsedTime(start).TotalSeconds, 0, 10);
        Task<string> all = Tool.Succeed(Proxies.Control, "--cache-all", socket);
        Wait.Until(() => IsWaiting().Result, "it waits");
        Assert.False(all.IsCompleted);
        using ServerProcess back = Serve("r");
        Assert.Equal("all is cached\n", await all);

        async Task<bool> IsWaiting()
        {
            JsonElement query = JsonDocument.Parse(
                await Tool.Succeed(Proxies.Control, "--query", "--json", socket)).RootElement;
            return query.GetProperty("job").GetProperty("state").GetString() == "running"
                && query.GetProperty("requests-in-flight").GetInt64() > 0;
        }
    }

    /// <summary>A read that comes back to where it began would wait for itself.</summary>
    [Fact]
    public async Task A_proxy_does_not_read_from_itself_nor_in_a_circle()
    {
        using var far = new TempFolder();
        using ServerProcess origin = Serve("r");
        using ServerProcess near = Start("r");
        using ServerProcess behind = Proxies.Start(far, near);
        foreach (ServerProcess through in (ServerProcess[])[near, behind])
        {
            ToolResult refused = await Control(
                "--reconnect", Proxies.Socket(_folder), "unix:" + through.SocketPath, "-");
            Assert.Equal((1, ""), (refused.ExitCode, refused.Output));
            Assert.Contains("go round in a circle", refused.Errors, StringComparison.Ordinal);
        }

        using NbdTestClient client = behind.Open();
        Assert.Equal(_bytes, client.Read(0, Size));
        // What has become a target reads from nobody.
        await Tool.Succeed(Proxies.Control, "--cache-all", Proxies.Socket(far));
        await Tool.Succeed(Proxies.Control, "--switch", Proxies.Socket(far));
        await Tool.Succeed(
            Proxies.Control, "--reconnect", Proxies.Socket(_folder), "unix:" + behind.SocketPath, "-");
    }
}
