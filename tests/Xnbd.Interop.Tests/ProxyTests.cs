using System.Diagnostics;
using System.Net.Sockets;
using System.Text.Json;
using Xnbd.Protocol;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>Starts proxies, with file names that all tests share.</summary>
internal static class Proxies
{
    public static string Control { get; } = Path.Combine(ServerProcess.BinFolder, "xnbd-bgctl");

    public static string Socket(TempFolder folder) => folder.File("control");

    /// <summary>The state of the proxy of a folder.</summary>
    public static async Task<JsonElement> Query(TempFolder folder)
        => JsonDocument.Parse(await Tool.Succeed(Control, "--query", "--json", Socket(folder))).RootElement;

    /// <summary>A proxy of a server in the same folder.</summary>
    public static ServerProcess Start(TempFolder folder, ServerProcess origin, params string[] options)
        => Start(folder, "unix:" + origin.SocketPath, "-", options);

    public static ServerProcess Start(TempFolder folder, string host, string port, params string[] options)
    {
        string socket = folder.File("p" + Guid.NewGuid().ToString("N")[..6]);
        return ServerProcess.Start(
            socket,
            ["--proxy", "--unix", socket, .. options, host, port, folder.File(
                "cache.img"), folder.File("cache.map"), Socket(folder)]);
    }
}

/// <summary>The proxy mode and its control, with real clients and real origins.</summary>
public sealed class ProxyTests : IDisposable
{
    private const int Size = (8 << 20) + 1024;

    private readonly TempFolder _folder = new();
    private readonly string _image;
    private readonly byte[] _before;

    public ProxyTests()
    {
        _image = _folder.Random("origin.img", Size);
        _before = File.ReadAllBytes(_image);
    }

    public void Dispose() => _folder.Dispose();

    private static Task<ToolResult> Control(params string[] args) => Tool.Run(Proxies.Control, args);

    private Task<JsonElement> Query() => Proxies.Query(_folder);

    private async Task<long> Figure(string name) => (await Query()).GetProperty(name).GetInt64();

    public static TheoryData<string> Origins =>
    [
        "xnbd",
        "xnbd --oldstyle",
        "nbdkit",
        "nbdkit in any order",
        "nbdkit of small blocks",
        "qemu-nbd",
        "nbd-server",
        "proxy",
    ];

    [Theory]
    [MemberData(nameof(Origins))]
    public async Task Every_kind_of_origin_is_read_as_it_is(string kind)
    {
        string program = kind.Split(' ')[0];
        Assert.SkipWhen(program is not ("xnbd" or "proxy") && Tool.Find(program) is null, $"{program} is absent");
        string socket = _folder.File("origin");
        using var second = new TempFolder();
        using ServerProcess? first = kind == "proxy" ? ServerProcess.Start(_folder, _image, "--readonly") : null;
        using IDisposable origin = kind switch
        {
            "xnbd" => ServerProcess.Start(socket, ["--target", "--readonly", "--unix", socket, _image]),
            "xnbd --oldstyle"
                => ServerProcess.Start(socket, ["--target", "--readonly", "--oldstyle", "--unix", socket, _image]),
            "proxy"
                => ServerProcess.Start(
                    socket,
                    ["--proxy", "--unix", socket, "unix:" + first!.SocketPath, "-", second.File(
                        "c"), second.File("m"), second.File("s")]),
            _ => new ForeignServer(kind, _image, socket, _folder),
        };
        string name = kind == "nbd-server" ? "disk" : "";
        using ServerProcess proxy = Proxies.Start(_folder, "unix:" + socket, "-", "--target-exportname", name);
        await Tool.Succeed("qemu-img", "compare", "-f", "raw", "-F", "raw", _image, proxy.Uri);
        Wait.Until(() => Figure("cached-bytes").Result == Size, "all that was read is kept");
        await Tool.Succeed("nbdcopy", "--connections=4", proxy.Uri, _folder.File("seen"));
        Assert.Equal(_before, File.ReadAllBytes(_folder.File("seen")));
        Assert.InRange(await Figure("fetched-bytes"), Size, Size + 4096); // each block once
        Assert.Equal(_before, File.ReadAllBytes(_image));
    }

    [Fact]
    public async Task Writes_stay_here_and_fio_finds_what_it_wrote()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using (ServerProcess proxy = Proxies.Start(_folder, origin))
        {
            if (Tool.Find("fio") is not null)
            {
                await Tool.Succeed(
                    "fio", "--name=v", "--ioengine=nbd", $"--uri={proxy.Uri}", "--rw=randrw", "--bsrange=512-64k",
                    "--bs_unaligned", "--verify=crc32c", "--iodepth=16", "--size=8m", "--thread", "--verify_fatal=1");
            }

            Assert.Equal(0, proxy.Stop());
        }

        Assert.Equal(_before, File.ReadAllBytes(_image));
    }

    [Fact]
    public async Task A_disk_moves_under_running_clients()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using ServerProcess proxy = Proxies.Start(_folder, origin);
        using NbdTestClient client = proxy.Open();
        byte[] model = [.. _before];
        Write(client, model, 5000, 3000);
        Assert.Equal(NbdError.None, client.Try(NbdCommand.WriteZeroes, 1 << 20, 100_000));
        model.AsSpan(1 << 20, 100_000).Clear();

        ToolResult early = await Control("--switch", Proxies.Socket(_folder));
        Assert.Equal(1, early.ExitCode);
        Assert.Contains(
            "blocks of 4096 bytes are not cached yet, the first at byte 0", early.Errors, StringComparison.Ordinal);

        ToolResult cached = await Control("--progress", "--cache-all", Proxies.Socket(_folder));
        Assert.Equal((0, "all is cached\n"), (cached.ExitCode, cached.Output));
        Assert.Contains("100.0 %", cached.Errors, StringComparison.Ordinal);
        await Tool.Succeed(Proxies.Control, "--switch", Proxies.Socket(_folder));
        origin.Kill();
        Assert.Equal("target", (await Query()).GetProperty("mode").GetString());
        Assert.Equal(0, await Figure("remote-connections"));

        Assert.Equal(model, client.Read(0, Size)); // the session lives on
        Write(client, model, 123_456, 7000);
        Assert.Equal(NbdError.None, client.Try(NbdCommand.Flush, 0, 0));
        Assert.Equal(model, File.ReadAllBytes(_folder.File("cache.img")));
        proxy.Signal(10);
        Wait.Until(() => proxy.Log.Contains("snapshot complete", StringComparison.Ordinal), "snapshots work now");
        client.Dispose();
        Assert.Equal(0, proxy.Stop());
        using ServerProcess target = ServerProcess.Start(_folder, _folder.File("cache.img"));
    }

    private static void Write(NbdTestClient client, byte[] model, int offset, int length)
    {
        byte[] data = [.. Enumerable.Repeat((byte)(offset % 251), length)];
        Assert.Equal(NbdError.None, client.Write((ulong)offset, data));
        data.CopyTo(model, offset);
    }

    /// <summary>
    /// Like QEMU, which waits for a machine to arrive and reads the first block already, while the machine still runs
    /// and writes elsewhere.
    /// </summary>
    [Fact]
    public async Task What_was_fetched_before_the_machine_moved_is_given_up_durably()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image);
        byte[] model = [.. _before];
        using NbdTestClient old = origin.Open();
        using (ServerProcess proxy = Proxies.Start(_folder, origin))
        {
            using NbdTestClient next = proxy.Open();
            Assert.Equal(model[..8192], next.Read(0, 8192));
            Wait.Until(() => Figure("cached-blocks").Result == 2, "it is kept");
            Write(old, model, 0, 4096);
            Assert.Equal(_before[..8192], next.Read(0, 8192)); // that is what is fetched once
            await Tool.Succeed(Proxies.Control, "--invalidate", Proxies.Socket(_folder));
            proxy.Kill();
        }

        using ServerProcess again = Proxies.Start(_folder, origin);
        using NbdTestClient client = again.Open();
        Assert.Equal(0, await Figure("cached-blocks"));
        Assert.Equal(model, client.Read(0, Size));
        Write(client, model, 0, 100);
        ToolResult late = await Control("--invalidate", Proxies.Socket(_folder));
        Assert.Equal((1, ""), (late.ExitCode, late.Output));
        Assert.Contains("1 blocks were written here", late.Errors, StringComparison.Ordinal);
        await Tool.Succeed(Proxies.Control, "--cache-all", Proxies.Socket(_folder));
        await Tool.Succeed(Proxies.Control, "--switch", Proxies.Socket(_folder));
        Assert.Contains(
            "a target now", (await Control("--invalidate", Proxies.Socket(_folder))).Errors, StringComparison.Ordinal);
        Assert.Equal(model, client.Read(0, Size));
    }

    [Fact]
    public async Task SIGUSR2_switches_too()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using ServerProcess proxy = Proxies.Start(_folder, origin);
        proxy.Signal(12);
        Wait.Until(() => proxy.Log.Contains("not switched", StringComparison.Ordinal), "it is refused");
        await Tool.Succeed(Proxies.Control, "--cache-all2", Proxies.Socket(_folder));
        proxy.Signal(12);
        Wait.Until(() => proxy.Log.Contains("switched: this is a target now", StringComparison.Ordinal), "it is done");
    }

    [Fact]
    public async Task State_is_kept_and_what_does_not_match_is_refused()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using (ServerProcess proxy = Proxies.Start(_folder, origin))
        {
            using NbdTestClient client = proxy.Open();
            client.Read(0, 1 << 20);
            client.Write(2 << 20, [.. Enumerable.Repeat((byte)7, 4096)]);
            client.Dispose();
            Assert.Equal(0, proxy.Stop());
        }

        byte[] map = File.ReadAllBytes(_folder.File("cache.map"));
        using (ServerProcess proxy = Proxies.Start(_folder, origin))
        {
            Assert.Equal(257, await Figure("cached-blocks"));
            Assert.Equal(1, await Figure("written-blocks"));
            using NbdTestClient client = proxy.Open();
            Assert.Equal(_before[..4096], client.Read(0, 4096));
            Assert.Equal(0, await Figure("fetched-bytes"));
            Assert.Contains("in use", Refused(origin), StringComparison.Ordinal); // the cache's files
            client.Dispose();
            Assert.Equal(0, proxy.Stop());
        }

        string otherImage = _folder.Random("other.img", Size), longer = _folder.Random("longer.img", Size + 4096);
        using ServerProcess other = ServerProcess.Start(_folder, otherImage);
        using ServerProcess long_ = ServerProcess.Start(_folder, longer);
        Assert.Contains("--rebind", Refused(other), StringComparison.Ordinal);
        Assert.Contains($"the export has {Size + 4096} bytes, not {Size}", Refused(long_), StringComparison.Ordinal);
        Assert.Equal(map, File.ReadAllBytes(_folder.File("cache.map")));
        Proxies.Start(_folder, other, "--rebind").Dispose();

        byte[] damaged = File.ReadAllBytes(_folder.File("cache.map"));
        damaged[100] ^= 1;
        damaged[4196] ^= 1;
        File.WriteAllBytes(_folder.File("cache.map"), damaged);
        Assert.Contains("damaged", Refused(other), StringComparison.Ordinal);
        Assert.Equal(damaged, File.ReadAllBytes(_folder.File("cache.map")));
        File.WriteAllBytes(_folder.File("cache.map"), map);
        File.Delete(_folder.File("cache.img")); // a map without its image must not show zeroes
        Assert.Contains("cache.img", Refused(origin), StringComparison.Ordinal);
        using ServerProcess cleared = Proxies.Start(_folder, origin, "--clear-bitmap");
        Assert.Equal(0, await Figure("cached-blocks"));
    }

    /// <summary>A mistake in the five arguments must not cost a file.</summary>
    [Fact]
    public void Files_that_are_named_twice_are_refused_and_left_alone()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        string one
            = _folder.File("one"), two = _folder.File("two"), three = _folder.File("three"), socket = _folder.File("s");
        string folder = Directory.CreateSymbolicLink(_folder.File("link"), Path.GetDirectoryName(one)!).FullName;
        Refused("cannot be both the cache image and its map", one, one, three);
        Assert.False(File.Exists(one));
        Refused("cannot be both the cache image and its map", one, Path.Combine(folder, "one"), three);
        Refused("the path of a Unix socket has 1 to 107 bytes", one, two, "/tmp/" + new string('x', 103));
        Refused("there is another file of that name", one, two, one);
        Refused("there is another file of that name", one, two, two);
        Assert.Equal(Size, new FileInfo(one).Length);
        using ServerProcess proxy = ServerProcess.Start(
            socket, ["--proxy", "--unix", socket, "unix:" + origin.SocketPath, "-", one, two, three]);

        void Refused(string message, params string[] files)
        {
            string[] arguments = ["--proxy", "--unix", socket, "unix:" + origin.SocketPath, "-", .. files];
            var refused = Assert.Throws<InvalidOperationException>(() => ServerProcess.Start(socket, arguments));
            Assert.Contains(message, refused.Message, StringComparison.Ordinal);
        }
    }

    private string Refused(ServerProcess origin, params string[] options)
        => Assert.Throws<InvalidOperationException>(() => Proxies.Start(_folder, origin, options)).Message;

    [Fact]
    public async Task A_bitmap_of_the_original_is_imported_on_request()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        byte[] bitmap = new byte[((Size / 4096) + 1 + 63) / 64 * 8];
        bitmap[0] = 0b10; // block 1 is cached
        File.WriteAllBytes(_folder.File("cache.map"), bitmap);
        byte[] cache = new byte[Size];
        cache.AsSpan(4096, 4096).Fill(9);
        File.WriteAllBytes(_folder.File("cache.img"), cache);
        Assert.Contains("--import-bitmap", Refused(origin), StringComparison.Ordinal);
        // A mistake in a name: no block of the image may count as missing.
        File.Move(_folder.File("cache.map"), _folder.File("other.map"));
        Assert.Contains("there is no bitmap", Refused(origin, "--import-bitmap"), StringComparison.Ordinal);
        Assert.Contains("holds data, and there is no map", Refused(origin), StringComparison.Ordinal);
        Assert.Equal(cache, File.ReadAllBytes(_folder.File("cache.img")));
        File.Move(_folder.File("other.map"), _folder.File("cache.map"));
        Assert.Equal(bitmap, File.ReadAllBytes(_folder.File("cache.map")));
        using ServerProcess proxy = Proxies.Start(_folder, origin, "--import-bitmap");
        using NbdTestClient client = proxy.Open();
        byte[] expected = [.. _before];
        expected.AsSpan(4096, 4096).Fill(9);
        Assert.Equal(expected, client.Read(0, Size));
        Assert.Equal(1, await Figure("written-blocks"));
    }

    [Fact]
    public async Task Read_only_proxies_fill_their_cache()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using ServerProcess proxy = Proxies.Start(_folder, origin, "--readonly");
        using NbdTestClient client = proxy.Open();
        Assert.Equal(NbdError.Permission, client.Write(0, new byte[4096]));
        Assert.Equal(_before[..100_000], client.Read(0, 100_000));
        Wait.Until(() => Figure("cached-blocks").Result >= 25, "what was read is kept");
        await Tool.Succeed(Proxies.Control, "--cache-all", Proxies.Socket(_folder));
    }

    [Fact]
    public async Task An_origin_that_dies_comes_back_or_is_replaced()
    {
        string socket = _folder.File("moving");
        using (ServerProcess first = ServerProcess.Start(socket, ["--target", "--readonly", "--unix", socket, _image]))
        using (ServerProcess proxy = Proxies.Start(_folder, first))
        {
            using NbdTestClient client = proxy.Open();
            Assert.Equal(_before[..4096], client.Read(0, 4096));
            first.Kill();
            client.SendRequest(NbdCommand.Read, 1 << 20, 4096); // waits
            using NbdTestClient warm = proxy.Open();
            Assert.Equal(_before[..4096], warm.Read(0, 4096)); // is local, and waits for nobody
            string[] target = ["--target", "--readonly", "--unix", socket, _image];
            using (ServerProcess again = ServerProcess.Start(socket, target))
            {
                Assert.True(client.ReceiveReply() is { IsLast: true, Error: NbdError.None });
                again.Kill();
            }

            client.SendRequest(NbdCommand.Read, 2 << 20, 4096);
            using ServerProcess elsewhere = ServerProcess.Start(_folder, _image, "--readonly");
            using ServerProcess shorter = ServerProcess.Start(_folder, _folder.Random("short", 1 << 20), "--readonly");
            ToolResult wrong = await Control("--reconnect", Proxies.Socket(_folder), "unix:" + shorter.SocketPath, "-");
            Assert.Equal(1, wrong.ExitCode);
            Assert.Contains("it is another disk", wrong.Errors, StringComparison.Ordinal);
            await Tool.Succeed(
                Proxies.Control, "--reconnect", Proxies.Socket(_folder), "unix:" + elsewhere.SocketPath, "-");
            Assert.True(client.ReceiveReply() is { IsLast: true, Error: NbdError.None });
            Assert.Contains(
                elsewhere.SocketPath, (await Query()).GetProperty("remote").GetString()!, StringComparison.Ordinal);
        }
    }

    [Fact]
    public async Task A_remote_that_starts_late_is_waited_for_also_by_name_over_TCP()
    {
        int port = ServerProcess.FreePort();
        string number = port.ToString(System.Globalization.CultureInfo.InvariantCulture), socket = _folder.File("o");
        Task<ServerProcess> late = Task.Run(async () =>
        {
            await Task.Delay(700, TestContext.Current.CancellationToken);
            return ServerProcess.Start(
                socket, ["--target", "--readonly", "--unix", socket, "--lport", number, "--export-name", "x", _image]);
        });
        using ServerProcess proxy = Proxies.Start(
            _folder,
            "localhost",
            number,
            "--wait-remote",
            "20",
            "--target-exportname",
            "x",
            "--remote-connections",
            "2");
        using ServerProcess origin = await late;
        Wait.Until(() => proxy.Log.Contains("waiting for the remote", StringComparison.Ordinal), "it is logged");
        using NbdTestClient client = proxy.Open();
        Assert.Equal(_before, client.Read(0, Size));
        Wait.Until(() => Figure("remote-connections").Result == 2, "both connections are made");
        string[] files = [_folder.File("c2"), _folder.File("m2"), _folder.File("s2")];
        var unknown = Assert.Throws<InvalidOperationException>(() => ServerProcess.Start(
            _folder.File("x"),
            ["--proxy", "--unix", _folder.File("x"), "--target-exportname", "y", "localhost", number, .. files]));
        Assert.Contains("the server has no such export", unknown.Message, StringComparison.Ordinal);
        Assert.False(File.Exists(_folder.File("c2")));
    }

    [Fact]
    public async Task Small_limits_stop_nobody()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using ServerProcess proxy = Proxies.Start(
            _folder, origin, "--max-queue-size", "1", "--max-buf-size", "2097152");
        byte[] model = [.. _before];
        using (NbdTestClient client = proxy.Open())
        {
            Write(client, model, (5 << 20) + 10, 5000); // holds two blocks, and needs to fetch both
            Assert.Equal(model[..(3 << 20)], client.Read(0, 3 << 20)); // more than may be under way
        }

        Task all = Tool.Succeed(Proxies.Control, "--cache-all", "--blocks-per-request", "3", Proxies.Socket(_folder));
        await Tool.Succeed("nbdcopy", "--connections=4", proxy.Uri, _folder.File("seen"));
        await all;
        Assert.Equal(model, File.ReadAllBytes(_folder.File("seen")));
        await Tool.Succeed(Proxies.Control, "--switch", Proxies.Socket(_folder));
    }

    /// <summary>The origin answers nothing. The second miss is not even received, and waiting takes no time.</summary>
    [Fact]
    public async Task At_its_limit_the_proxy_receives_no_more_and_sleeps()
    {
        using var held = new SemaphoreSlim(0);
        int asked = 0;
        using FakeServer origin = new FakeServer(_folder.File("o"), _before)
        {
            Flags = NbdTransmissionFlags.HasFlags | NbdTransmissionFlags.CanMultiConn,
            Answer = (_, _, request) =>
            {
                if (request.Offset >= 1 << 20)
                {
                    Interlocked.Increment(ref asked);
                    held.Wait();
                }

                return false;
            },
        }.Start();
        using ServerProcess proxy = Proxies.Start(_folder, "unix:" + origin.Path, "-", "--max-queue-size", "1");
        using NbdTestClient client = proxy.Open(), other = proxy.Open();
        Assert.Equal(_before[..4096], other.Read(0, 4096));
        Wait.Until(() => Figure("cached-blocks").Result == 1, "it is stored");
        client.SendRequest(NbdCommand.Read, 1 << 20, 4096);
        client.SendRequest(NbdCommand.Read, 3 << 20, 4096);
        client.SendRequest(NbdCommand.Read, 0, 4096); // local; but its client is not read any further
        Wait.Until(() => Figure("requests-in-flight").Result == 1, "the origin is asked");
        TimeSpan before = Process.GetProcessById(proxy.Id).TotalProcessorTime;
        Assert.False(client.Socket.Poll(1_000_000, SelectMode.SelectRead));
        Assert.InRange((Process.GetProcessById(proxy.Id).TotalProcessorTime - before).TotalMilliseconds, 0, 50);
        Assert.Equal(1, Volatile.Read(ref asked));
        Assert.Equal(_before[..4096], other.Read(0, 4096)); // a hit of another one waits for nobody
        held.Release(2);
        for (int i = 0; i < 3; i++)
            Assert.True(client.ReceiveReply() is { IsLast: true, Error: NbdError.None });
    }

    [Fact]
    public async Task A_remote_that_lies_is_named_in_the_log_and_nothing_of_it_is_kept()
    {
        using FakeServer origin = new FakeServer(_folder.File("o"), _before)
        {
            Answer = (peer, number, request) =>
            {
                if (number > 0)
                    return false;
                peer.SendData(NbdChunkFlags.Done, request.Cookie, request.Offset + 512, (int)request.Length); // shifted
                return true;
            },
        }.Start();
        using ServerProcess proxy = Proxies.Start(_folder, "unix:" + origin.Path, "-");
        using NbdTestClient client = proxy.Open();
        Assert.Equal(_before[..100_000], client.Read(0, 100_000));
        Wait.Until(
            () => proxy.Log.Contains("this is a fault of that server", StringComparison.Ordinal),
            "the culprit is named");
        await Tool.Succeed(Proxies.Control, "--cache-all", Proxies.Socket(_folder));
        await Tool.Succeed(Proxies.Control, "--switch", Proxies.Socket(_folder));
        Assert.Equal(_before, File.ReadAllBytes(_folder.File("cache.img")));
    }

    [Fact]
    public async Task A_remote_is_reached_by_IPv6()
    {
        string port = ServerProcess.FreePort().ToString(System.Globalization.CultureInfo.InvariantCulture);
        string socket = _folder.File("o");
        using ServerProcess origin = ServerProcess.Start(
            socket, ["--target", "--readonly", "--unix", socket, "--laddr", "::1", "--lport", port, _image]);
        using ServerProcess proxy = Proxies.Start(_folder, "[::1]", port);
        using NbdTestClient client = proxy.Open();
        Assert.Equal(_before, client.Read(0, Size));
        Assert.Equal($"nbd://[::1]:{port}/", (await Query()).GetProperty("remote").GetString());
    }

    /// <summary>A router that has lost its table tells nobody: what is sent is never answered.</summary>
    [Fact]
    public async Task A_line_that_has_forgotten_its_connections_costs_time_but_no_error()
    {
        using NetworkNamespace network = await NetworkNamespace.Create();
        string[] arguments = ["--target", "--readonly", "--laddr", network.Address, "--lport", "8520", _image];
        string[] server = [.. network.Prefix, ServerProcess.Executable, .. arguments];
        using Process origin = Process.Start(
            new ProcessStartInfo(Tool.Find(server[0])!, server[1..]) { RedirectStandardError = true })!;
        try
        {
            using ServerProcess proxy = Proxies.Start(_folder, network.Address, "8520", "--wait-remote", "20");
            using NbdTestClient client = proxy.Open();
            Assert.Equal(_before[..4096], client.Read(0, 4096));
            Wait.Until(() => Figure("remote-connections").Result == 4, "all connections are made");
            await network.ForgetConnections();
            Assert.Equal(_before[(1 << 20)..(2 << 20)], client.Read(1 << 20, 1 << 20));
            Assert.Contains("connection to the remote has broken", proxy.Log, StringComparison.Ordinal);
        }
        finally
        {
            origin.Kill();
        }
    }

    [Fact]
    public async Task A_block_device_is_a_cache_if_it_is_large_enough()
    {
        string backing = _folder.Sparse("backing", Size + 4096 - (Size % 4096));
        ToolResult loop = await Tool.Run("losetup", "--find", "--show", backing);
        Assert.SkipUnless(loop.ExitCode == 0, "no loop devices here");
        string device = loop.Output.Trim();
        try
        {
            using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
            string socket = _folder.File("p"), map = _folder.File("map");
            string[] Args(ServerProcess from)
                => ["--proxy", "--unix", socket, "unix:" + from.SocketPath, "-", device, map, Proxies.Socket(_folder)];
            byte[] model = [.. _before];
            using (ServerProcess proxy = ServerProcess.Start(socket, Args(origin)))
            {
                using NbdTestClient client = proxy.Open();
                Write(client, model, 10_000, 5000);
                Assert.Equal(model[..(1 << 20)], client.Read(0, 1 << 20));
                client.Dispose();
                Assert.Equal(0, proxy.Stop());
            }

            using (ServerProcess again = ServerProcess.Start(socket, Args(origin)))
            {
                await Tool.Succeed(Proxies.Control, "--cache-all", Proxies.Socket(_folder));
                await Tool.Succeed(Proxies.Control, "--switch", Proxies.Socket(_folder));
                using NbdTestClient client = again.Open();
                Assert.Equal(model, client.Read(0, Size));
                client.Dispose();
                Assert.Equal(0, again.Stop());
            }

            Assert.Equal(model, File.ReadAllBytes(backing)[..Size]);
            File.Delete(map);
            using ServerProcess larger = ServerProcess.Start(
                _folder, _folder.Random("larger", Size + (1 << 20)), "--readonly");
            var refused = Assert.Throws<InvalidOperationException>(() => ServerProcess.Start(socket, Args(larger)));
            Assert.Contains($"{Size + (1 << 20)} are needed", refused.Message, StringComparison.Ordinal);
            Assert.False(File.Exists(map));
        }
        finally
        {
            await Tool.Succeed("losetup", "--detach", device);
        }
    }

    /// <summary>An image like most: mostly empty.</summary>
    [Theory]
    [InlineData("xnbd")]
    [InlineData("nbdkit")]
    [InlineData("qemu-nbd")]
    [InlineData("proxy")]
    public async Task Only_the_data_of_a_sparse_image_are_fetched(string kind)
    {
        Assert.SkipWhen(kind is not ("xnbd" or "proxy") && Tool.Find(kind) is null, $"{kind} is absent");
        const int length = 2_000_000_000, data = 4 << 20;
        string sparse = _folder.Sparse("sparse.img", length), socket = _folder.File("origin");
        using (FileStream file = File.OpenWrite(sparse))
        {
            foreach (long place in (long[])[1_000_000, 1_500_000_000, length - (1 << 20)])
            {
                file.Position = place;
                file.Write(_before, 0, 1 << 20);
            }
        }

        using var second = new TempFolder();
        using ServerProcess? first = kind == "proxy" ? ServerProcess.Start(_folder, sparse, "--readonly") : null;
        using IDisposable origin = kind switch
        {
            "xnbd" => ServerProcess.Start(socket, ["--target", "--readonly", "--unix", socket, sparse]),
            "proxy"
                => ServerProcess.Start(
                    socket,
                    ["--proxy", "--unix", socket, "unix:" + first!.SocketPath, "-", second.File(
                        "c"), second.File("m"), second.File("s")]),
            _ => new ForeignServer(kind, sparse, socket, _folder),
        };
        using ServerProcess proxy = Proxies.Start(_folder, "unix:" + socket, "-");
        // The proxy starts without cached blocks.
        Assert.Contains("hole,zero", await Tool.Succeed("nbdinfo", "--map", proxy.Uri), StringComparison.Ordinal);
        await Tool.Succeed(Proxies.Control, "--cache-all", Proxies.Socket(_folder));
        Assert.InRange(await Figure("fetched-bytes"), 3 << 20, data);
        await Tool.Succeed("qemu-img", "compare", "-f", "raw", "-F", "raw", sparse, proxy.Uri);
        Assert.InRange(await Figure("fetched-bytes"), 3 << 20, data);
        await Tool.Succeed(Proxies.Control, "--switch", Proxies.Socket(_folder));
        await Tool.Succeed("cmp", sparse, _folder.File("cache.img"));
    }

    [Fact]
    public async Task Four_proxies_share_one_origin_each_with_its_own_writes()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        var proxies = new List<ServerProcess>();
        try
        {
            for (int i = 0; i < 4; i++)
            {
                string name = _folder.File("q" + i);
                string[] files = [name + ".img", name + ".map", name + ".ctl"];
                proxies.Add(ServerProcess.Start(
                    name, ["--proxy", "--unix", name, "unix:" + origin.SocketPath, "-", .. files]));
            }

            await Task.WhenAll(proxies.Select((proxy, i) => Task.Run(() =>
            {
                using NbdTestClient client = proxy.Open();
                byte[] model = [.. _before];
                Write(client, model, 10_000 + i, 5000);
                Assert.Equal(model, client.Read(0, Size));
            })));
        }
        finally
        {
            proxies.ForEach(proxy => proxy.Dispose());
        }

        Assert.Equal(_before, File.ReadAllBytes(_image));
    }

    [Fact]
    public async Task A_cache_that_is_full_still_serves_and_says_so()
    {
        using TmpfsMount small = await TmpfsMount.Create(_folder, "2m");
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        string socket = _folder.File("full"), control = _folder.File("full.ctl");
        using ServerProcess proxy = ServerProcess.Start(
            socket, ["--proxy", "--unix", socket, "unix:" + origin.SocketPath, "-", small.File(
                "c"), small.File("m"), control]);
        using NbdTestClient client = proxy.Open();
        Assert.Equal(_before, client.Read(0, Size));
        Assert.Equal(_before, client.Read(0, Size));
        ToolResult failed = await Control("--cache-all", control);
        Assert.Equal(1, failed.ExitCode);
        Assert.Contains("No space left", failed.Errors, StringComparison.Ordinal);
        JsonElement query = JsonDocument.Parse(
            await Tool.Succeed(Proxies.Control, "--query", "--json", control)).RootElement;
        Assert.InRange(query.GetProperty("store-failures").GetInt64(), 1, long.MaxValue);
        Assert.True(query.GetProperty("cached-blocks").GetInt64() < query.GetProperty("blocks").GetInt64());
    }

    /// <summary>A server of another project.</summary>
    private sealed class ForeignServer : IDisposable
    {
        private readonly Process _process;

        public ForeignServer(string program, string image, string socket, TempFolder folder)
        {
            string configuration = folder.File("nbd-server.conf");
            File.WriteAllText(
                configuration,
                $"[generic]\nunixsock = {socket}\nlistenaddr = 127.0.0.1\nport = {ServerProcess.FreePort()}\n"
                + $"[disk]\nexportname = {image}\nreadonly = true\n");
            string[] args = program switch
            {
                // Each read takes another time; and the next server refuses what is too long, or too fine.
                "nbdkit in any order" =>
                [
                    "-f", "-r", "-U", socket, "eval", "thread_model=echo parallel", $"get_size=stat -Lc %s {image}",
                    "pread=sleep 0.0$(($4 / 4096 * 7 % 10));"
                        + $" exec dd if={image} skip=$4 count=$3 iflag=skip_bytes,count_bytes status=none",
                ],
                "nbdkit of small blocks" =>
                [
                    "-f", "-r", "-U", socket, "--filter=blocksize-policy", "file", image, "blocksize-minimum=512",
                    "blocksize-preferred=4096", "blocksize-maximum=65536", "blocksize-error-policy=error",
                ],
                "nbdkit" => ["-f", "-r", "-U", socket, "file", image],
                "qemu-nbd" => ["-k", socket, "-r", "-f", "raw", "-t", "--shared=8", image],
                _ => ["-d", "-C", configuration],
            };
            _process = Process.Start(
                new ProcessStartInfo(Tool.Find(program.Split(' ')[0])!, args)
                {
                    RedirectStandardError = true,
                    RedirectStandardOutput = true,
                })!;
            Wait.Until(() => File.Exists(socket), $"{program} listens");
        }

        public void Dispose()
        {
            _process.Kill(entireProcessTree: true);
            _process.WaitForExit();
            _process.Dispose();
        }
    }
}
