using System.Net.Sockets;
using System.Text;
using System.Text.Json;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>The method <c>watch</c> of the control channel: its figures against what was done to the proxy.</summary>
public sealed class ProxyWatchTests : IDisposable
{
    private const int Size = 8 << 20;

    private readonly TempFolder _folder = new();
    private readonly string _image;

    public ProxyWatchTests() => _image = _folder.Random("origin.img", Size);

    public void Dispose() => _folder.Dispose();

    /// <summary>A client of the channel that sends lines as they are.</summary>
    private sealed class Channel : IDisposable
    {
        private readonly Socket _socket = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        private readonly StreamReader _reader;

        public Channel(string path)
        {
            _socket.Connect(new UnixDomainSocketEndPoint(path));
            _reader = new StreamReader(new NetworkStream(_socket));
        }

        public JsonElement Call(string method, string parameters = "{}")
        {
            string line = $$$"""{"jsonrpc":"2.0","id":1,"method":"{{{method}}}","params":{{{parameters}}}}""";
            _socket.Send(Encoding.UTF8.GetBytes(line + "\n"));
            return JsonDocument.Parse(_reader.ReadLine()!).RootElement;
        }

        public JsonElement Watch(int cells = 16)
            => Call("watch", $$$"""{"cells":{{{cells}}}}""").GetProperty("result");

        public void Dispose()
        {
            _reader.Dispose();
            _socket.Dispose();
        }
    }

    private static long Number(JsonElement report, string name) => report.GetProperty(name).GetInt64();

    [Fact]
    public void The_report_has_the_figures_of_what_was_done()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using ServerProcess proxy = Proxies.Start(_folder, origin, "--remote-connections", "2");
        using var channel = new Channel(Proxies.Socket(_folder));
        JsonElement before = channel.Watch();
        Assert.Equal(new string('.', 16), before.GetProperty("map").GetString());
        Assert.Equal(
            ("proxy", 2048, 2048, 0),
            (before.GetProperty("mode").GetString(), Number(before, "blocks"), Number(before, "missing-blocks"),
                Number(before, "misses")));
        using (NbdTestClient client = proxy.Open())
        {
            client.Read(0, 512 << 10); // one cell
            client.Read(0, 512 << 10);
            client.Write(1 << 20, new byte[512 << 10]);
            client.Write(2 << 20, new byte[4096]);
            client.Call(Protocol.NbdCommand.WriteZeroes, 4 << 20, 512 << 10);
            Wait.Until(() => channel.Watch().GetProperty("map").GetString() == "F.W.w...Z.......", "it is drawn");
            JsonElement after = channel.Watch();
            Assert.Equal(
                (128, 257, 128, 2048 - 128 - 257),
                (Number(after, "fetched-blocks"), Number(after, "written-blocks"), Number(after, "zeroed-blocks"),
                    Number(after, "missing-blocks")));
            Assert.Equal(
                (1L << 20, (512L << 10) + 4096, 1, 512 << 10),
                (Number(after, "client-read-bytes"), Number(after, "client-written-bytes"), Number(after, "clients"),
                    Number(after, "fetched-bytes")));
            Assert.True(Number(after, "hits") > 0 && Number(after, "uptime-ms") >= Number(before, "uptime-ms"));
            Assert.Equal(
                Number(after, "misses"),
                after.GetProperty("miss-latency").EnumerateArray().Sum(bucket => Number(bucket, "count")));
            Wait.Until(() => channel.Watch().GetProperty("remote-connections").GetArrayLength() == 2, "both are open");
            JsonElement[] connections = [.. channel.Watch().GetProperty("remote-connections").EnumerateArray()];
            Assert.True(connections.Sum(connection => Number(connection, "received-bytes")) > 512 << 10);
            Assert.Equal(2, connections.Select(connection => Number(connection, "id")).Distinct().Count());
        }

        Assert.Equal(1024, channel.Call("watch").GetProperty("result").GetProperty("map").GetString()!.Length);
        Assert.Equal("*", channel.Call("watch", """{"cells":1}""").GetProperty("result").GetProperty("map")
            .GetString()!.Replace('w', '*'));
        foreach (string wrong in (string[])["0", "4097", "-1", "\"x\"", "1.5"])
        {
            JsonElement error = channel.Call("watch", $$"""{"cells":{{wrong}}}""").GetProperty("error");
            Assert.Equal(-32602, Number(error, "code"));
        }
    }

    [Fact]
    public void The_report_tells_a_lost_remote_a_job_and_the_switch()
    {
        ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using ServerProcess proxy = Proxies.Start(_folder, origin);
        using var channel = new Channel(Proxies.Socket(_folder));
        origin.Kill();
        Wait.Until(
            () => channel.Watch().GetProperty("remote-lost-ms").ValueKind == JsonValueKind.Number, "it is lost");
        JsonElement lost = channel.Watch();
        Assert.Equal(0, lost.GetProperty("remote-connections").GetArrayLength());
        Assert.NotEqual("", lost.GetProperty("remote-failure").GetString());

        using ServerProcess back = ServerProcess.Start(
            origin.SocketPath, ["--target", "--readonly", "--unix", origin.SocketPath, _image]);
        Wait.Until(() => channel.Watch().GetProperty("remote-lost-ms").ValueKind == JsonValueKind.Null, "it is back");
        channel.Call("move");
        Wait.Until(() => channel.Watch().GetProperty("mode").GetString() == "target", "it is switched");
        Wait.Until(
            () => channel.Watch().GetProperty("job").GetProperty("state").GetString() == "done", "the move is over");
        JsonElement end = channel.Watch();
        JsonElement job = end.GetProperty("job");
        Assert.Equal(
            ("move", "switch", 2048, 2048, 0),
            (job.GetProperty("kind").GetString(), job.GetProperty("phase").GetString(), Number(job, "verify-blocks"),
                Number(job, "verified-blocks"), Number(job, "different-blocks")));
        Assert.Equal(new string('F', 16), end.GetProperty("map").GetString());
        Assert.Equal(
            (JsonValueKind.Null, JsonValueKind.Null, 0),
            (end.GetProperty("remote").ValueKind, end.GetProperty("remote-lost-ms").ValueKind,
                end.GetProperty("remote-connections").GetArrayLength()));
        origin.Dispose();
    }
}
