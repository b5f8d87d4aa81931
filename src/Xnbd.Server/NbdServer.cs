using System.Diagnostics;
using System.Net;
using System.Net.Sockets;
using Microsoft.Extensions.Logging;
using Xnbd.Linux;
using Xnbd.Storage;
using Xnbd.Storage.Threads;

namespace Xnbd.Server;

/// <summary>
/// An NBD server: listens, gives each connection a thread of its own, keeps track of the connections, and ends in good
/// order.
/// <para>
/// A connection is first in its handshake, then in a session of an export, then gone. <c>_connections</c> guards the
/// lists of both. A connection ends on its own thread, which alone disposes of it.
/// </para>
/// </summary>
/// <param name="exports">What is served; with the old style, or without a handshake, its default export.</param>
/// <param name="style">How clients are greeted.</param>
/// <param name="logger">Receives log messages.</param>
/// <param name="maxBytes">Bounds the bytes that all exports together have in flight, in addition to the limits of
/// each; not bounded unless given.</param>
/// <param name="time">Tells how long clients take; the system's unless given.</param>
public sealed class NbdServer(
    ExportTable exports,
    HandshakeStyle style,
    ILogger logger,
    long maxBytes = long.MaxValue,
    TimeProvider? time = null) : IDisposable
{
    private const string StopReason = "server is stopping";

    private static readonly TimeSpan s_maxWait = TimeSpan.FromHours(1); // what Monitor.Wait takes is bounded

    private readonly TimeProvider _time = time ?? TimeProvider.System;
    private readonly BufferPool _buffers = new(ServerLimits.MaxSpareBuffers);
    private readonly BudgetTotal _budget = new(maxBytes);
    private readonly FailureLog _failures = new(logger, time ?? TimeProvider.System);
    private readonly RefusalLog _refusals = new(logger, time ?? TimeProvider.System);
    private readonly List<Listener> _listeners = [];
    private readonly int _descriptorLimit = LinuxDescriptors.Limit;
    private readonly object _connections = new();
    private readonly LinkedList<Connection> _handshakes = [];
    private readonly Dictionary<Export, ExportSessions> _sessions = [];
    private int _connectionCount;
    private volatile bool _isDraining;
    private volatile bool _isStopping;

    /// <summary>The number of connections.</summary>
    public int ConnectionCount => Volatile.Read(ref _connectionCount);

    /// <summary>What the clients of an export have moved so far.</summary>
    public ServerTraffic TrafficOf(Export export)
    {
        lock (_connections)
            return _sessions.GetValueOrDefault(export)?.Traffic ?? default;
    }

    /// <summary>What the clients of all exports have moved so far.</summary>
    public ServerTraffic Traffic
    {
        get
        {
            lock (_connections)
            {
                return _sessions.Values.Aggregate(
                    default(ServerTraffic),
                    (all, sessions) => new ServerTraffic(
                        all.Connections + sessions.Traffic.Connections,
                        all.ReadBytes + sessions.Traffic.ReadBytes,
                        all.WrittenBytes + sessions.Traffic.WrittenBytes));
            }
        }
    }

    /// <summary>The clients that are in a session.</summary>
    public IReadOnlyList<ServerClient> Clients
    {
        get
        {
            lock (_connections)
            {
                return [.. _sessions.SelectMany(pair => Describe(pair.Key, pair.Value))];
            }
        }
    }

    /// <summary>Opens a listening socket; connections queue up until <see cref="Start"/>.</summary>
    /// <param name="address">The address and port. The IPv6 wildcard address means all IPv4 and IPv6 addresses.</param>
    /// <returns>The address and port on which the server listens.</returns>
    /// <exception cref="SocketException">The address is in use, or does not belong to this host.</exception>
    public IPEndPoint Listen(IPEndPoint address)
    {
        bool isWildcard = address.Address.Equals(IPAddress.IPv6Any);
        if (isWildcard && !Socket.OSSupportsIPv6)
            address = new IPEndPoint(IPAddress.Any, address.Port);
        var listener = new Socket(address.AddressFamily, SocketType.Stream, ProtocolType.Tcp);
        try
        {
            if (listener.AddressFamily == AddressFamily.InterNetworkV6)
                listener.DualMode = isWildcard;
            // Bind sets SO_REUSEADDR, so that a server can be started again at once. SocketOptionName.ReuseAddress
            // would set SO_REUSEPORT, too: a second server on the same port would get a part of the connections.
            listener.Bind(address);
            listener.Listen();
        }
        catch
        {
            listener.Dispose();
            throw;
        }

        var actual = (IPEndPoint)listener.LocalEndPoint!;
        Add(new Listener(listener));
        return actual;
    }

    /// <summary>Opens a listening Unix socket. A socket on which nobody listens any more is replaced.</summary>
    /// <exception cref="IOException">The path is in use, or cannot be created; the message says why.</exception>
    /// <exception cref="ArgumentException">The path is empty, or too long.</exception>
    public void Listen(string path)
    {
        UnixSocket file = UnixSocket.Listen(path, isPrivate: false);
        Add(new Listener(file.Socket, file));
    }

    /// <summary>
    /// Uses a socket that listens already. Another process may share it: at the end it is closed here, but not shut
    /// down, and its file stays.
    /// </summary>
    /// <param name="listener">A TCP or Unix stream socket, which belongs to the server from now on.</param>
    /// <exception cref="IOException">There are no more descriptors.</exception>
    public void Listen(Socket listener) => Add(new Listener(listener));

    /// <summary>Starts to accept connections, on a thread for each listening socket.</summary>
    /// <exception cref="IOException">The system has no thread to spare.</exception>
    public void Start()
    {
        foreach (Listener listener in _listeners)
        {
            if (!listener.TryStart(Take, _refusals))
                throw new IOException("the system has no thread to spare");
        }
    }

    /// <summary>
    /// Whether every thread that accepts connections responds. One thread at a time may ask, after
    /// <see cref="Start"/>.
    /// </summary>
    /// <param name="maxTime">How long each may take.</param>
    public bool Responds(TimeSpan maxTime) => _listeners.TrueForAll(listener => listener.Responds(maxTime));

    /// <summary>Serves one connection on the calling thread until it ends.</summary>
    /// <param name="socket">The connection; it is closed at the end.</param>
    public void Serve(Socket socket)
    {
        Connection connection;
        try
        {
            connection = new Connection(socket);
        }
        catch (SocketException)
        {
            socket.Dispose(); // the client has already left
            return;
        }

        Interlocked.Increment(ref _connectionCount);
        try
        {
            if (Negotiate(connection) is { } agreement)
                RunSession(connection, agreement);
            else
                logger.HandshakeEnded(connection.Peer, connection.EndReason ?? StopReason);
        }
        catch (Exception failure)
        {
            logger.SessionCrashed(connection.Peer, failure.ToString());
        }
        finally
        {
            connection.Dispose();
            Interlocked.Decrement(ref _connectionCount);
        }
    }

    /// <summary>
    /// Accepts no more connections, lets every session finish the requests that it has received, and returns when all
    /// have ended. Sessions that take longer than <see cref="ServerLimits.StopTime"/> are broken off.
    /// </summary>
    public void Stop()
    {
        _isStopping = true;
        foreach (Listener listener in _listeners)
            listener.Dispose();

        lock (_connections)
        {
            Monitor.PulseAll(_connections); // an export that is being removed has no grace any more
            foreach (Connection connection in _handshakes)
                connection.Abort(StopReason);
            foreach (ExportSessions sessions in _sessions.Values)
                sessions.Stop();
            if (WaitUntil(() => OpenSessions == 0, ServerLimits.StopTime))
                return;
            logger.SessionsBrokenOff(OpenSessions);
            foreach (ExportSessions sessions in _sessions.Values)
                sessions.Abort(StopReason);
            WaitUntil(() => OpenSessions == 0, TimeSpan.FromSeconds(1));
        }
    }

    /// <summary>
    /// Accepts no more connections, and returns when all clients have left, when their time is over, or when the server
    /// is stopped. <see cref="Stop"/> must follow.
    /// </summary>
    /// <param name="grace">How long clients may go on.</param>
    public void Drain(TimeSpan grace)
    {
        _isDraining = true;
        foreach (Listener listener in _listeners)
            listener.Dispose();
        lock (_connections)
            WaitUntil(() => (OpenSessions == 0 && _handshakes.Count == 0) || _isStopping, grace);
    }

    /// <summary>
    /// Removes an export, and returns when no client uses it any more. Nobody can enter it from now on. Those who are
    /// in may go on for a time, or until they leave. Then each session ends after the requests that it has received;
    /// those that take longer than <see cref="ServerLimits.StopTime"/> are broken off.
    /// </summary>
    /// <param name="export">The export. Another one may take its name at once.</param>
    /// <param name="grace">How long clients may go on.</param>
    /// <returns>False when a request is still under way, on a disk that does not answer: the disk cannot be
    /// disposed of.</returns>
    public bool Remove(Export export, TimeSpan grace)
    {
        exports.Remove(export);
        lock (_connections)
        {
            export.IsRemoved = true;
            if (!_sessions.TryGetValue(export, out ExportSessions? sessions))
                return true;
            bool IsEmpty() => sessions.Open.Count == 0;
            if (!WaitUntil(() => IsEmpty() || _isStopping || export.IsExpelled, grace) || !IsEmpty())
                sessions.Stop();
            if (!WaitUntil(IsEmpty, ServerLimits.StopTime))
            {
                logger.SessionsBrokenOff(sessions.Open.Count);
                sessions.Abort("export was removed");
                if (!WaitUntil(IsEmpty, TimeSpan.FromSeconds(1)))
                    return false;
            }

            _sessions.Remove(export);
            sessions.Services.Stopping.Dispose();
            return true;
        }
    }

    /// <summary>Ends the time that the clients of an export have while it is being removed.</summary>
    public void Expel(Export export)
    {
        lock (_connections)
        {
            export.IsExpelled = true;
            Monitor.PulseAll(_connections);
        }
    }

    /// <summary>The clients that are in a session of an export.</summary>
    public IReadOnlyList<ServerClient> ClientsOf(Export export)
    {
        lock (_connections)
            return _sessions.TryGetValue(export, out ExportSessions? sessions) ? Describe(export, sessions) : [];
    }

    /// <summary>Stops the server.</summary>
    public void Dispose() => Stop();

    private void Add(Listener listener)
    {
        _listeners.Add(listener);
        logger.Listening(Describe(listener.Address), UriOf(listener.Address, exports.DefaultName ?? ""));
    }

    /// <summary>
    /// Gives a new connection a thread, or closes it. Nothing was received from it, so the client sees a clean end.
    /// </summary>
    private void Take(Socket socket)
    {
        string? refusal = LinuxDescriptors.IsOfReserve(socket.SafeHandle, _descriptorLimit)
            ? $"the limit of {_descriptorLimit} descriptors is reached"
            : Volatile.Read(ref _connectionCount) >= ServerLimits.MaxConnections
                ? $"there are {ServerLimits.MaxConnections} clients already"
                : LinuxThread.TryStart("session", () => Serve(socket)) is null ? "the system has no thread to spare"
                : null;
        if (refusal is null)
            return;
        socket.Dispose();
        _refusals.Log(refusal);
    }

    /// <summary>The URIs of an export, one for each address on which this server listens.</summary>
    /// <param name="name">The export's name; empty for the default one.</param>
    public IReadOnlyList<string> UrisOf(string name)
        => [.. _listeners.Select(listener => UriOf(listener.Address, name))];

    private static string Describe(EndPoint address)
        => address is IPEndPoint { Address: var host, Port: var port } && host.Equals(IPAddress.IPv6Any)
            ? $"port {port}, all addresses"
            : address.ToString()!;

    private static string UriOf(EndPoint place, string name)
    {
        if (place is not IPEndPoint address)
        {
            string path = Uri.EscapeDataString(place.ToString()!).Replace("%2F", "/", StringComparison.Ordinal);
            return $"nbd+unix:///{Uri.EscapeDataString(name)}?socket={path}";
        }

        bool isAny = address.Address.Equals(IPAddress.IPv6Any) || address.Address.Equals(IPAddress.Any);
        string host = isAny ? Environment.MachineName
            : address.AddressFamily == AddressFamily.InterNetworkV6 ? $"[{address.Address}]"
            : address.Address.ToString();
        return $"nbd://{host}:{address.Port}{(name.Length > 0 ? "/" : "")}{Uri.EscapeDataString(name)}";
    }

    private Agreement? Negotiate(Connection connection)
    {
        LinkedListNode<Connection> place;
        lock (_connections)
        {
            if (_isStopping)
                return null;
            if (_handshakes.Count >= ServerLimits.MaxHandshakes)
            {
                _handshakes.First!.Value.Abort("too many connections in their handshake");
                _handshakes.RemoveFirst();
            }

            place = _handshakes.AddLast(connection);
        }

        try
        {
            return Handshake.Run(connection, exports, style, _time);
        }
        finally
        {
            lock (_connections)
            {
                if (place.List is not null)
                    _handshakes.Remove(place);
                if (_isDraining)
                    Monitor.PulseAll(_connections);
            }
        }
    }

    private void RunSession(Connection connection, Agreement agreement)
    {
        ExportSessions sessions;
        Session session;
        lock (_connections)
        {
            if (_isStopping || agreement.Export.IsRemoved)
                return;
            if (TrySessionsOf(agreement.Export) is not { } found)
            {
                _refusals.Log("no descriptor is left");
                return;
            }

            sessions = found;
            session = new Session(connection, agreement, sessions.Services, _time.GetUtcNow());
            sessions.Add(connection, session);
        }

        try
        {
            logger.SessionStarted(connection.Peer, agreement.Export.Name);
            long start = Stopwatch.GetTimestamp();
            session.Run();
            logger.SessionEnded(
                connection.Peer,
                connection.EndReason ?? "ended",
                session.RequestCount,
                ByteCount.Describe(session.BytesRead),
                ByteCount.Describe(session.BytesWritten),
                Stopwatch.GetElapsedTime(start).TotalSeconds);
            connection.Linger(ServerLimits.LingerTime);
        }
        finally
        {
            lock (_connections)
            {
                sessions.Remove(connection);
                Monitor.PulseAll(_connections);
            }
        }
    }

    private static List<ServerClient> Describe(Export export, ExportSessions sessions) =>
    [
        .. sessions.Open.Select(open => new ServerClient(
            open.Key.Peer,
            export.Name,
            open.Value.Since,
            open.Value.BytesRead,
            open.Value.BytesWritten,
            open.Value.RequestCount,
            open.Value.InFlight)),
    ];

    private int OpenSessions => _sessions.Values.Sum(sessions => sessions.Open.Count);

    /// <summary>The sessions of an export. The lock is held.</summary>
    /// <returns>Null when there is no descriptor for what they share.</returns>
    private ExportSessions? TrySessionsOf(Export export)
    {
        if (_sessions.TryGetValue(export, out ExportSessions? sessions))
            return sessions;
        if (LinuxEvent.TryCreate() is not { } stopping)
            return null;
        var budget = new RequestBudget(export.Limits, _budget);
        return _sessions[export] = new ExportSessions(
            new SessionServices(_buffers, budget, _failures, _time, stopping));
    }

    /// <summary>Waits for a condition, which the end of a session may bring about. The lock is held, and released while
    /// this waits.</summary>
    /// <returns>False when it does not hold after that time.</returns>
    private bool WaitUntil(Func<bool> condition, TimeSpan maxTime)
    {
        long start = Environment.TickCount64;
        while (!condition())
        {
            TimeSpan left = maxTime - TimeSpan.FromMilliseconds(Environment.TickCount64 - start);
            if (left <= TimeSpan.Zero)
                return false;
            Monitor.Wait(_connections, left < s_maxWait ? left : s_maxWait);
        }

        return true;
    }
}
