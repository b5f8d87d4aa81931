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

    private async Task<JsonElement> Query()
        => JsonDocument.Parse(
            await Tool.Succeed(Proxies.Control, "--query", "--json", Proxies.Socket(_folder))).RootElement;

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
}
