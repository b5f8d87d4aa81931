using System.Net.Sockets;
using System.Text;
using System.Text.Json;
using System.Text.Json.Nodes;
using Xnbd.Linux;

namespace Xnbd.Control;

/// <summary>A call failed; the message says why.</summary>
/// <param name="code">JSON-RPC's number for the kind of failure.</param>
/// <param name="message">For people.</param>
public sealed class ControlException(int code, string message) : Exception(message)
{
    /// <summary>The method does not exist.</summary>
    public const int NoSuchMethod = -32601;

    /// <summary>The parameters are wrong.</summary>
    public const int InvalidParameters = -32602;

    /// <summary>The request is no JSON.</summary>
    public const int ParseError = -32700;

    /// <summary>It is JSON, but no request.</summary>
    public const int InvalidRequest = -32600;

    /// <summary>What was asked for could not be done.</summary>
    public const int Failed = 1;

    /// <summary>The kind of failure.</summary>
    public int Code { get; } = code;
}

/// <summary>
/// The server's end of the control channel (docs/control.md): a Unix socket, for its owner alone, on which each line is a
/// request of JSON-RPC 2.0. Each client has a thread; who is silent, slow or malformed harms nobody else.
/// </summary>
public sealed class ControlServer : IDisposable
{
    /// <summary>The longest line, in bytes: a request has a few short parameters.</summary>
    private const int MaxLine = 64 * 1024;

    /// <summary>Clients at once; a further one pushes out the one that has been silent for longest.</summary>
    private const int MaxClients = 16;

    private static readonly TimeSpan s_sendTime = TimeSpan.FromSeconds(5);

    /// <summary>How long a client without a thread of its own may be silent; <c>xnbd-bgctl</c> asks at once.</summary>
    private static readonly TimeSpan s_guestTime = TimeSpan.FromSeconds(1);

    /// <summary>How long the end waits for calls that are under way.</summary>
    private static readonly TimeSpan s_endTime = TimeSpan.FromSeconds(2);

    private readonly UnixSocket _socket;
    private readonly Socket _listener;
    private readonly Func<string, JsonObject, JsonNode?> _call;
    private readonly List<Socket> _clients = []; // who spoke last stands last
    private readonly HashSet<Socket> _calling = []; // whose request is being carried out
    private volatile bool _isClosed;

    private ControlServer(UnixSocket socket, Func<string, JsonObject, JsonNode?> call)
    {
        _socket = socket;
        _listener = socket.Socket;
        _call = call;
    }

    /// <summary>Opens the channel. A socket that a killed process has left is replaced.</summary>
    /// <param name="path">The socket.</param>
    /// <param name="call">
    /// Carries out a method with its parameters, on any thread; throws <see cref="ControlException"/>.
    /// </param>
    /// <exception cref="IOException">It cannot be opened; the message says why.</exception>
    /// <exception cref="ArgumentException">The path is empty, or too long.</exception>
    public static ControlServer Start(string path, Func<string, JsonObject, JsonNode?> call)
    {
        var server = new ControlServer(UnixSocket.Listen(path, isPrivate: true), call);
        if (LinuxThread.TryStart("control", server.Accept) is not null)
            return server;
        server.Dispose();
        throw new IOException("the system has no thread to spare");
    }

    /// <summary>Closes the channel, removes its socket, and waits a moment for the calls that are under way.</summary>
    public void Dispose()
    {
        _isClosed = true;
        _socket.Dispose();
        lock (_clients)
        {
            _clients.ForEach(client => client.Dispose());
            long end = Environment.TickCount64 + (long)s_endTime.TotalMilliseconds;
            while (_calling.Count > 0 && end - Environment.TickCount64 is > 0 and var left)
                Monitor.Wait(_clients, (int)left);
        }
    }

    private void Accept()
    {
        while (true)
        {
            Socket client;
            try
            {
                client = _listener.Accept();
            }
            catch (ObjectDisposedException)
            {
                return;
            }
            catch (SocketException) when (!_isClosed)
            {
                Thread.Sleep(100); // no descriptors, for example: that passes
                continue;
            }
            catch (SocketException)
            {
                return;
            }

            lock (_clients)
            {
                if (_clients.Count == MaxClients)
                {
                    Socket longestSilent = _clients.Find(c => !_calling.Contains(c)) ?? _clients[0];
                    longestSilent.Dispose();
                    _clients.Remove(longestSilent);
                }

                _clients.Add(client);
            }

            // Without a thread of its own a client is served here, as long as no other one comes.
            if (LinuxThread.TryStart("control client", () => Serve(client, isGuest: false)) is null)
                Serve(client, isGuest: true);
        }
    }

    /// <summary>Answers a client's requests until it leaves.</summary>
    /// <param name="client">The client.</param>
    /// <param name="isGuest">
    /// It is served on the thread that accepts: when it is silent for a moment, or another one comes, it has to leave.
    /// </param>
    private void Serve(Socket client, bool isGuest)
    {
        try
        {
            if (isGuest)
                client.ReceiveTimeout = (int)s_guestTime.TotalMilliseconds;
            client.SendTimeout = (int)s_sendTime.TotalMilliseconds;
            byte[] buffer = new byte[MaxLine];
            int length = 0;
            while (true)
            {
                int count = client.Receive(buffer.AsSpan(length));
                if (count == 0)
                    return;
                length += count;
                NoteCall(client, isUnderWay: true);
                int start = 0;
                for (int end; (end = buffer.AsSpan(start, length - start).IndexOf((byte)'\n')) >= 0; start += end + 1)
                {
                    if (Answer(buffer.AsSpan(start, end)) is { } answer)
                        client.Send(Encoding.UTF8.GetBytes(answer + "\n"));
                }

                NoteCall(client, isUnderWay: false);
                buffer.AsSpan(start, length - start).CopyTo(buffer);
                length -= start;
                if (isGuest && start > 0 && _listener.Poll(0, SelectMode.SelectRead))
                    return;
                if (length < buffer.Length)
                    continue;
                client.Send(Encoding.UTF8.GetBytes(Error(null, ControlException.InvalidRequest, $"a line is longer than {MaxLine} bytes").ToJsonString() + "\n"));
                return;
            }
        }
        catch (Exception failure) when (failure is SocketException or ObjectDisposedException)
        {
            // It has gone, or was pushed out.
        }
        finally
        {
            lock (_clients)
            {
                _clients.Remove(client);
                _calling.Remove(client);
                Monitor.PulseAll(_clients);
            }

            client.Dispose();
        }
    }

    /// <summary>A client has spoken, or its requests have been answered.</summary>
    private void NoteCall(Socket client, bool isUnderWay)
    {
        lock (_clients)
        {
            if (!_clients.Remove(client))
                return; // pushed out meanwhile
            _clients.Add(client);
            if (isUnderWay)
                _calling.Add(client);
            else if (_calling.Remove(client))
                Monitor.PulseAll(_clients);
        }
    }

    /// <returns>Null for a notification, which has no id, and gets no answer.</returns>
    private string? Answer(ReadOnlySpan<byte> line)
    {
        JsonNode? id = null;
        try
        {
            JsonNode? node = JsonNode.Parse(line);
            if (node is not JsonObject request
                || request["jsonrpc"] is not JsonValue version || !version.TryGetValue(out string? text) || text != "2.0"
                || request["method"] is not JsonValue method || !method.TryGetValue(out string? name)
                || request["params"] is not (null or JsonObject))
                return Error(null, ControlException.InvalidRequest, "no request of JSON-RPC 2.0 with named parameters").ToJsonString();
            bool isNotification = !request.ContainsKey("id");
            id = request["id"]?.DeepClone();
            JsonNode? result = _call(name, request["params"] as JsonObject ?? []);
            return isNotification ? null : new JsonObject { ["jsonrpc"] = "2.0", ["id"] = id, ["result"] = result }.ToJsonString();
        }
        catch (JsonException failure)
        {
            return Error(null, ControlException.ParseError, failure.Message).ToJsonString();
        }
        catch (ControlException failure)
        {
            return Error(id, failure.Code, failure.Message).ToJsonString();
        }
        catch (Exception failure)
        {
            // Whatever a client sends, and whatever goes wrong with it: the disk is served on.
            try
            {
                return Error(id, ControlException.InvalidParameters, failure.Message).ToJsonString();
            }
            catch (Exception)
            {
                return Error(null, ControlException.InvalidParameters, failure.Message).ToJsonString(); // the id is what is wrong
            }
        }
    }

    private static JsonObject Error(JsonNode? id, int code, string message) => new()
    {
        ["jsonrpc"] = "2.0",
        ["id"] = id,
        ["error"] = new JsonObject { ["code"] = code, ["message"] = message },
    };
}
