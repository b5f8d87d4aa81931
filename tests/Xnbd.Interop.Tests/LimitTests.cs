using System.Globalization;
using System.Net.Sockets;
using System.Text.Json;
using Xnbd.Protocol;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>
/// The native server when threads or descriptors are scarce: it refuses new clients, and goes on serving the others.
/// </summary>
public sealed class LimitTests : IDisposable
{
    private const int Size = 8 << 20;

    private readonly TempFolder _folder = new();
    private readonly string _image;
    private readonly byte[] _before;
    private readonly List<NbdTestClient> _clients = [];

    public LimitTests()
    {
        _image = _folder.Random("origin.img", Size);
        _before = File.ReadAllBytes(_image);
    }

    public void Dispose()
    {
        _clients.ForEach(client => client.Dispose());
        _folder.Dispose();
    }

    private string[] ProxyArguments(string socket, string origin)
        => ["--proxy", "--unix", socket, "unix:" + origin, "-",
        _folder.File("cache.img"), _folder.File("cache.map"), Proxies.Socket(_folder)];

    private Task<JsonElement> Query() => Proxies.Query(_folder);

    private ServerProcess StartOrigin(string socket)
        => ServerProcess.Start(socket, ["--target", "--readonly", "--unix", socket, _image]);

    /// <summary>
    /// A command that runs the server as a separate user with a limited number of threads. The limit does not hold for
    /// root.
    /// </summary>
    private string[] WithThreads(int count)
    {
        Assert.SkipUnless(
            Environment.UserName == "root" && Tool.Find("setpriv") is not null && Tool.Find("prlimit") is not null,
            "another user is needed");
        string user = Random.Shared.Next(200_000, 2_000_000).ToString(CultureInfo.InvariantCulture);
        File.SetUnixFileMode(_folder.Path, (UnixFileMode)0b111_111_111);
        string copy = _folder.File("xnbd-server");
        File.Copy(Path.Combine(ServerProcess.BinFolder, "xnbd"), copy);
        File.SetUnixFileMode(copy, (UnixFileMode)0b111_101_101);
        return ["setpriv", $"--reuid={user}", "--clear-groups", "--", "prlimit", $"--nproc={count}", copy];
    }

    /// <summary>Connects clients until one is refused, which must be by a clean close.</summary>
    private void ConnectUntilRefused(Func<NbdTestClient> connect, int most)
    {
        for (int i = 0; i <= most; i++)
        {
            NbdTestClient client = connect();
            _clients.Add(client);
            try
            {
                client.Start();
                client.Enter();
            }
            catch (EndOfStreamException)
            {
                return;
            }
        }

        Assert.Fail($"{most} clients were let in");
    }

    [Fact]
    public async Task Without_threads_connected_clients_are_served_and_the_remote_comes_back()
    {
        string[] command = WithThreads(45);
        string origin = _folder.File("o"), socket = _folder.File("p");
        ServerProcess first = StartOrigin(origin);
        using (first)
        {
            File.SetUnixFileMode(origin, (UnixFileMode)0b111_111_111);
            using ServerProcess proxy =
                ServerProcess.StartCommand(socket, [.. command, .. ProxyArguments(socket, origin)]);
            ConnectUntilRefused(() => NbdTestClient.Connect(socket), 100);
            Wait.Until(() => proxy.Log.Contains("no thread to spare", StringComparison.Ordinal), "it is logged");
            NbdTestClient old = _clients[0];
            Assert.Equal(_before[..4096], old.Read(0, 4096)); // from the remote
            Assert.Equal(NbdError.None, old.Write(8192, _before[..4096]));
            Assert.Equal(NbdError.None, old.Try(NbdCommand.Flush, 0, 0));
            Assert.Equal("proxy", (await Query()).GetProperty("mode").GetString());
            await Task.WhenAll(Enumerable.Range(0, 4).Select(_ => Query())); // each gets its turn

            // What needs a thread reports the failure.
            proxy.Signal(12);
            Wait.Until(
                () => proxy.Log.Contains("not switched: the system has no thread", StringComparison.Ordinal),
                "the signal is answered");

            // Clients take the threads of the remote's connections. When the remote comes back, it has to wait for one.
            first.Kill();
            Wait.Until(
                () => proxy.Log.Contains("the remote cannot be used", StringComparison.Ordinal), "the remote is lost");
            ConnectUntilRefused(() => NbdTestClient.Connect(socket), 100);
            using ServerProcess second = StartOrigin(origin);
            File.SetUnixFileMode(origin, (UnixFileMode)0b111_111_111);
            Wait.Until(
                () => proxy.Log.Contains("cannot connect: the system has no thread", StringComparison.Ordinal),
                "the remote is there");
            Assert.Equal(_before[..4096], old.Read(0, 4096)); // from the cache
            Assert.Equal(0, (await Query()).GetProperty("remote-connections").GetInt32());
            for (int i = 0; i < 10; i++)
                _clients[^(i + 1)].Dispose();
            Assert.Equal(_before[(1 << 20)..(2 << 20)], old.Read(1 << 20, 1 << 20));
            await Tool.Succeed(Proxies.Control, "--cache-all", Proxies.Socket(_folder));

            // The end needs no thread.
            ConnectUntilRefused(() => NbdTestClient.Connect(socket), 100);
            proxy.Signal(ServerProcess.IsInterruptIgnored ? 15 : 2);
            Assert.Equal(0, proxy.WaitForExit());
        }
    }

    [Theory]
    [InlineData(3)]
    [InlineData(8)]
    public async Task Too_few_threads_for_the_start_are_reported(int threads)
    {
        string[] command = WithThreads(threads);
        File.SetUnixFileMode(_image, (UnixFileMode)0b111_111_111);
        ToolResult result = await Tool.Run(
            command[0], [.. command[1..], "--target", "--unix", _folder.File("s"), _image]);
        Assert.Equal(1, result.ExitCode);
        Assert.Contains("xnbd-server: the system has no thread", result.Errors, StringComparison.Ordinal);
        Assert.False(File.Exists(_folder.File("s")));
    }

    [Fact]
    public void The_limit_of_descriptors_is_raised_to_the_hard_limit()
    {
        Assert.SkipWhen(Tool.Find("prlimit") is null, "prlimit is absent");
        string socket = _folder.File("s");
        using ServerProcess server = ServerProcess.StartCommand(
            socket, ["prlimit", "--nofile=64:1024", ServerProcess.Executable, "--target", "--unix", socket, _image]);
        for (int i = 0; i < 200; i++)
        {
            _clients.Add(server.Open());
            Assert.Equal(_before[..16], _clients[i].Read(0, 16));
        }
    }

    [Fact]
    public async Task Beyond_the_limit_of_descriptors_new_clients_are_refused_and_all_else_goes_on()
    {
        Assert.SkipWhen(Tool.Find("prlimit") is null, "prlimit is absent");
        string origin = _folder.File("o"), socket = _folder.File("p");
        int port = ServerProcess.FreePort();
        ServerProcess first = StartOrigin(origin);
        using (first)
        {
            using ServerProcess proxy = ServerProcess.StartCommand(
                socket,
                [
                    "prlimit", "--nofile=100:100", ServerProcess.Executable,
                    "--lport", port.ToString(CultureInfo.InvariantCulture), .. ProxyArguments(socket, origin),
                ]);
            ConnectUntilRefused(() => NbdTestClient.Connect(port), 100);
            for (int i = 0; i < 50; i++)
                ConnectUntilRefused(() => NbdTestClient.Connect(socket), 20); // each one sees a close, not a reset
            Wait.Until(() => proxy.Log.Contains("descriptors is reached", StringComparison.Ordinal), "it is logged");
            Assert.InRange(
                proxy.Log.Split('\n').Count(line => line.Contains("refused", StringComparison.Ordinal)), 1, 10);

            // The lost remote frees its descriptors, and clients would take them.
            first.Kill();
            Wait.Until(
                () => proxy.Log.Contains("the remote cannot be used", StringComparison.Ordinal), "the remote is lost");
            ConnectUntilRefused(() => NbdTestClient.Connect(port), 20);
            using ServerProcess second = StartOrigin(origin);
            Wait.Until(() => Query().Result.GetProperty("remote-connections").GetInt32() == 4, "the remote is back");
            Assert.Equal(_before[(1 << 20)..(2 << 20)], _clients[0].Read(1 << 20, 1 << 20));
            await Tool.Succeed(Proxies.Control, "--cache-all", Proxies.Socket(_folder));
            await Tool.Succeed(Proxies.Control, "--switch", Proxies.Socket(_folder));
            proxy.Signal(10);
            Wait.Until(
                () => proxy.Log.Contains("snapshot complete", StringComparison.Ordinal),
                "a snapshot has what it needs");

            // When some clients leave, others find a place.
            for (int i = 0; i < 5; i++)
                _clients[i].Dispose();
            Wait.Until(() => Record.Exception(() => proxy.Open().Dispose()) is null, "there is room again");
            Assert.Equal(0, proxy.Stop());
        }
    }

    [Fact]
    public void Clients_that_wait_for_a_lost_remote_leave_it_the_descriptors_to_come_back()
    {
        Assert.SkipWhen(Tool.Find("prlimit") is null, "prlimit is absent");
        string origin = _folder.File("o"), socket = _folder.File("p");
        ServerProcess first = StartOrigin(origin);
        using (first)
        {
            using ServerProcess proxy = ServerProcess.StartCommand(
                socket, ["prlimit", "--nofile=100:100", ServerProcess.Executable, .. ProxyArguments(socket, origin)]);
            ConnectUntilRefused(() => NbdTestClient.Connect(socket), 100);
            _clients[^1].Dispose(); // the refused one
            _clients.RemoveAt(_clients.Count - 1);
            first.Kill();
            Wait.Until(
                () => proxy.Log.Contains("the remote cannot be used", StringComparison.Ordinal), "the remote is lost");

            // Each session with pending requests would take a descriptor by which it is woken.
            for (int i = 0; i < _clients.Count; i++)
                _clients[i].SendRequest(NbdCommand.Read, (ulong)i << 16, 4096);
            Wait.Until(
                () => Query().Result.GetProperty("requests-in-flight").GetInt32() == _clients.Count,
                "all of them wait");
            using ServerProcess second = StartOrigin(origin);
            // not EIO after 30 s
            Assert.All(_clients, client => Assert.Equal(NbdError.None, client.ReceiveReply().Error));
        }
    }

    [Fact]
    public void Clients_that_miss_and_leave_while_the_remote_is_away_leave_nothing_behind()
    {
        const int count = 1000, half = Size / 2;
        string origin = _folder.File("o"), socket = _folder.File("p");
        ServerProcess first = StartOrigin(origin);
        using ServerProcess proxy = ServerProcess.Start(socket, ProxyArguments(socket, origin));
        using NbdTestClient stays = proxy.Open();
        stays.Read(0, 256 * 1024);
        stays.Write(0, new byte[4096]);
        first.Dispose();
        long threads = proxy.Status("Threads"), memory = proxy.Status("VmRSS");
        int descriptors = proxy.OpenDescriptors;
        for (int round = 0; round < 2; round++)
        {
            for (int i = 0; i < count; i++)
            {
                NbdTestClient client = proxy.Open();
                _clients.Add(client);
                ulong offset = half + ((ulong)i * 4096);
                if (i % 8 == 0)
                    client.SendRequest(NbdCommand.Write, offset + 10, 5, payload: new byte[5]);
                else
                    client.SendRequest(NbdCommand.Read, offset, i % 2 == 0 ? 65536u : 4096u);
                if (i % 50 == 0)
                    AssertHitsAreServed(stays);
            }

            AssertHitsAreServed(stays);
            _clients.ForEach(client => client.Dispose());
            _clients.Clear();
            Wait.Until(() => proxy.OpenDescriptors <= descriptors, "descriptors are back");
        }

        Wait.Until(() => proxy.Status("Threads") <= threads + 40, "threads are back"); // some for disks stay
        AssertHitsAreServed(stays);
        Assert.InRange(proxy.Status("VmRSS"), 0, memory + (100 << 10));
        using ServerProcess second = StartOrigin(origin);
        Assert.Equal(_before[half..], stays.Read(half, half));
        Assert.Equal(0, Query().Result.GetProperty("requests-in-flight").GetInt32());

        static void AssertHitsAreServed(NbdTestClient client)
        {
            long start = Environment.TickCount64;
            Assert.Equal(NbdError.None, client.Write(512, new byte[512], NbdCommandFlags.Fua)); // takes a place
            Assert.Equal(NbdError.None, client.Write(8192, new byte[128 * 1024]));
            client.Read(0, 4096);
            Assert.InRange(Environment.TickCount64 - start, 0, 5000);
        }
    }

    /// <summary>
    /// A connect has a time limit, and needs no thread of the runtime: the server's queue is full.
    /// </summary>
    [Fact]
    public void A_remote_that_accepts_nobody_is_given_up_in_time()
    {
        string path = _folder.File("full");
        using var deaf = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        deaf.Bind(new UnixDomainSocketEndPoint(path));
        deaf.Listen(0);
        using NbdTestClient waiting = NbdTestClient.Connect(path);
        var refused = Assert.Throws<InvalidOperationException>(
            () => ServerProcess.Start(_folder.File("p"), ProxyArguments(_folder.File("p"), path)));
        Assert.Contains("timed out", refused.Message, StringComparison.Ordinal);
    }
}
