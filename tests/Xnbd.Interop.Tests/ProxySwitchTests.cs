using System.Diagnostics;
using System.Text.Json;
using Xnbd.Protocol;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>The switch of a proxy, while its remote and its clients do their worst.</summary>
public sealed class ProxySwitchTests : IDisposable
{
    private const int Size = 8 << 20, Silent = 1 << 20; // from the second MiB on the remote may be silent

    private readonly TempFolder _folder = new();
    private readonly byte[] _bytes;
    private readonly string _image;

    public ProxySwitchTests()
    {
        _image = _folder.Random("origin.img", Size);
        _bytes = File.ReadAllBytes(_image);
    }

    public void Dispose() => _folder.Dispose();

    private static Task<ToolResult> Control(params string[] args) => Tool.Run(Proxies.Control, args);

    private Task<JsonElement> Query() => Proxies.Query(_folder);

    /// <summary>A remote that never answers certain reads, although it answers all others.</summary>
    private FakeServer Remote(Predicate<NbdRequest> isSilent) => new FakeServer(_folder.File("remote"), _bytes)
    {
        Flags = NbdTransmissionFlags.HasFlags | NbdTransmissionFlags.CanMultiConn,
        Answer = (_, _, request) => isSilent(request),
    }.Start();

    /// <summary>Reads a local block again and again until a task has ended.</summary>
    /// <returns>The longest time that a read took.</returns>
    private static TimeSpan ReadUntil(Task end, NbdTestClient client, byte[] expected)
    {
        TimeSpan longest = TimeSpan.Zero;
        do
        {
            long start = Stopwatch.GetTimestamp();
            Assert.Equal(expected, client.Read(0, (uint)expected.Length));
            TimeSpan time = Stopwatch.GetElapsedTime(start);
            longest = time > longest ? time : longest;
        }
        while (!end.IsCompleted);
        return longest;
    }

    [Fact]
    public async Task A_prefetch_from_a_silent_remote_stops_nobody_during_the_switch()
    {
        using FakeServer remote = Remote(request => request.Offset >= Silent);
        using ServerProcess proxy = Proxies.Start(_folder, "unix:" + remote.Path, "-");
        using NbdTestClient prefetching = proxy.Open(), writing = proxy.Open(), local = proxy.Open();
        Assert.Equal(_bytes[..4096], local.Read(0, 4096));
        prefetching.SendRequest(NbdCommand.Cache, 0, Size);
        // A part of a block: the rest never comes.
        writing.SendRequest(NbdCommand.Write, (3 * Silent) + 100, 3, payload: [1, 2, 3]);
        Wait.Until(() => Query().Result.GetProperty("requests-in-flight").GetInt64() >= 2, "the remote is asked");
        Task<ToolResult> switching = Control("--switch", "--force", Proxies.Socket(_folder));
        TimeSpan longest = ReadUntil(switching, local, _bytes[..4096]);
        Assert.Equal((0, ""), ((await switching).ExitCode, (await switching).Errors));
        Assert.InRange(longest.TotalSeconds, 0, 5); // before: until the remote's 30 seconds are over
        Assert.Equal(NbdError.None, writing.ReceiveReply().Error);
        Assert.Equal(NbdError.None, prefetching.ReceiveReply().Error);
        byte[] expected = new byte[4096];
        ((byte[])[1, 2, 3]).CopyTo(expected, 100);
        Assert.Equal(expected, local.Read(3 * Silent, 4096));
        Assert.Equal("target", (await Query()).GetProperty("mode").GetString());
    }

    /// <summary>
    /// The remote's process is stopped: connections stay, and nothing comes. Clients wait for it, a copy is under way,
    /// and an attempt to connect hangs in its handshake.
    /// </summary>
    [Fact]
    public async Task A_forced_switch_does_not_wait_for_a_remote_that_has_fallen_silent()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using ServerProcess proxy = Proxies.Start(_folder, origin);
        using NbdTestClient reading = proxy.Open(), writing = proxy.Open(), local = proxy.Open();
        Assert.Equal(_bytes[..4096], local.Read(0, 4096));
        Wait.Until(() => Query().Result.GetProperty("cached-blocks").GetInt64() == 1, "it is kept");
        origin.Signal(19);
        try
        {
            Task<ToolResult> hanging = Control(
                "--reconnect", Proxies.Socket(_folder), "unix:" + origin.SocketPath, "-");
            await Tool.Succeed(Proxies.Control, "--cache-all", "--detach", Proxies.Socket(_folder));
            reading.SendRequest(NbdCommand.Read, Silent, 4096);
            writing.SendRequest(NbdCommand.Write, (3 * Silent) + 100, 3, payload: [1, 2, 3]);
            Wait.Until(() => Query().Result.GetProperty("requests-in-flight").GetInt64() >= 2, "the remote is asked");
            long start = Stopwatch.GetTimestamp();
            await Tool.Succeed(Proxies.Control, "--switch", "--force", Proxies.Socket(_folder));
            Assert.InRange(Stopwatch.GetElapsedTime(start).TotalSeconds, 0, 3);
            Assert.Equal(NbdError.None, reading.ReceiveReply().Error);
            Assert.Equal(NbdError.None, writing.ReceiveReply().Error);
            Assert.InRange(Stopwatch.GetElapsedTime(start).TotalSeconds, 0, 4);
            byte[] expected = [.. _bytes[..4096], .. new byte[Size - 4096]];
            ((byte[])[1, 2, 3]).CopyTo(expected, (3 * Silent) + 100);
            Assert.Equal(expected, local.Read(0, Size));
            Assert.Equal(1, (await hanging).ExitCode);
            Wait.Until(
                () => proxy.Log.Contains("missing blocks became zeroes", StringComparison.Ordinal), "it is logged");
        }
        finally
        {
            origin.Signal(18);
        }
    }

    [Fact]
    public async Task A_read_that_is_never_answered_stops_no_switch()
    {
        using FakeServer remote = Remote(request => request.Offset == Silent);
        using ServerProcess proxy = Proxies.Start(_folder, "unix:" + remote.Path, "-");
        using NbdTestClient reading = proxy.Open(), local = proxy.Open();
        Assert.Equal(_bytes[..4096], local.Read(0, 4096));
        reading.SendRequest(NbdCommand.Read, Silent, 4096);
        Wait.Until(() => Query().Result.GetProperty("requests-in-flight").GetInt64() >= 1, "the remote is asked");
        byte[] written = [.. Enumerable.Repeat((byte)7, 4096)];
        Assert.Equal(NbdError.None, local.Write(Silent, written));
        await Tool.Succeed(Proxies.Control, "--cache-all", Proxies.Socket(_folder));
        Task<ToolResult> switching = Control("--switch", Proxies.Socket(_folder));
        Assert.InRange(ReadUntil(switching, local, _bytes[..4096]).TotalSeconds, 0, 5);
        Assert.Equal((0, ""), ((await switching).ExitCode, (await switching).Errors));
        Reply reply = reading.ReceiveReply();
        Assert.Equal(NbdError.None, reply.Error);
        Assert.Equal(written, NbdTestClient.Assemble([reply], Silent, 4096));
    }

    [Fact]
    public async Task The_end_amid_a_switch_is_clean()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        for (int round = 0; round < 10; round++)
        {
            using ServerProcess proxy = Proxies.Start(_folder, origin, "--clear-bitmap");
            await Tool.Succeed(Proxies.Control, "--cache-all", Proxies.Socket(_folder));
            using (NbdTestClient client = proxy.Open())
                Assert.Equal(NbdError.None, client.Try(NbdCommand.WriteZeroes, 4096, 1 << 20));
            proxy.Signal(12);
            Thread.Sleep(round); // a switch takes some milliseconds
            Assert.Equal(0, proxy.Stop());
            byte[] expected = [.. _bytes];
            expected.AsSpan(4096, 1 << 20).Clear();
            using ServerProcess again = Proxies.Start(_folder, origin);
            using NbdTestClient reader = again.Open();
            Assert.Equal(expected, reader.Read(0, Size));
        }
    }

    /// <summary>The old server is gone, and a service manager starts the proxy by the same command line.</summary>
    [Theory]
    [InlineData("stop")]
    [InlineData("kill")]
    public async Task A_proxy_that_was_switched_starts_again_as_a_target(string end)
    {
        string remote = _folder.File("r"), image = _folder.File("cache.img"), socket = Proxies.Socket(_folder);
        using (ServerProcess origin = ServerProcess.Start(
            remote, ["--target", "--readonly", "--unix", remote, _image]))
        using (ServerProcess proxy = Proxies.Start(_folder, origin))
        {
            await Tool.Succeed(Proxies.Control, "--cache-all", socket);
            await Tool.Succeed(Proxies.Control, "--switch", socket);
            using NbdTestClient client = proxy.Open();
            Assert.Equal(NbdError.None, client.Write(0, [1, 2, 3, 4]));
            if (end == "kill")
                proxy.Kill();
            else
                Assert.Equal(0, proxy.Stop());
        }

        byte[] expected = [1, 2, 3, 4, .. _bytes[4..]];
        string abandoned = image + ".snapshot.1.partial";
        File.WriteAllText(abandoned, "");
        byte[] map = File.ReadAllBytes(_folder.File("cache.map"));
        using (ServerProcess again = Proxies.Start(_folder, "unix:" + remote, "-"))
        {
            Wait.Until(
                () => again.Log.Contains("this proxy was switched before", StringComparison.Ordinal), "it is logged");
            Assert.False(File.Exists(abandoned));
            using NbdTestClient client = again.Open();
            Assert.Equal(expected, client.Read(0, Size));
            Assert.Equal(NbdError.None, client.Write(Size - 2, [9, 9]));
            (expected[^2], expected[^1]) = (9, 9);
            Assert.Equal(expected, File.ReadAllBytes(image));
            JsonElement state = await Query();
            Assert.Equal("target", state.GetProperty("mode").GetString());
            Assert.Equal(JsonValueKind.Null, state.GetProperty("remote").ValueKind);
            Assert.Equal(Size, state.GetProperty("cached-bytes").GetInt64());
            string shown = await Tool.Succeed(Proxies.Control, "--query", socket);
            Assert.Contains("remote:       none: the proxy was switched\n", shown, StringComparison.Ordinal);

            // What a script of the move does once more is done already.
            Assert.Equal("all is cached\n", await Tool.Succeed(Proxies.Control, "--cache-all", socket));
            Assert.Contains(
                "a target now", await Tool.Succeed(Proxies.Control, "--switch", socket), StringComparison.Ordinal);
            Assert.Equal(
                "this is a target now: there is no remote, and none is needed\n",
                await Tool.Succeed(Proxies.Control, "--reconnect", socket, "unix:" + remote, "-"));
            ToolResult invalidated = await Control("--invalidate", socket);
            Assert.Equal((1, ""), (invalidated.ExitCode, invalidated.Output));
            Assert.Contains("nothing here is a copy", invalidated.Errors, StringComparison.Ordinal);

            again.Signal(10); // as of a target, snapshots are taken
            Wait.Until(() => again.Log.Contains("snapshot complete", StringComparison.Ordinal), "a snapshot");
            Assert.Contains("in use", Refused(), StringComparison.Ordinal); // by the same command line once more
            Assert.Equal(map, File.ReadAllBytes(_folder.File("cache.map")));
        }

        // The same with --readonly; and then with files of another disk.
        using (ServerProcess reading = Proxies.Start(_folder, "unix:" + remote, "-", "--readonly"))
        using (NbdTestClient client = reading.Open())
        {
            Assert.Equal(expected, client.Read(0, Size));
            Assert.Equal(NbdError.Permission, client.Write(0, [1]));
        }

        Assert.Contains("--rebind", Refused("--target-exportname", "other"), StringComparison.Ordinal);
        Proxies.Start(_folder, "unix:" + remote, "-", "--target-exportname", "other", "--rebind").Dispose();
        File.WriteAllBytes(image, expected[..^1]);
        Assert.Contains($"has {Size - 1} bytes", Refused(), StringComparison.Ordinal);
        File.WriteAllBytes(image, [.. expected, 1]);
        using ServerProcess longer = Proxies.Start(_folder, "unix:" + remote, "-");
        using NbdTestClient last = longer.Open();
        Assert.Equal((ulong)Size, last.Size);
        Wait.Until(
            () => longer.Log.Contains("is 1 bytes longer than the disk", StringComparison.Ordinal), "it is said");

        string Refused(params string[] options)
            => Assert.Throws<InvalidOperationException>(
                () => Proxies.Start(_folder, "unix:" + remote, "-", options).Dispose()).Message;
    }

    [Fact]
    public async Task A_proxy_with_a_complete_cache_starts_without_its_remote_and_finds_it_later()
    {
        string remote = _folder.File("r"), socket = Proxies.Socket(_folder);
        string[] serve = ["--target", "--readonly", "--unix", remote, _image];
        using (ServerProcess origin = ServerProcess.Start(remote, serve))
        {
            using (ServerProcess proxy = Proxies.Start(_folder, origin))
            using (NbdTestClient client = proxy.Open())
            {
                Assert.Equal(_bytes[..4096], client.Read(0, 4096));
                Wait.Until(() => Query().Result.GetProperty("cached-blocks").GetInt64() == 1, "it is kept");
                proxy.Kill();
            }

            origin.Kill();
            // Blocks are missing: nobody could say what is in them.
            Assert.Throws<InvalidOperationException>(() => Proxies.Start(_folder, "unix:" + remote, "-").Dispose());
        }

        using (ServerProcess origin = ServerProcess.Start(remote, serve))
        using (ServerProcess proxy = Proxies.Start(_folder, origin))
        {
            await Tool.Succeed(Proxies.Control, "--cache-all", socket);
            proxy.Kill();
        }

        using ServerProcess away = Proxies.Start(_folder, "unix:" + remote, "-");
        Wait.Until(
            () => away.Log.Contains("is not needed, since all is cached", StringComparison.Ordinal), "it is logged");
        using NbdTestClient local = away.Open();
        Assert.Equal(_bytes, local.Read(0, Size));
        Assert.Equal(NbdError.None, local.Write(100, [1, 2, 3]));
        Assert.Equal(NbdError.None, local.Try(NbdCommand.Flush, 0, 0));
        Assert.Equal("proxy", (await Query()).GetProperty("mode").GetString());
        Assert.Equal(0, (await Query()).GetProperty("remote-connections").GetInt64());
        using (ServerProcess origin = ServerProcess.Start(remote, serve))
        {
            Wait.Until(
                () => Query().Result.GetProperty("remote-connections").GetInt64() > 0, "the remote is connected again");
        }

        await Tool.Succeed(Proxies.Control, "--switch", socket);
        ((byte[])[1, 2, 3]).CopyTo(_bytes, 100);
        Assert.Equal(_bytes, File.ReadAllBytes(_folder.File("cache.img")));
    }
}
