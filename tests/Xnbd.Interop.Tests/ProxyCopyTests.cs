using System.Diagnostics;
using System.Globalization;
using System.Text.Json;
using Xnbd.Protocol;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>The background copy as an operator wants it: not too fast, not now, and this first.</summary>
public sealed class ProxyCopyTests : IDisposable
{
    private const int Size = (8 << 20) + 1000, Block = 4096, Blocks = (Size / Block) + 1;

    private readonly TempFolder _folder = new();
    private readonly string _image;
    private readonly byte[] _bytes;

    public ProxyCopyTests()
    {
        _image = _folder.Random("origin.img", Size);
        _bytes = File.ReadAllBytes(_image);
    }

    public void Dispose() => _folder.Dispose();

    private string Socket => Proxies.Socket(_folder);

    private static Task<ToolResult> Control(params string[] args) => Tool.Run(Proxies.Control, args);

    private static Task<string> Succeed(params string[] args) => Tool.Succeed(Proxies.Control, args);

    private Task<JsonElement> Query() => Proxies.Query(_folder);

    private async Task<JsonElement> Job() => (await Query()).GetProperty("job");

    private async Task<long> Cached() => (await Query()).GetProperty("cached-blocks").GetInt64();

    private string List(params (int Offset, int Length)[] ranges)
    {
        string path = _folder.File("list" + Guid.NewGuid().ToString("N")[..6]);
        File.WriteAllLines(
            path, ranges.Select(r => string.Create(CultureInfo.InvariantCulture, $"0 {r.Offset} {r.Length}")));
        return path;
    }

    private void AssertRead(NbdTestClient client, int offset, uint length)
        => Assert.Equal(_bytes[offset..(offset + (int)length)], client.Read((ulong)offset, length));

    /// <summary>Whoever wants the copy compared is not told that it was moved when it was not compared.</summary>
    [Fact]
    public async Task A_move_that_verifies_does_not_join_one_that_does_not()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using ServerProcess proxy = Proxies.Start(_folder, origin);
        await Succeed("--pause", Socket);
        await Succeed("--move", "--no-verify", "--detach", Socket);
        ToolResult refused = await Control("--move", Socket);
        Assert.Equal(1, refused.ExitCode);
        Assert.Contains("the disk is being moved: stop that first", refused.Errors, StringComparison.Ordinal);
        await Succeed("--cancel", Socket);
        await Succeed("--move", "--detach", Socket);
        await Succeed("--move", "--no-verify", "--detach", Socket); // it joins
        await Succeed("--resume", Socket);
        Wait.Until(() => Query().Result.GetProperty("mode").GetString() == "target", "it is moved");
        Assert.Equal(JsonValueKind.Object, (await Job()).GetProperty("verification").ValueKind);
    }

    /// <summary>What is told to be done has been fetched, whatever another operator cancels meanwhile.</summary>
    [Fact]
    public async Task A_list_that_comes_while_another_one_is_cancelled_is_fetched_or_cancelled_as_well()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using ServerProcess proxy = Proxies.Start(_folder, origin);
        for (int round = 0; round < 20; round++)
        {
            int at = round * 64 * Block;
            await Succeed("--pause", Socket);
            await Succeed("--prefetch", List((at, 8 * Block)), "--detach", Socket);
            Task<ToolResult> cancel = Control("--cancel", Socket);
            Task<ToolResult> second = Control("--prefetch", List((at + (32 * Block), 8 * Block)), Socket);
            await cancel;
            await Succeed("--resume", Socket);
            ToolResult result = await second;
            if (result.ExitCode != 0)
                continue; // it has joined the first one
            using NbdTestClient client = proxy.Open();
            long misses = (await Query()).GetProperty("misses").GetInt64();
            AssertRead(client, at + (32 * Block), 8 * Block);
            Assert.Equal(misses, (await Query()).GetProperty("misses").GetInt64());
        }
    }

    [Fact]
    public async Task The_copy_is_limited_and_clients_are_not()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using ServerProcess proxy = Proxies.Start(_folder, origin, "--rate", "1M");
        using NbdTestClient client = proxy.Open();
        long start = Stopwatch.GetTimestamp();
        await Succeed("--cache-all", "--detach", Socket);
        AssertRead(client, 2 << 20, 6 << 20);
        double seconds = Stopwatch.GetElapsedTime(start).TotalSeconds;
        Assert.InRange(seconds, 0, 1.5); // six seconds at that rate
        Wait.Until(() => Cached().Result >= 7 << 8, "the client's MiB and one of the copy");
        Assert.InRange(Stopwatch.GetElapsedTime(start).TotalSeconds, 0.8, 10);
        Assert.Equal("running", (await Job()).GetProperty("state").GetString());
        Assert.Equal(1 << 20, (await Query()).GetProperty("max-copy-rate").GetInt64());
        Assert.Contains("at most 1 MiB", await Succeed("--query", Socket), StringComparison.Ordinal);

        // A wait that is under way ends, too.
        await Succeed("--set-rate", "1", Socket);
        Assert.Equal(
            "the background copy is not limited\n", await Succeed("--set-rate", "0", Socket));
        Assert.Equal("all is cached\n", await Succeed("--cache-all", Socket));
        Assert.Equal(JsonValueKind.Null, (await Query()).GetProperty("max-copy-rate").ValueKind);
    }

    [Fact]
    public async Task A_comparison_is_limited_too()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using ServerProcess proxy = Proxies.Start(_folder, origin);
        await Succeed("--cache-all", Socket);
        await Succeed("--set-rate", "4M", Socket);
        long start = Stopwatch.GetTimestamp();
        await Succeed("--verify", Socket);
        Assert.InRange(Stopwatch.GetElapsedTime(start).TotalSeconds, 1.7, 10);
    }

    [Fact]
    public async Task While_it_is_paused_only_what_clients_miss_is_fetched()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using ServerProcess proxy = Proxies.Start(_folder, origin);
        using NbdTestClient client = proxy.Open();
        Assert.Equal(
            "paused: nothing is copied in the background until --resume\n", await Succeed("--pause", Socket));
        await Succeed("--pause", Socket);
        await Succeed("--cache-all", "--detach", Socket);
        for (int i = 0; i < 20; i++)
            AssertRead(client, ((i * 37 % 20) * 100 * Block) + 10, 100);
        Wait.Until(() => Cached().Result == 20, "they are kept");
        Assert.True((await Job()).GetProperty("paused").GetBoolean());
        Assert.Contains("paused", await Succeed("--query", Socket), StringComparison.Ordinal);
        Assert.Equal(20, await Cached());
        Task<ToolResult> waits = Control("--cache-all", Socket);
        await Succeed("--resume", Socket);
        Assert.Equal("all is cached\n", (await waits).Output);
        Assert.False((await Job()).GetProperty("paused").GetBoolean());
    }

    [Fact]
    public async Task A_paused_job_can_be_cancelled_and_a_forced_switch_ends_it()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using ServerProcess proxy = Proxies.Start(_folder, origin);
        await Succeed("--pause", Socket);
        await Succeed("--move", "--detach", Socket);
        Assert.Equal("moving: cancelled\n", await Succeed("--cancel", Socket));
        await Succeed("--prefetch", List((0, Size)), "--detach", Socket);
        Assert.Equal("fetching the list: cancelled\n", await Succeed("--cancel", Socket));
        await Succeed("--cache-all", "--detach", Socket);
        await Succeed("--switch", "--force", Socket);
        Wait.Until(() => Job().Result.GetProperty("state").GetString() != "running", "the job ends");
        Assert.Equal("target", (await Query()).GetProperty("mode").GetString());
    }

    [Fact]
    public async Task A_paused_move_does_not_switch_although_nothing_is_left_to_fetch()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using ServerProcess proxy = Proxies.Start(_folder, origin);
        await Succeed("--cache-all", Socket);
        await Succeed("--pause", Socket);
        await Succeed("--move", "--no-verify", "--detach", Socket);
        Assert.Equal("fetch", (await Job()).GetProperty("phase").GetString());
        Assert.Equal("proxy", (await Query()).GetProperty("mode").GetString());
        await Succeed("--resume", Socket);
        Wait.Until(() => Query().Result.GetProperty("mode").GetString() == "target", "it has moved");
    }

    [Fact]
    public async Task What_one_server_has_recorded_is_fetched_by_a_proxy_and_nothing_else()
    {
        string record = _folder.File("record");
        using (ServerProcess recording = ServerProcess.Start(_folder, _image, "--record", record))
        {
            using NbdTestClient client = recording.Open();
            AssertRead(client, 5 << 20, 3 * Block);
            AssertRead(client, 100, 10);
            AssertRead(client, 5 << 20, 1 << 20);
            AssertRead(client, Size - 10, 10);
            const int part = (7 << 20) + 5;
            Assert.Equal(NbdError.None, client.Write(part, _bytes[part..(part + 5)]));
            Assert.Equal(0, recording.Stop());
        }

        Assert.Equal(
            [
                $"{5 << 20} {3 * Block}", $"0 {Block}", $"{(5 << 20) + (3 * Block)} {253 * Block}",
                $"{Size / Block * Block} {Block}", $"{7 << 20} {Block}",
            ],
            File.ReadLines(record).Skip(1).Select(line => line[(line.IndexOf(' ') + 1)..]));
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using ServerProcess proxy = Proxies.Start(_folder, origin);
        ToolResult result = await Control("--prefetch", record, "--progress", Socket);
        Assert.Equal((0, "what the list names is cached\n"), (result.ExitCode, result.Output));
        Assert.Contains("100.0 %", result.Errors, StringComparison.Ordinal);
        Assert.Equal(259, await Cached());
        using NbdTestClient booting = proxy.Open();
        AssertRead(booting, 5 << 20, 1 << 20);
        AssertRead(booting, 0, Block);
        Assert.Equal(0, (await Query()).GetProperty("misses").GetInt64());
    }

    [Fact]
    public async Task A_list_comes_first_in_a_copy_that_is_under_way_and_a_copy_takes_over_a_list()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using ServerProcess proxy = Proxies.Start(_folder, origin, "--rate", "256K");
        await Succeed("--cache-all", "--detach", Socket);
        Assert.Equal(
            "caching all already: what the list names comes first now\n",
            await Succeed("--prefetch", List((6 << 20, 64 << 10)), Socket));
        using NbdTestClient client = proxy.Open();
        Wait.Until(() => Cached().Result >= 64, "half a second of the copy");
        AssertRead(client, 6 << 20, 64 << 10);
        Assert.Equal(0, (await Query()).GetProperty("misses").GetInt64());
        await Succeed("--cancel", Socket);

        await Succeed("--pause", Socket);
        await Succeed("--prefetch", List((7 << 20, 64 << 10)), "--detach", Socket);
        await Succeed("--move", "--no-verify", "--detach", Socket);
        Assert.Equal("move", (await Job()).GetProperty("kind").GetString());
        await Succeed("--set-rate", "0", Socket);
        await Succeed("--resume", Socket);
        Wait.Until(() => Query().Result.GetProperty("mode").GetString() == "target", "it has moved");
        AssertRead(client, 0, Size);
    }

    [Fact]
    public async Task What_makes_no_sense_is_refused_and_nothing_changes()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using ServerProcess proxy = Proxies.Start(_folder, origin, "--incoming");
        foreach ((string reason, int code, string[] args) in ((string, int, string[])[])
        [
            ("nothing of it is kept", 1, ["--prefetch", List((0, Block)), Socket]),
            ("outside of the disk", 1, ["--prefetch", List((0, Block), (9 << 20, Block)), Socket]),
            ("the record cannot be read", 1, ["--prefetch", _folder.File("absent"), Socket]),
            ("not a number of bytes per second", 2, ["--set-rate", "fast", Socket]),
            ("not a number of bytes per second", 2, ["--set-rate", "-1", Socket]),
            ("not a number of bytes per second", 2, ["--set-rate", "9999999T", Socket]),
            ("only one thing", 2, ["--pause", "--resume", Socket]),
            ("--detach goes with", 2, ["--pause", "--detach", Socket]),
        ])
        {
            ToolResult result = await Control(args);
            Assert.Equal((code, ""), (result.ExitCode, result.Output));
            Assert.Contains(reason, result.Errors, StringComparison.Ordinal);
        }

        Assert.Equal(0, await Cached());
        Assert.Equal(JsonValueKind.Null, (await Query()).GetProperty("job").ValueKind);
        string server = Path.Combine(ServerProcess.BinFolder, "xnbd-server");
        foreach ((string reason, int code, string[] args) in ((string, int, string[])[])
        [
            ("--rate 5X: not a number", 2, ["--proxy", "--rate", "5X", "host", "1", "c", "m", "s"]),
            ("--rate goes with --proxy only", 2, ["--target", "--rate", "5", _image]),
            ("the name is empty", 2, ["--target", "--record", "", _image]),
            ("not a regular file", 1, ["--target", "--record", _folder.Path, _image]),
        ])
        {
            ToolResult result = await Tool.Run(server, args);
            Assert.Equal(code, result.ExitCode);
            Assert.Contains(reason, result.Errors, StringComparison.Ordinal);
        }
    }
}
