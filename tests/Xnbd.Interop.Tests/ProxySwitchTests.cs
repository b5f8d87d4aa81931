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

    private async Task<JsonElement> Query()
        => JsonDocument.Parse(
            await Tool.Succeed(Proxies.Control, "--query", "--json", Proxies.Socket(_folder))).RootElement;

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

    [Fact]
    public async Task A_proxy_that_was_switched_says_so_when_its_remote_is_away()
    {
        const string hint = "this proxy was switched";
        string remote = _folder.File("r");
        string[] serve = ["--target", "--readonly", "--unix", remote, _image];
        using (ServerProcess origin = ServerProcess.Start(remote, serve))
        using (ServerProcess proxy = Proxies.Start(_folder, origin))
        {
            await Tool.Succeed(Proxies.Control, "--cache-all", Proxies.Socket(_folder));
            await Tool.Succeed(Proxies.Control, "--switch", Proxies.Socket(_folder));
            Assert.Equal(0, proxy.Stop());
        }

        string refused = Refused();
        Assert.Contains(hint, refused, StringComparison.Ordinal);
        Assert.Contains($"start xnbd-server --target {_folder.File("cache.img")}", refused, StringComparison.Ordinal);
        Assert.Equal(_bytes, File.ReadAllBytes(_folder.File("cache.img")));
        using (ServerProcess origin = ServerProcess.Start(remote, serve))
        // It is a proxy again, and may keep zeroes in its map alone.
        using (ServerProcess proxy = Proxies.Start(_folder, origin))
            Assert.Equal(0, proxy.Stop());
        Assert.DoesNotContain(hint, Refused(), StringComparison.Ordinal);

        string Refused()
            => Assert.Throws<InvalidOperationException>(
                () => Proxies.Start(_folder, "unix:" + remote, "-").Dispose()).Message;
    }
}
