using System.Diagnostics;
using System.Text.Json;
using Xnbd.Protocol;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>The comparison with the remote, and the whole move by one command.</summary>
public sealed class ProxyMoveTests : IDisposable
{
    private const int Size = (8 << 20) + 1000, Block = 4096;

    private readonly TempFolder _folder = new();
    private readonly byte[] _bytes;
    private readonly string _image;

    public ProxyMoveTests()
    {
        _image = _folder.Random("origin.img", Size);
        _bytes = File.ReadAllBytes(_image);
        _bytes.AsSpan(1 << 20, 1 << 20).Clear(); // the remote reports this as zeroes
        File.Delete(_image);
        using FileStream image = File.Create(_image);
        image.Write(_bytes.AsSpan(0, 1 << 20));
        image.Position = 2 << 20;
        image.Write(_bytes.AsSpan(2 << 20));
    }

    public void Dispose() => _folder.Dispose();

    private string Socket => Proxies.Socket(_folder);

    private static Task<ToolResult> Control(params string[] args) => Tool.Run(Proxies.Control, args);

    private Task<JsonElement> Query() => Proxies.Query(_folder);

    private async Task<string?> Mode() => (await Query()).GetProperty("mode").GetString();

    /// <summary>Changes the cache image behind the proxy's back, as a bad disk does.</summary>
    private async Task Corrupt(params long[] offsets)
    {
        foreach (long offset in offsets) // the runtime would want the file's lock
        {
            string octal = Convert.ToString(_bytes[offset] ^ 0x55, 8);
            await Tool.Succeed(
                "sh",
                "-c",
                $"printf '\\{octal}' | dd of={_folder.File("cache.img")} bs=1 seek={offset} conv=notrunc status=none");
        }
    }

    [Fact]
    public async Task What_was_fetched_is_compared_and_differences_are_listed()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using ServerProcess proxy = Proxies.Start(_folder, origin);
        using NbdTestClient client = proxy.Open();
        Assert.Equal(
            "verified: 0 blocks that were fetched are as the remote has them\n",
            await Tool.Succeed(Proxies.Control, "--verify", Socket));
        Assert.Equal(NbdError.None, client.Write(0, new byte[Block])); // not as the remote has it, and right
        Assert.Equal(NbdError.None, client.Write((3 << 20) + 10, [1, 2, 3]));
        await Tool.Succeed(Proxies.Control, "--cache-all", Socket);
        ToolResult right = await Control("--verify", "--progress", Socket);
        Assert.Equal(
            (0, $"verified: {(Size / Block) + 1 - 2} blocks that were fetched are as the remote has them\n"),
            (right.ExitCode, right.Output));
        Assert.Contains("100.0 %, compared", right.Errors, StringComparison.Ordinal);
        Assert.Equal(
            Size - (1 << 20) - (2 * Block), // zeroes were not read
            (await Query()).GetProperty("job").GetProperty("verification").GetProperty("read-bytes").GetInt64());

        // The first and the last block, neighbours, a hole; and one that was written here.
        await Corrupt(Block, 5 * Block, (6 * Block) + 17, (1 << 20) + (9 * Block), Size - 1, 3 << 20);
        ToolResult wrong = await Control("--verify", Socket);
        Assert.Equal(
            $"differs: {Block} bytes at {Block}\ndiffers: {2 * Block} bytes at {5 * Block}\n"
            + $"differs: {Block} bytes at {(1 << 20) + (9 * Block)}\n"
            + $"differs: {Size % Block} bytes at {Size / Block * Block}\n",
            wrong.Output);
        Assert.Equal(1, wrong.ExitCode);
        Assert.Contains(
            "verifying: failed: 5 blocks of 4096 bytes are not as the remote has them, the first at byte 4096",
            wrong.Errors,
            StringComparison.Ordinal);
        JsonElement json = JsonDocument.Parse((await Control("--verify", "--json", Socket)).Output).RootElement;
        Assert.Equal(5, json.GetProperty("verification").GetProperty("different-blocks").GetInt64());
        string shown = await Tool.Succeed(Proxies.Control, "--query", Socket);
        Assert.Contains("verify:       failed: 5 blocks", shown, StringComparison.Ordinal);

        // Such a disk is not moved; and if the administrator says that it does not matter, it is.
        ToolResult refused = await Control("--move", Socket);
        Assert.Equal(1, refused.ExitCode);
        Assert.Contains("moving: failed: 5 blocks", refused.Errors, StringComparison.Ordinal);
        Assert.Contains("differs: 4096 bytes at 4096\n", refused.Output, StringComparison.Ordinal);
        Assert.Equal("proxy", await Mode());
        await Tool.Succeed(Proxies.Control, "--move", "--no-verify", Socket);
        Assert.Equal("target", await Mode());
        ToolResult late = await Control("--verify", Socket);
        Assert.Equal((1, ""), (late.ExitCode, late.Output));
        Assert.Contains("no remote to compare with", late.Errors, StringComparison.Ordinal);
    }

    [Fact]
    public async Task One_command_moves_a_disk_under_its_clients_and_goes_on_after_a_kill()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using (ServerProcess proxy = Proxies.Start(_folder, origin))
        {
            origin.Signal(19);
            await Tool.Succeed(Proxies.Control, "--move", "--detach", Socket);
            Assert.Equal("move", (await Query()).GetProperty("job").GetProperty("kind").GetString());
            ToolResult other = await Control("--verify", Socket);
            Assert.Contains("the disk is being moved: stop that first", other.Errors, StringComparison.Ordinal);
            Assert.Contains("is being moved", (await Control("--invalidate", Socket)).Errors, StringComparison.Ordinal);
            Task<ToolResult> joined = Control("--cache-all", Socket); // a part of it
            proxy.Kill();
            Assert.Equal(1, (await joined).ExitCode);
            origin.Signal(18);
        }

        using ServerProcess again = Proxies.Start(_folder, origin);
        using NbdTestClient client = again.Open();
        await Tool.Succeed(Proxies.Control, "--cache-all", "--detach", Socket); // which the move takes over
        Task<ToolResult> moving = Control("--move", "--progress", Socket);
        for (int round = 0; !moving.IsCompleted; round = (round + 1) % 100)
        {
            int offset = (4 << 20) + (round * 10_000);
            Assert.Equal(NbdError.None, client.Write((ulong)offset, [(byte)round, 1]));
            (_bytes[offset], _bytes[offset + 1]) = ((byte)round, 1);
        }

        ToolResult moved = await moving;
        Assert.Equal(("", 0), (moved.ExitCode == 0 ? "" : moved.Errors, moved.ExitCode));
        Assert.StartsWith(
            "moved: the cache image is served as a target now; the remote can be switched off\nverified: ",
            moved.Output,
            StringComparison.Ordinal);
        Assert.Contains("100.0 %, fetched", moved.Errors, StringComparison.Ordinal);
        Assert.Contains("100.0 %, compared", moved.Errors, StringComparison.Ordinal);
        origin.Kill();
        Assert.Equal(_bytes, client.Read(0, Size));
        Assert.Equal(_bytes, File.ReadAllBytes(_folder.File("cache.img")));
        // A script that moves once more is done at once.
        Assert.StartsWith(
            "moved: ", await Tool.Succeed(Proxies.Control, "--move", Socket), StringComparison.Ordinal);
    }

    /// <summary>A verification reads the remote, which may be lost in the middle.</summary>
    [Fact]
    public async Task A_comparison_waits_for_a_lost_remote_and_can_be_cancelled()
    {
        string remote = _folder.File("r");
        string[] serve = ["--target", "--readonly", "--unix", remote, _image];
        using ServerProcess proxy = StartAndFill(serve, remote);
        await Tool.Succeed(Proxies.Control, "--verify", "--detach", Socket);
        Assert.Contains(
            "what was fetched is being verified",
            (await Control("--cache-all", Socket)).Errors,
            StringComparison.Ordinal);
        Assert.Equal("verifying: cancelled\n", await Tool.Succeed(Proxies.Control, "--cancel", Socket));
        Task<string> verifying = Tool.Succeed(Proxies.Control, "--verify", Socket);
        using NbdTestClient client = proxy.Open();
        Assert.Equal(_bytes, client.Read(0, Size)); // which waits for nothing
        Assert.False(verifying.IsCompleted);
        using ServerProcess back = ServerProcess.Start(remote, serve);
        Assert.StartsWith("verified: ", await verifying, StringComparison.Ordinal);
    }

    /// <summary>Like QEMU, which reads the first block before the machine has come.</summary>
    [Fact]
    public async Task Nothing_is_kept_until_the_machine_has_come()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image);
        using NbdTestClient old = origin.Open();
        using (ServerProcess proxy = Proxies.Start(_folder, origin, "--incoming"))
        using (NbdTestClient next = proxy.Open())
        {
            for (int round = 0; round < 3; round++)
            {
                Assert.Equal(_bytes[..(2 * Block)], next.Read(0, 2 * Block));
                Assert.Equal(NbdError.None, next.Try(NbdCommand.Cache, 0, 1 << 20));
                Assert.Equal(NbdError.None, old.Write(100, [(byte)round, 7]));
                (_bytes[100], _bytes[101]) = ((byte)round, 7);
                if (round < 2)
                    continue;
                proxy.Kill(); // in the middle
            }
        }

        using (ServerProcess proxy = Proxies.Start(_folder, origin, "--incoming"))
        using (NbdTestClient next = proxy.Open())
        {
            Assert.Equal(_bytes, next.Read(0, Size));
            JsonElement state = await Query();
            Assert.Equal(0, state.GetProperty("cached-blocks").GetInt64());
            Assert.True(state.GetProperty("incoming").GetBoolean());
            Assert.Contains(
                "incoming:     nothing is kept",
                await Tool.Succeed(Proxies.Control, "--query", Socket),
                StringComparison.Ordinal);
            foreach (string[] early in (string[][])[["--cache-all"], ["--move"], ["--switch", "--force"]])
            {
                ToolResult refused = await Control([.. early, Socket]);
                Assert.Equal((1, ""), (refused.ExitCode, refused.Output));
                Assert.Contains("xnbd-bgctl --begin", refused.Errors, StringComparison.Ordinal);
            }

            // The machine has come, and writes a part of a block.
            Assert.Equal(NbdError.None, old.Write(8 * Block, [5]));
            _bytes[8 * Block] = 5;
            Assert.Equal(NbdError.None, next.Write((8 * Block) + 1, [6]));
            _bytes[(8 * Block) + 1] = 6;
            Assert.False((await Query()).GetProperty("incoming").GetBoolean());
            Assert.Equal(_bytes, next.Read(0, Size));
            Wait.Until(() => Query().Result.GetProperty("cached-bytes").GetInt64() == Size, "all is kept");
            Wait.Until(() => proxy.Log.Contains("a client has written", StringComparison.Ordinal), "it is logged");
            proxy.Kill();
        }

        using (ServerProcess again = Proxies.Start(_folder, origin, "--incoming"))
        {
            Assert.False((await Query()).GetProperty("incoming").GetBoolean());
            await Tool.Succeed(Proxies.Control, "--move", Socket);
            Assert.Equal(_bytes, File.ReadAllBytes(_folder.File("cache.img")));
            Assert.Equal(
                "nothing has changed: what is read is kept already\n",
                await Tool.Succeed(Proxies.Control, "--begin", Socket));
        }
    }

    [Fact]
    public async Task An_administrator_can_say_that_the_machine_has_come()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using ServerProcess proxy = Proxies.Start(_folder, origin, "--incoming", "--readonly");
        using NbdTestClient client = proxy.Open();
        Assert.Equal(
            "what is read from now on is kept\n", await Tool.Succeed(Proxies.Control, "--begin", Socket));
        Assert.Equal(_bytes[..Block], client.Read(0, Block));
        Wait.Until(() => Query().Result.GetProperty("cached-blocks").GetInt64() > 0, "it is kept");
        await Tool.Succeed(Proxies.Control, "--move", Socket);
        Assert.Equal("target", await Mode());
    }

    /// <summary>The remote answers one read after the other, and each takes its time.</summary>
    [Fact]
    public async Task Clients_that_miss_come_before_the_comparison()
    {
        using var isSlow = new ManualResetEventSlim();
        using FakeServer remote = new FakeServer(_folder.File("slow"), _bytes)
        {
            Answer = (_, _, _) =>
            {
                if (isSlow.IsSet)
                    Thread.Sleep(50);
                return false;
            },
        }.Start();
        using ServerProcess proxy = Proxies.Start(_folder, "unix:" + remote.Path, "-");
        using NbdTestClient client = proxy.Open();
        const int half = 4 << 20;
        Assert.Equal(_bytes[..half], client.Read(0, half));
        Wait.Until(() => Query().Result.GetProperty("cached-bytes").GetInt64() >= half, "half of it is kept");
        isSlow.Set();
        await Tool.Succeed(Proxies.Control, "--verify", "--detach", Socket);
        var times = new List<double>();
        for (int i = 0; i < 9; i++)
        {
            int offset = (Size - ((i + 1) * 100_000)) / Block * Block;
            long start = Stopwatch.GetTimestamp();
            Assert.Equal(_bytes[offset..(offset + Block)], client.Read((ulong)offset, Block));
            times.Add(Stopwatch.GetElapsedTime(start).TotalMilliseconds);
        }

        // The comparison has some 16 reads to make. A miss waits for those on the wire, and not for all of them.
        times.Sort();
        Assert.InRange(times[4], 50, 450);
        isSlow.Reset();
        JsonElement job = (await Query()).GetProperty("job");
        Assert.Equal("verify", job.GetProperty("kind").GetString());
        Wait.Until(
            () => Query().Result.GetProperty("job").GetProperty("state").GetString() == "done", "it is done");
    }

    /// <summary>A proxy whose cache is complete and whose remote is away.</summary>
    private ServerProcess StartAndFill(string[] serve, string remote)
    {
        using ServerProcess origin = ServerProcess.Start(remote, serve);
        ServerProcess proxy = Proxies.Start(_folder, origin);
        Tool.Succeed(Proxies.Control, "--cache-all", Socket).Wait();
        origin.Kill();
        File.Delete(remote);
        return proxy;
    }
}
