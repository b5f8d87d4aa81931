using System.Net.Sockets;
using System.Text;
using System.Text.Json.Nodes;

namespace Xnbd.Control;

/// <summary>The client's end of the control channel (docs/control.md): one call at a time.</summary>
public sealed class ControlClient : IDisposable
{
    private readonly Socket _socket;
    private readonly StreamReader _reader;
    private int _id;

    /// <summary>Connects.</summary>
    /// <exception cref="SocketException">Nobody listens there.</exception>
    public ControlClient(string path)
    {
        _socket = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        try
        {
            _socket.Connect(new UnixDomainSocketEndPoint(path));
            _reader = new StreamReader(new NetworkStream(_socket), Encoding.UTF8);
        }
        catch
        {
            _socket.Dispose();
            throw;
        }
    }

    /// <summary>Calls a method and waits for its result.</summary>
    /// <exception cref="ControlException">The server says that it failed.</exception>
    /// <exception cref="IOException">The server has gone.</exception>
    public JsonNode? Call(string method, JsonObject? parameters = null)
    {
        var request = new JsonObject
        {
            ["jsonrpc"] = "2.0",
            ["id"] = ++_id,
            ["method"] = method,
            ["params"] = parameters ?? [],
        };
        try
        {
            _socket.Send(Encoding.UTF8.GetBytes(request.ToJsonString() + "\n"));
        }
        catch (SocketException failure)
        {
            throw new IOException(failure.Message);
        }

        string line = _reader.ReadLine() ?? throw new IOException("the server has closed the control channel");
        JsonObject answer = JsonNode.Parse(line)!.AsObject();
        if (answer["error"] is JsonObject error)
            throw new ControlException(error["code"]!.GetValue<int>(), error["message"]!.GetValue<string>());
        return answer["result"];
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        _reader.Dispose();
        _socket.Dispose();
    }
}
