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

    /// <summary>Of the socket, in bytes: while it is made, a dot and a process id of up to 7 digits stand behind it.</summary>
    private const int LongestPath = UnixSocket.LongestPath - 8;

    private static readonly TimeSpan s_sendTime = TimeSpan.FromSeconds(5);

    private readonly string _path;
    private readonly FileStatus _file;
    private readonly Socket _listener;
    private readonly Func<string, JsonObject, JsonNode?> _call;
    private readonly List<Socket> _clients = []; // who spoke last stands last
    private readonly HashSet<Socket> _calling = []; // whose request is being carried out
    private volatile bool _isClosed;

    private ControlServer(string path, Socket listener, Func<string, JsonObject, JsonNode?> call)
    {
        _path = path;
        _ = LinuxFile.Status(path, out _file);
        _listener = listener;
        _call = call;
    }

    /// <summary>Opens the channel. A socket that a killed process has left is replaced.</summary>
    /// <param name="path">The socket.</param>
    /// <param name="call">Carries out a method with its parameters, on any thread; throws <see cref="ControlException"/>.</param>
    /// <exception cref="SocketException">Somebody listens there, or the socket cannot be made.</exception>
    /// <exception cref="IOException">There is another file of that name; it stays.</exception>
    /// <exception cref="ArgumentException">The path is empty, or too long.</exception>
    public static ControlServer Start(string path, Func<string, JsonObject, JsonNode?> call)
    {
        if (Encoding.UTF8.GetByteCount(path) is 0 or > LongestPath)
            throw new ArgumentException($"the path of a control socket has 1 to {LongestPath} bytes");
        UnixSocket.RemoveStale(path);
        if (LinuxFile.Status(path, out FileStatus there) == Errno.None)
            throw there.Kind == FileKind.Socket ? new SocketException((int)SocketError.AddressAlreadyInUse) : new IOException("there is another file of that name");
        var listener = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        try
        {
            // Made under another name, and put in place when its mode is right: nobody else can connect in between.
            string partial = $"{path}.{Environment.ProcessId}";
            listener.Bind(UnixSocket.Address(partial));
#pragma warning disable CA1416 // Linux only
            File.SetUnixFileMode(partial, UnixFileMode.UserRead | UnixFileMode.UserWrite);
#pragma warning restore CA1416
            listener.Listen(MaxClients);
            File.Move(partial, path);
        }
        catch
        {
            listener.Dispose();
            throw;
        }

        var server = new ControlServer(path, listener, call);
        new Thread(server.Accept) { IsBackground = true, Name = "control" }.Start();
        return server;
    }

    /// <summary>Closes the channel, and removes its socket.</summary>
    public void Dispose()
    {
        _isClosed = true;
        _listener.Dispose();
        UnixSocket.Remove(_path, _file);
        lock (_clients)
            _clients.ForEach(client => client.Dispose());
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

            new Thread(() => Serve(client)) { IsBackground = true, Name = "control client" }.Start();
        }
    }

    private void Serve(Socket client)
    {
        try
        {
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
            else
                _calling.Remove(client);
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
