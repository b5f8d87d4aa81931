using System.Net.Sockets;
using System.Text.Json;
using System.Text.Json.Nodes;

namespace Xnbd.Bench.Moves;

/// <summary>The monitor of a QEMU program: commands and events are lines of JSON on a Unix socket.</summary>
internal sealed class Qmp : IDisposable
{
    private readonly Socket _socket = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
    private readonly StreamReader _reader;
    private readonly StreamWriter _writer;
    private readonly List<string> _events = []; // names of those that nobody has waited for

    private Qmp(string path)
    {
        _socket.Connect(new UnixDomainSocketEndPoint(path));
        var stream = new NetworkStream(_socket, ownsSocket: true);
        _reader = new StreamReader(stream);
        _writer = new StreamWriter(stream) { AutoFlush = true };
    }

    /// <summary>Connects, and takes the greeting.</summary>
    public static async Task<Qmp> Connect(string path, CancellationToken stop)
    {
        var monitor = new Qmp(path);
        await monitor.Receive(stop);
        await monitor.Execute("qmp_capabilities", [], stop);
        return monitor;
    }

    /// <summary>Executes a command.</summary>
    /// <exception cref="InvalidOperationException">It failed.</exception>
    public async Task Execute(string command, JsonObject arguments, CancellationToken stop)
    {
        var line = new JsonObject { ["execute"] = command, ["arguments"] = arguments };
        await _writer.WriteLineAsync(line.ToJsonString().AsMemory(), stop);
        while (true)
        {
            JsonElement answer = await Receive(stop);
            if (answer.TryGetProperty("error", out JsonElement error))
                throw new InvalidOperationException($"{command}: {error}");
            if (answer.TryGetProperty("return", out _))
                return;
        }
    }

    /// <summary>Waits for an event, which may have come already.</summary>
    public async Task WaitFor(string name, CancellationToken stop)
    {
        while (!_events.Remove(name))
            await Receive(stop);
    }

    public void Dispose()
    {
        _reader.Dispose();
        _writer.Dispose();
    }

    /// <summary>Receives a line; the name of an event is kept.</summary>
    private async Task<JsonElement> Receive(CancellationToken stop)
    {
        string line = await _reader.ReadLineAsync(stop) ?? throw new IOException("QEMU has ended");
        JsonElement message = JsonDocument.Parse(line).RootElement;
        if (message.TryGetProperty("event", out JsonElement name))
            _events.Add(name.GetString()!);
        return message;
    }
}
