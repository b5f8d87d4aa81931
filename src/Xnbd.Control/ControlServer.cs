using System.Net.Sockets;
using System.Text.Json;
using System.Text.Json.Nodes;
using Xnbd.Linux;

namespace Xnbd.Control;

/// <summary>
/// The server's end of the control channel (docs/control.md): a Unix socket, for its owner alone, on which each line is
/// a request of JSON-RPC 2.0. Each client has a thread; without a thread to spare, it is served on the thread that
/// accepts. A client that is silent, slow or malformed harms nobody else.
/// <para>
/// <c>_clients</c> guards itself, <c>_calling</c> and <c>_threads</c>; no call is made and nothing is sent while it is
/// held. A client that leaves during a call keeps its thread until the call has ended.
/// </para>
/// </summary>
public sealed class ControlServer : IDisposable
{
    /// <summary>The longest line in bytes: a request has a few short parameters.</summary>
    internal const int MaxLine = 64 * 1024;

    /// <summary>Clients at once; a further one pushes out the one that has been silent for longest.</summary>
    internal const int MaxClients = 16;

    /// <summary>
    /// Threads at once: of clients, and of calls whose clients were pushed out. When all carry out a call, new clients
    /// are refused.
    /// </summary>
    internal const int MaxThreads = 2 * MaxClients;

    /// <summary>How long a client may take to receive an answer.</summary>
    private static readonly TimeSpan s_sendTime = TimeSpan.FromSeconds(5);

    /// <summary>How long a client without a thread of its own may be silent; <c>xnbd-bgctl</c> asks at once.</summary>
    private static readonly TimeSpan s_guestTime = TimeSpan.FromSeconds(1);

    /// <summary>How long the end waits for calls that are under way.</summary>
    private static readonly TimeSpan s_endTime = TimeSpan.FromSeconds(2);

    private readonly UnixSocket _socket;
    private readonly Func<string, JsonObject, JsonNode?> _call;
    private readonly Func<string, Action, bool> _startThread;
    private readonly List<Socket> _clients = []; // the one that spoke last stands last
    private readonly HashSet<Socket> _calling = []; // those whose request is being carried out
    private int _threads; // that serve a client
    private volatile bool _isClosed;

    private ControlServer(
        UnixSocket socket, Func<string, JsonObject, JsonNode?> call, Func<string, Action, bool> startThread)
    {
        _socket = socket;
        _call = call;
        _startThread = startThread;
    }

    /// <summary>Opens the channel. A socket that a killed process has left is replaced.</summary>
    /// <param name="path">The socket.</param>
    /// <param name="call">
    /// Carries out a method with its parameters, on any thread, and several at the same time; throws
    /// <see cref="ControlException"/>.
    /// </param>
    /// <exception cref="IOException">It cannot be opened; the message says why.</exception>
    /// <exception cref="ArgumentException">The path is empty, or too long.</exception>
    public static ControlServer Start(string path, Func<string, JsonObject, JsonNode?> call)
        => Start(path, call, (name, work) => LinuxThread.TryStart(name, work) is not null);

    /// <summary>As the other one, with the system's threads replaced.</summary>
    /// <param name="path">The socket.</param>
    /// <param name="call">Carries out a method.</param>
    /// <param name="startThread">Starts a thread with a name; false when there is none to spare.</param>
    internal static ControlServer Start(
        string path, Func<string, JsonObject, JsonNode?> call, Func<string, Action, bool> startThread)
    {
        var server = new ControlServer(UnixSocket.Listen(path, isPrivate: true), call, startThread);
        if (startThread("control", server.Accept))
            return server;
        server.Dispose();
        throw new IOException("the system has no thread to spare");
    }

    /// <summary>
    /// Closes the channel, removes its socket, and waits a moment for the calls that are under way. Those that end in
    /// time are answered.
    /// </summary>
    public void Dispose()
    {
        _isClosed = true;
        _socket.Dispose();
        lock (_clients)
        {
            Monitor.PulseAll(_clients);
            foreach (Socket client in _clients.Where(client => !_calling.Contains(client)))
                client.Dispose();
            long end = Environment.TickCount64 + (long)s_endTime.TotalMilliseconds;
            while (_calling.Count > 0 && end - Environment.TickCount64 is > 0 and var left)
                Monitor.Wait(_clients, (int)left);
            _clients.ForEach(client => client.Dispose());
        }
    }

    private void Accept()
    {
        while (true)
        {
            Socket client;
            try
            {
                client = _socket.Socket.Accept();
            }
            catch (ObjectDisposedException)
            {
                return;
            }
            catch (SocketException) when (!_isClosed)
            {
                Thread.Sleep(100); // no descriptor is left, for example: that passes
                continue;
            }
            catch (SocketException)
            {
                return;
            }

            if (!TryAdd(client))
                continue;

            // Without a thread of its own a client is served here, as long as no other one comes.
            if (!_startThread("control client", () => Serve(client, isGuest: false)))
                Serve(client, isGuest: true);
        }
    }

    /// <summary>Takes a client in, which may push out another one.</summary>
    /// <returns>False when the client was refused.</returns>
    private bool TryAdd(Socket client)
    {
        bool isRefused;
        lock (_clients)
        {
            if (_clients.Count == MaxClients && _calling.Count < MaxThreads)
            {
                Socket longestSilent = _clients.Find(c => !_calling.Contains(c)) ?? _clients[0];
                longestSilent.Dispose();
                _clients.Remove(longestSilent);
            }

            // Without a call, the thread of a client that was pushed out ends at once.
            while (_threads >= MaxThreads && _calling.Count < MaxThreads && !_isClosed)
                Monitor.Wait(_clients);
            isRefused = _threads >= MaxThreads || _isClosed;
            if (!isRefused)
            {
                _clients.Add(client);
                _threads++;
            }
        }

        if (isRefused)
            Refuse(client);
        return !isRefused;
    }

    private void Refuse(Socket client)
    {
        try
        {
            client.Blocking = false; // a new client's socket has room
            string reason = _isClosed ? "the server is ending" : "too many calls are under way";
            client.Send(ControlMessage.Error(null, ControlException.Failed, reason));
        }
        catch (SocketException)
        {
            // It has gone.
        }

        client.Dispose();
    }

    /// <summary>Answers a client's requests until it leaves.</summary>
    /// <param name="client">The client.</param>
    /// <param name="isGuest">
    /// The client is served on the thread that accepts. It has to leave when it is silent for a moment, or when another
    /// client comes.
    /// </param>
    private void Serve(Socket client, bool isGuest)
    {
        try
        {
            if (isGuest)
                client.ReceiveTimeout = (int)s_guestTime.TotalMilliseconds;
            client.SendTimeout = (int)s_sendTime.TotalMilliseconds;
            AnswerAll(client, isGuest);
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
                _threads--;
                Monitor.PulseAll(_clients);
            }

            client.Dispose();
        }
    }

    private void AnswerAll(Socket client, bool isGuest)
    {
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
            int end;
            while (!_isClosed && (end = buffer.AsSpan(start, length - start).IndexOf((byte)'\n')) >= 0)
            {
                if (Answer(buffer.AsSpan(start, end)) is { } answer)
                    client.Send(answer);
                start += end + 1;
            }

            NoteCall(client, isUnderWay: false);
            if (_isClosed)
                return;
            buffer.AsSpan(start, length - start).CopyTo(buffer);
            length -= start;
            if (isGuest && _socket.Socket.Poll(0, SelectMode.SelectRead))
                return;
            if (length < buffer.Length)
                continue;
            client.Send(ControlMessage.Error(
                null, ControlException.InvalidRequest, $"a line is longer than {MaxLine} bytes"));
            return;
        }
    }

    /// <summary>A client has spoken, or its requests have been answered.</summary>
    private void NoteCall(Socket client, bool isUnderWay)
    {
        lock (_clients)
        {
            if (_clients.Remove(client)) // otherwise it was pushed out meanwhile
                _clients.Add(client);
            if (isUnderWay)
                _calling.Add(client);
            else
                _calling.Remove(client);
            Monitor.PulseAll(_clients);
        }
    }

    /// <returns>The answer's line; null for a notification.</returns>
    private byte[]? Answer(ReadOnlySpan<byte> line)
    {
        if (!ControlMessage.TryParse(line, out ControlRequest request, out byte[]? error))
            return error;
        try
        {
            JsonNode? result = _call(request.Method, request.Parameters);
            return request.IsNotification ? null : ControlMessage.Result(request.Id?.DeepClone(), result);
        }
        catch (Exception failure)
        {
            // Whatever a client sends, and whatever goes wrong with it: the disk is served on.
            int code = failure switch
            {
                ControlException known => known.Code,
                InvalidOperationException or FormatException or JsonException => ControlException.InvalidParameters,
                _ => ControlException.Failed,
            };
            return request.IsNotification ? null : ControlMessage.Error(request.Id, code, failure.Message);
        }
    }
}
