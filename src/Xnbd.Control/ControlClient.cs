using System.Net.Sockets;
using System.Text;
using System.Text.Json.Nodes;

namespace Xnbd.Control;

/// <summary>
/// The client's end of the control channel (docs/control.md): one call at a time. What answers may be something else
/// than a control channel: it is believed nothing.
/// </summary>
public sealed class ControlClient : IDisposable
{
    /// <summary>The longest answer in bytes: one of <c>job.status</c> may list a thousand differences.</summary>
    internal const int MaxAnswer = 1 << 20;

    private readonly Socket _socket;
    private byte[] _received = new byte[4096]; // the start of it, _length bytes, is received and not used
    private int _length;
    private int _id;

    /// <summary>Connects.</summary>
    /// <exception cref="SocketException">Nobody listens there.</exception>
    public ControlClient(string path)
    {
        _socket = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        try
        {
            _socket.Connect(new UnixDomainSocketEndPoint(path));
        }
        catch
        {
            _socket.Dispose();
            throw;
        }
    }

    /// <summary>The export that all calls are about, of a server of many; null for none.</summary>
    public string? Export { get; set; }

    /// <summary>Calls a method and waits for its result.</summary>
    /// <exception cref="ControlException">
    /// The server says that it failed, or what it says is no answer of the control channel.
    /// </exception>
    /// <exception cref="IOException">The server has gone.</exception>
    public JsonNode? Call(string method, JsonObject? parameters = null)
    {
        parameters ??= [];
        if (Export is not null)
            parameters["export"] = Export;
        var request = new JsonObject
        {
            ["jsonrpc"] = "2.0",
            ["id"] = ++_id,
            ["method"] = method,
            ["params"] = parameters,
        };
        try
        {
            _socket.Send(Encoding.UTF8.GetBytes(request.ToJsonString() + "\n"));
            return ResultOf(ReceiveLine());
        }
        catch (Exception failure) when (failure is SocketException or ObjectDisposedException)
        {
            throw new IOException(failure.Message);
        }
    }

    /// <inheritdoc/>
    public void Dispose() => _socket.Dispose();

    private static JsonNode? ResultOf(byte[] line)
    {
        try
        {
            JsonObject answer = JsonNode.Parse(line)!.AsObject();
            if (answer["error"] is not { } error)
                return answer["result"];
            throw new ControlException(error["code"]!.GetValue<int>(), error["message"]!.GetValue<string>());
        }
        catch (Exception failure) when (failure is not ControlException)
        {
            throw NoChannel("an answer that is none of JSON-RPC");
        }
    }

    private byte[] ReceiveLine()
    {
        for (int searched = 0; ;)
        {
            int end = _received.AsSpan(searched, _length - searched).IndexOf((byte)'\n');
            if (end >= 0)
            {
                byte[] line = _received[..(searched + end)];
                _length -= line.Length + 1;
                Buffer.BlockCopy(_received, line.Length + 1, _received, 0, _length);
                return line;
            }

            searched = _length;
            if (_length == MaxAnswer)
                throw NoChannel($"an answer of more than {MaxAnswer} bytes");
            if (_length == _received.Length)
                Array.Resize(ref _received, 2 * _received.Length);
            int count = _socket.Receive(_received.AsSpan(_length));
            if (count == 0)
                throw new IOException("the server has closed the control channel");
            _length += count;
        }
    }

    private static ControlException NoChannel(string what)
        => new(ControlException.ParseError, $"this is no control channel: it sends {what}");
}
