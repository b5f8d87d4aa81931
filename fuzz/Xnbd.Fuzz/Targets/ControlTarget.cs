using System.Net.Sockets;
using System.Text;
using System.Text.Json;
using System.Text.Json.Nodes;
using Xnbd.Control;

namespace Xnbd.Fuzz.Targets;

/// <summary>
/// All that a client of the control channel can send. The server has three methods: <c>echo</c> answers with its
/// parameters, <c>fail</c> fails, <c>crash</c> throws what no method should. The input is the client's stream.
/// </summary>
public sealed class ControlTarget : FuzzTarget
{
    /// <summary>The longest line of the channel, in bytes (docs/control.md).</summary>
    private const int MaxLine = 64 * 1024;

    private readonly string _path = Path.Combine(Path.GetTempPath(), $"xnbd-fuzz-{Guid.NewGuid():N}");
    private readonly Lazy<ControlServer> _server;

    /// <summary>Makes the target; the server starts with the first input.</summary>
    public ControlTarget()
    {
        _server = new Lazy<ControlServer>(() =>
        {
            var server = ControlServer.Start(_path, Call);
            AppDomain.CurrentDomain.ProcessExit += (_, _) => server.Dispose();
            return server;
        });
    }

    /// <inheritdoc/>
    public override void Run(byte[] input)
    {
        _ = _server.Value;
        string[] answers = Ask(input);
        int due = CountDue(input);
        if (input.Length < MaxLine)
            Check.That(answers.Length == due, "each line has one answer, except for notifications");
        else
            Check.That(answers.Length <= due + 1, "each line has at most one answer, and the channel ends with one");
        foreach (string answer in answers)
            CheckAnswer(answer);

        string[] alone = Ask([.. """{"jsonrpc":"2.0","id":7,"method":"echo","params":{"a":[1]}}"""u8, (byte)'\n']);
        Check.That(alone is ["""{"jsonrpc":"2.0","id":7,"result":{"a":[1]}}"""], "the next client is served as ever");
    }

    /// <inheritdoc/>
    public override IEnumerable<(string Name, byte[] Input)> Seeds()
    {
        (string Name, string Text)[] seeds =
        [
            ("echo", """{"jsonrpc":"2.0","id":1,"method":"echo","params":{"a":"\u00fc","list":[2.5,null,true]}}"""),
            ("no-parameters", """{"jsonrpc":"2.0","id":"a","method":"echo"}"""),
            ("notification", """{"jsonrpc":"2.0","method":"echo","params":{}}"""),
            ("fail", """{"jsonrpc":"2.0","id":2,"method":"fail"}"""),
            ("crash", """{"jsonrpc":"2.0","id":3,"method":"crash"}"""),
            ("unknown", """{"jsonrpc":"2.0","id":4,"method":"no such method"}"""),
            ("old-version", """{"jsonrpc":"1.0","id":5,"method":"echo"}"""),
            ("list-parameters", """{"jsonrpc":"2.0","id":6,"method":"echo","params":[1]}"""),
            ("batch", """[{"jsonrpc":"2.0","id":1,"method":"echo"}]"""),
            ("no-json", "hello"),
            ("deep", new string('[', 100)),
            ("same-name-twice", """{"jsonrpc":"2.0","id":1,"id":2,"method":"echo","method":"fail"}"""),
            ("lone-surrogate", """{"jsonrpc":"2.0","id":"\ud800","method":"echo","params":{"a":"\udc00"}}"""),
            ("id-of-any-kind", """{"jsonrpc":"2.0","id":{"a":1e999},"method":"echo"}"""),
        ];
        foreach ((string name, string text) in seeds)
            yield return (name, Encoding.UTF8.GetBytes(text + "\n"));
        yield return ("two-lines", Encoding.UTF8.GetBytes(seeds[0].Text + "\n" + seeds[1].Text + "\n" + seeds[2].Text));
        yield return ("no-utf8", [.. "{\"jsonrpc\":\"2.0\",\"id\":\""u8, 0xff, 0xc0, .. "\",\"method\":\"echo\"}\n"u8]);
    }

    private static JsonNode? Call(string method, JsonObject parameters) => method switch
    {
        "echo" => parameters.DeepClone(),
        "fail" => throw new ControlException(ControlException.Failed, "it cannot be done"),
        "crash" => throw new InvalidOperationException("no method should throw this"),
        _ => throw new ControlException(ControlException.NoSuchMethod, $"there is no method '{method}'"),
    };

    /// <summary>How many lines of a client's stream must be answered: those that are whole and no
    /// notifications.</summary>
    private static int CountDue(ReadOnlySpan<byte> stream)
    {
        int due = 0;
        for (int end; (end = stream.IndexOf((byte)'\n')) >= 0; stream = stream[(end + 1)..])
        {
            bool isRequest = ControlMessage.TryParse(stream[..end], out ControlRequest request, out _);
            due += isRequest && request.IsNotification ? 0 : 1;
        }

        return due;
    }

    /// <summary>Sends a client's stream, and its end; answers the lines that come back.</summary>
    private string[] Ask(byte[] stream)
    {
        using var socket = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        socket.Connect(new UnixDomainSocketEndPoint(_path));
        socket.TrySendAll(stream);
        socket.TryShutdownSend();
        byte[] received = socket.ReceiveAll();
        string text = new UTF8Encoding(false, throwOnInvalidBytes: true).GetString(received);
        Check.That(text.Length == 0 || text.EndsWith('\n'), "each answer is a whole line");
        return text.Split('\n', StringSplitOptions.RemoveEmptyEntries);
    }

    private static void CheckAnswer(string line)
    {
        using var document = JsonDocument.Parse(line);
        JsonElement answer = document.RootElement;
        Check.That(answer.GetProperty("jsonrpc").GetString() == "2.0", "an answer is of JSON-RPC 2.0");
        Check.That(answer.TryGetProperty("id", out _), "an answer has an id");
        bool hasError = answer.TryGetProperty("error", out JsonElement error);
        Check.That(hasError != answer.TryGetProperty("result", out _), "an answer is a result or an error");
        if (hasError)
        {
            Check.That(error.GetProperty("code").TryGetInt32(out _), "an error has a code");
            Check.That(error.GetProperty("message").GetString() is { Length: > 0 }, "an error has a message");
        }
    }
}
