using System.Diagnostics;
using System.Net.Sockets;
using System.Text;
using System.Text.Json;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>The proxy's control channel, and xnbd-bgctl, with clients of all kinds.</summary>
public sealed class ProxyControlTests : IDisposable
{
    private const int Size = 8 << 20;

    private readonly TempFolder _folder = new();
    private readonly string _image;

    public ProxyControlTests() => _image = _folder.Random("origin.img", Size);

    public void Dispose() => _folder.Dispose();

    private static Task<ToolResult> Control(params string[] args) => Tool.Run(Proxies.Control, args);

    private Task<JsonElement> Query() => Proxies.Query(_folder);

    private async Task<string?> JobState()
        => (await Query()).GetProperty("job") is { ValueKind: JsonValueKind.Object } job
            ? job.GetProperty("state").GetString()
            : null;

    /// <summary>A call of the control channel, as a line of text.</summary>
    private static string Reconnect(string host)
        => $$$"""{"jsonrpc":"2.0","id":1,"method":"reconnect","params":{"host":"{{{host}}}","port":"-"}}""";

    /// <summary>An origin that takes long for each read, until it is told to hurry.</summary>
    private FakeServer SlowOrigin(ManualResetEventSlim hurry)
        => new FakeServer(_folder.File("slow"), File.ReadAllBytes(_image))
        {
            Answer = (_, _, _) =>
            {
                hurry.Wait(100);
                return false;
            },
        }.Start();

    [Fact]
    public async Task The_control_channel_answers_everybody_who_is_its_owner()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using ServerProcess proxy = Proxies.Start(_folder, origin);
        string path = Proxies.Socket(_folder);
        Assert.Equal(UnixFileMode.UserRead | UnixFileMode.UserWrite, File.GetUnixFileMode(path));
        using var silent = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        silent.Connect(new UnixDomainSocketEndPoint(path));
        silent.Send("{\"jsonrpc\""u8);

        using var raw = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        raw.Connect(new UnixDomainSocketEndPoint(path));
        using var reader = new StreamReader(new NetworkStream(raw));
        foreach ((string line, string part) in ((string, string)[])
        [
            ("{\"jsonrpc\":\"2.0\",\"id\":7,\"method\":\"query\"}", "\"id\":7,\"result\":{\"mode\":\"proxy\""),
            ("{\"jsonrpc\":\"2.0\",\"id\":\"a\",\"method\":\"frob\"}", "\"code\":-32601"),
            ("nonsense", "\"code\":-32700"),
            ("{\"jsonrpc\":\"2.0\",\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"query\"}", "\"error\""),
            ("{\"jsonrpc\":\"2.0\",\"id\":\"\\ud800\",\"method\":\"query\"}", "\"error\""),
            (Reconnect("unix:"), "\"code\":-32602"),
            (Reconnect("unix:/no/s"), "there is no such socket"),
            ("[]", "\"code\":-32600"),
            ("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"job.status\"}", "\"code\":-32602"),
            (
                """{"jsonrpc":"2.0","id":1,"method":"job.status","params":{"job":"x"}}""",
                "\"id\":1,\"error\":{\"code\":-32602"),
            (
                """{"jsonrpc":"2.0","id":1,"method":"cache-all","params":{"blocks-per-request":0}}""",
                "\"code\":-32602"),
            ("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"switch\"}", "not cached yet"),
        ])
        {
            raw.Send(Encoding.UTF8.GetBytes(line + "\n"));
            Assert.Contains(
                part, await reader.ReadLineAsync(TestContext.Current.CancellationToken), StringComparison.Ordinal);
        }

        raw.Send(new byte[70_000]);
        Assert.Contains(
            "longer than", await reader.ReadLineAsync(TestContext.Current.CancellationToken), StringComparison.Ordinal);
        Assert.Equal("proxy", (await Query()).GetProperty("mode").GetString());

        string socket = _folder.File("x"), otherImage = _folder.File("c2"), otherMap = _folder.File("m2");
        string[] other = ["--proxy", "--unix", socket, "unix:" + origin.SocketPath, "-", otherImage, otherMap, path];
        var refused = Assert.Throws<InvalidOperationException>(() => ServerProcess.Start(socket, other));
        Assert.Contains("control socket", refused.Message, StringComparison.Ordinal);
        if (Environment.UserName == "root" && Tool.Find("setpriv") is not null)
        {
            Directory.CreateDirectory(Path.GetDirectoryName(path)!).UnixFileMode |= UnixFileMode.OtherExecute;
            ToolResult stranger = await Tool.Run(
                "setpriv", "--reuid=65534", "--clear-groups", Proxies.Control, "--query", path);
            string message = $"xnbd-bgctl: the control socket '{path}' belongs to another user: run this program as the"
                + " server's own user, or as root\n";
            Assert.Equal((1, message), (stranger.ExitCode, stranger.Errors));
        }

        proxy.Kill(); // and a stale one is replaced
        using ServerProcess next = Proxies.Start(_folder, origin);
        Assert.Equal("proxy", (await Query()).GetProperty("mode").GetString());
        File.Delete(path); // and one that another one has replaced is not removed at the end
        using ServerProcess last = ServerProcess.Start(socket, other);
        Assert.Equal(0, next.Stop());
        Assert.Equal("proxy", (await Query()).GetProperty("mode").GetString());
        Assert.Equal(0, last.Stop());
        Assert.False(Path.Exists(path));
    }

    [Theory]
    [InlineData(2, "say what to do", "s")]
    [InlineData(2, "only one thing", "--query", "--switch", "s")]
    [InlineData(2, "--force goes with --switch", "--force", "--query", "s")]
    [InlineData(2, "SOCKET HOST PORT", "--reconnect", "s")]
    [InlineData(2, "TLS is not supported yet", "--reconnect", "s", "nbds://host")]
    [InlineData(2, "give one of them", "--reconnect", "--exportname", "x", "s", "nbd://host/y")]
    [InlineData(2, "SOCKET URI", "--reconnect", "s", "nbd://host", "10809")]
    [InlineData(2, "path of the control socket", "--query")]
    [InlineData(2, "unknown option '--bogus'", "--bogus", "--query", "s")]
    [InlineData(2, "--progress shows", "--cache-all", "--progress", "--detach", "s")]
    [InlineData(
        2, "--blocks-per-request abc: not a number from 1 to 256", "--cache-all", "--blocks-per-request", "abc", "s")]
    [InlineData(
        2, "--blocks-per-request 257: not a number from 1 to 256", "--cache-all", "--blocks-per-request", "257", "s")]
    [InlineData(2, "--interval goes with --watch only", "--query", "--interval", "2", "s")]
    [InlineData(2, "--interval 0: not a number from 1 to 3600", "--watch", "--interval", "0", "s")]
    [InlineData(2, "--query --json", "--watch", "--json", "s")]
    [InlineData(1, "there is no control socket", "--query", "/nonexistent/s")]
    [InlineData(1, "nobody listens", "--query", "/dev/null")]
    public async Task A_wrong_call_of_the_control_program_gets_one_clear_line(
        int exitCode, string message, params string[] args)
    {
        ToolResult result = await Control(args);
        Assert.Equal((exitCode, ""), (result.ExitCode, result.Output));
        Assert.StartsWith("xnbd-bgctl: ", result.Errors, StringComparison.Ordinal);
        Assert.Contains(message, result.Errors.Split('\n')[0], StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_URI_names_a_remote_wherever_one_is_named()
    {
        string folder = Directory.CreateDirectory(_folder.File("a b%c")).FullName, socket = Path.Combine(folder, "s");
        string uri = $"nbd+unix:///?socket={Uri.EscapeDataString(socket)}";
        string named = uri.Replace("///", "///disk%20one", StringComparison.Ordinal);
        using ServerProcess origin = ServerProcess.Start(
            socket, ["--target", "--readonly", "--export-name", "disk one", "--unix", socket, _image]);
        string unix = _folder.File("p");
        string[] files = [_folder.File("cache.img"), _folder.File("cache.map"), Proxies.Socket(_folder)];
        using (ServerProcess proxy = ServerProcess.Start(unix, ["--proxy", "--unix", unix, named, .. files]))
        {
            using NbdTestClient client = proxy.Open();
            Assert.Equal(File.ReadAllBytes(_image), client.Read(0, Size));
            string remote = (await Query()).GetProperty("remote").GetString()!;
            string escaped = folder.Replace("%", "%25", StringComparison.Ordinal)
                .Replace(" ", "%20", StringComparison.Ordinal);
            Assert.Equal($"nbd+unix:///disk%20one?socket={escaped}/s", remote);

            // Relative to the caller's folder, with the export given apart; and as it was shown.
            string call = $"cd '{folder}' && {Proxies.Control} --reconnect --exportname 'disk one' {files[2]}";
            ToolResult relative = await Tool.Run("sh", "-c", call + " 'nbd+unix:///?socket=s'");
            Assert.Equal((0, $"the remote is {remote} now\n"), (relative.ExitCode, relative.Output));
            await Tool.Succeed(Proxies.Control, "--reconnect", files[2], remote);
            string absent = uri.Replace("///", "///other", StringComparison.Ordinal);
            Assert.Contains(
                "no such export", (await Control("--reconnect", files[2], absent)).Errors, StringComparison.Ordinal);
            string shown = await Tool.Succeed(Proxies.Control, "--query", files[2]);
            Assert.Contains("disk:         8 MiB (8388608 bytes), 2048 blocks\n", shown, StringComparison.Ordinal);
            Assert.Contains(
                "cached:       8 MiB (8388608 bytes), 2048 blocks, 100.0 %\n", shown, StringComparison.Ordinal);
            client.Dispose();
            Assert.Equal(0, proxy.Stop());
        }

        string refused = Assert.Throws<InvalidOperationException>(() => ServerProcess.Start(
            unix, ["--proxy", "--target-exportname", "x", "--unix", unix, uri.Replace(
                "///", "///disk%20one", StringComparison.Ordinal), .. files])).Message;
        Assert.Contains("give one of them", refused, StringComparison.Ordinal);
        // The map recognizes it.
        ServerProcess.Start(
            unix, ["--proxy", "--target-exportname", "disk one", "--unix", unix, uri, .. files]).Dispose();
    }

    /// <summary>A name that is valid, but too long for the map.</summary>
    [Fact]
    public async Task A_remote_whose_address_is_too_long_to_be_recorded_is_not_used()
    {
        using FakeServer origin = new FakeServer(_folder.File("one"), File.ReadAllBytes(_image)).Start();
        using FakeServer other = new FakeServer(_folder.File("two"), new byte[Size]).Start();
        using ServerProcess proxy = Proxies.Start(_folder, "unix:" + origin.Path, "-");
        string socket = Proxies.Socket(_folder), remote = (await Query()).GetProperty("remote").GetString()!;
        string map = await Tool.Succeed("sha256sum", _folder.File("cache.map"));
        foreach (int length in (int[])[4000, 5000])
        {
            ToolResult refused = await Control(
                "--reconnect", "--exportname", new string('x', length), socket, "unix:" + other.Path, "-");
            Assert.Equal((1, ""), (refused.ExitCode, refused.Output));
            Assert.Contains(
                length == 4000 ? "too long to be recorded" : "longer than 4096 bytes",
                refused.Errors,
                StringComparison.Ordinal);
        }

        Assert.Equal(0, other.Count);
        Assert.Equal(remote, (await Query()).GetProperty("remote").GetString());
        Assert.Equal(map, await Tool.Succeed("sha256sum", _folder.File("cache.map")));
        using NbdTestClient client = proxy.Open();
        Assert.Equal(File.ReadAllBytes(_image), client.Read(0, Size));
    }

    /// <summary>A quarter of the disk is data, and only that crosses the line.</summary>
    [Fact]
    public async Task Progress_shows_zeroes_apart_from_fetched_data()
    {
        byte[] sparse = File.ReadAllBytes(_image);
        sparse.AsSpan(2 << 20).Clear();
        using FakeServer origin = new FakeServer(_folder.File("sparse"), sparse) { AllocationId = 5 }.Start();
        using ServerProcess proxy = Proxies.Start(_folder, "unix:" + origin.Path, "-");
        ToolResult cached = await Control("--cache-all", "--progress", Proxies.Socket(_folder));
        Assert.Equal((0, "all is cached\n"), (cached.ExitCode, cached.Output));
        Assert.Contains("100.0 %, fetched 2 MiB, ", cached.Errors, StringComparison.Ordinal);
        Assert.Contains(" MiB/s, zeroes 6 MiB\n", cached.Errors, StringComparison.Ordinal);
        JsonElement query = await Query();
        Assert.Equal(
            (2 << 20, 6 << 20),
            (query.GetProperty("fetched-bytes").GetInt64(), query.GetProperty("zero-bytes").GetInt64()));
    }

    [Fact]
    public async Task Silent_clients_do_not_disturb_a_client_that_works()
    {
        using var hurry = new ManualResetEventSlim();
        using FakeServer origin = SlowOrigin(hurry);
        using ServerProcess proxy = Proxies.Start(_folder, "unix:" + origin.Path, "-");
        Task<ToolResult> caching = Control("--cache-all", "--blocks-per-request", "16", Proxies.Socket(_folder));
        Wait.Until(() => JobState().Result == "running", "it is being cached");
        var silent = new List<Socket>();
        try
        {
            for (int i = 0; i < 10; i++)
            {
                var socket = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
                silent.Add(socket);
                socket.Connect(new UnixDomainSocketEndPoint(Proxies.Socket(_folder)));
            }

            hurry.Set();
            Assert.Equal((0, "all is cached\n"), ((await caching).ExitCode, (await caching).Output));
        }
        finally
        {
            silent.ForEach(socket => socket.Dispose());
        }
    }

    [Fact]
    public async Task A_job_that_is_detached_goes_on_can_be_waited_for_and_ended()
    {
        using var hurry = new ManualResetEventSlim();
        using FakeServer origin = SlowOrigin(hurry);
        using ServerProcess proxy = Proxies.Start(_folder, "unix:" + origin.Path, "-");
        string socket = Proxies.Socket(_folder);
        Assert.Contains(
            "is running",
            await Tool.Succeed(Proxies.Control, "--cache-all", "--detach", "--blocks-per-request", "16", socket),
            StringComparison.Ordinal);
        Assert.Equal("running", await JobState());
        Assert.Contains("cancelled", await Tool.Succeed(Proxies.Control, "--cancel", socket), StringComparison.Ordinal);
        Assert.Equal("cancelled", await JobState());
        Assert.Contains(
            "nothing is being cached", (await Control("--cancel", socket)).Errors, StringComparison.Ordinal);
        long cached = (await Query()).GetProperty("cached-blocks").GetInt64();
        Assert.InRange(cached, 0, (Size / 4096) - 1);
        Task<ToolResult> waiting = Control("--cache-all", "--progress", socket);
        Task<ToolResult> second = Control("--cache-all", "--json", socket);
        Wait.Until(() => JobState().Result == "running", "it is being cached");
        hurry.Set();
        Assert.Equal(0, (await waiting).ExitCode);
        Assert.Equal("done", JsonDocument.Parse((await second).Output).RootElement.GetProperty("state").GetString());
        Assert.Contains("100.0 %", (await waiting).Errors, StringComparison.Ordinal);
    }

    [Fact]
    public async Task Interrupted_without_a_terminal_the_caching_goes_on()
    {
        Skip.Unless(!ServerProcess.IsInterruptIgnored, "SIGINT is ignored here, as in a job in a shell's background");
        using var hurry = new ManualResetEventSlim();
        using FakeServer origin = SlowOrigin(hurry);
        using ServerProcess proxy = Proxies.Start(_folder, "unix:" + origin.Path, "-");
        using Process caching = Process.Start(new ProcessStartInfo(
            Proxies.Control, ["--cache-all", "--blocks-per-request", "16", Proxies.Socket(_folder)])
        {
            RedirectStandardError = true,
        })!;
        Wait.Until(() => JobState().Result == "running", "it is being cached");
        ServerProcess.Signal(caching.Id, 2);
        Assert.StartsWith(
            "xnbd-bgctl: interrupted",
            await caching.StandardError.ReadToEndAsync(TestContext.Current.CancellationToken),
            StringComparison.Ordinal);
        await caching.WaitForExitAsync(TestContext.Current.CancellationToken);
        Assert.Equal(1, caching.ExitCode);
        Assert.Equal("running", await JobState());
        Assert.Contains(
            "--cancel", (await Control("--invalidate", Proxies.Socket(_folder))).Errors, StringComparison.Ordinal);
        hurry.Set();
        Wait.Until(() => JobState().Result == "done", "it goes on to the end");
    }

    [Theory]
    [InlineData("y", "cancelled")]
    [InlineData("n", "running")]
    public async Task Interrupted_on_a_terminal_it_asks(string answer, string state)
    {
        Skip.Unless(!ServerProcess.IsInterruptIgnored, "SIGINT is ignored here, as in a job in a shell's background");
        Skip.Unless(Tool.Find("script") is not null, "script is absent");
        using var hurry = new ManualResetEventSlim();
        using FakeServer origin = SlowOrigin(hurry);
        using ServerProcess proxy = Proxies.Start(_folder, "unix:" + origin.Path, "-");
        // With exec, as a shell that stays would take the Ctrl-C, too, and end with 130 (dash stays, bash does not).
        string options = "--cache-all --progress --blocks-per-request 16";
        string command = $"exec {Proxies.Control} {options} {Proxies.Socket(_folder)}";
        using Process terminal = Process.Start(new ProcessStartInfo("script", ["-qefc", command, "/dev/null"])
        {
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
        })!;
        var shown = new StringBuilder();
        Task reading = Task.Run(() =>
        {
            for (int c; (c = terminal.StandardOutput.Read()) >= 0;)
            {
                lock (shown)
                    shown.Append((char)c);
            }
        });
        bool Shows(string text)
        {
            lock (shown)
                return shown.ToString().Contains(text, StringComparison.Ordinal);
        }

        Wait.Until(() => Shows("MiB/s"), "the bar is drawn");
        await terminal.StandardInput.WriteAsync('\x03');
        await terminal.StandardInput.FlushAsync(TestContext.Current.CancellationToken);
        Wait.Until(() => Shows("Stop caching?"), "it asks");
        await terminal.StandardInput.WriteAsync(answer + "\r");
        await terminal.StandardInput.FlushAsync(TestContext.Current.CancellationToken);
        Wait.Until(() => Shows("interrupted"), "it ends");
        await terminal.WaitForExitAsync(TestContext.Current.CancellationToken);
        await reading;
        Assert.Equal(1, terminal.ExitCode);
        Assert.Equal(state, await JobState());
        hurry.Set();
    }
}
