using System.Diagnostics;
using System.Net;
using System.Net.Sockets;
using Microsoft.Extensions.Logging;
using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;
using Xnbd.Storage;
using Xnbd.Storage.Threads;

namespace Xnbd.Server;

/// <summary>
/// An NBD server: listens, gives each connection a thread of its own, keeps track of the connections, and ends in good
/// order.
/// <para>
/// A connection is first in its handshake, then in a session, then gone. <c>_connections</c> guards both lists. A
/// connection ends on its own thread, which alone disposes of it.
/// </para>
/// </summary>
/// <param name="exports">What is served.</param>
/// <param name="style">How clients are greeted.</param>
/// <param name="logger">Receives log messages.</param>
/// <param name="limits">Bounds what is in flight; <see cref="RequestLimits.Default"/> unless given.</param>
/// <param name="time">Tells how long clients take; the system's unless given.</param>
public sealed class NbdServer(
    ExportTable exports,
    HandshakeStyle style,
    ILogger logger,
    RequestLimits? limits = null,
    TimeProvider? time = null) : IDisposable
{
    private readonly TimeProvider _time = time ?? TimeProvider.System;
    private readonly SessionServices _services = new(
        new BufferPool(ServerLimits.MaxSpareBuffers),
        new RequestBudget(limits ?? RequestLimits.Default),
        new FailureLog(logger, time ?? TimeProvider.System),
        time ?? TimeProvider.System,
        new LinuxEvent());

    private readonly RefusalLog _refusals = new(logger, time ?? TimeProvider.System);
    private readonly List<Socket> _listeners = [];
    private readonly int _descriptorLimit = LinuxDescriptors.Limit;
    private UnixSocket? _unixSocket;
    private readonly object _connections = new();
    private readonly LinkedList<Connection> _handshakes = [];
    private readonly Dictionary<Connection, Session> _sessions = [];
    private int _connectionCount;
    private long _endedRead; // of sessions that have ended; _connections guards these two, too
    private long _endedWritten;
    private volatile bool _isStopping;

    /// <summary>The number of connections.</summary>
    public int ConnectionCount => Volatile.Read(ref _connectionCount);

    /// <summary>What clients have moved so far.</summary>
    public ServerTraffic Traffic
    {
        get
        {
            lock (_connections)
            {
                (long read, long written) = (_endedRead, _endedWritten);
                foreach (Session session in _sessions.Values)
                {
                    read += session.BytesRead;
                    written += session.BytesWritten;
                }

                return new ServerTraffic(ConnectionCount, read, written);
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

        _listeners.Add(listener);
        var actual = (IPEndPoint)listener.LocalEndPoint!;
        logger.Listening(isWildcard ? $"port {actual.Port}, all addresses" : actual.ToString(), UriOf(actual));
        return actual;
    }

    /// <summary>Opens a listening Unix socket. A socket on which nobody listens any more is replaced.</summary>
    /// <exception cref="IOException">The path is in use, or cannot be created; the message says why.</exception>
    /// <exception cref="ArgumentException">The path is empty, or too long.</exception>
    public void Listen(string path)
    {
        _unixSocket = UnixSocket.Listen(path, isPrivate: false);
        _listeners.Add(_unixSocket.Socket);
        logger.Listening(path, UriOf(path));
    }

    /// <summary>Starts to accept connections, on a thread for each listening socket.</summary>
    /// <exception cref="IOException">The system has no thread to spare.</exception>
    public void Start()
    {
        foreach (Socket listener in _listeners)
        {
            if (LinuxThread.TryStart("listener", () => Accept(listener)) is null)
                throw new IOException("the system has no thread to spare");
        }
    }

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
                logger.HandshakeEnded(connection.Peer, connection.EndReason ?? "server is stopping");
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
        _unixSocket?.Dispose();
        foreach (Socket listener in _listeners)
            listener.Dispose();

        lock (_connections)
        {
            foreach (Connection connection in _handshakes)
                connection.Abort("server is stopping");
            foreach (Session session in _sessions.Values)
                session.Stop();
            _services.Stopping.Signal();
            if (WaitForSessions(ServerLimits.StopTime))
                return;
            logger.SessionsBrokenOff(_sessions.Count);
            foreach (Connection connection in _sessions.Keys)
                connection.Abort("server is stopping");
            WaitForSessions(TimeSpan.FromSeconds(1));
        }
    }

    /// <summary>Stops the server.</summary>
    public void Dispose() => Stop();

    private void Accept(Socket listener)
    {
        SafeFileHandle? spare = OpenSpare();
        while (!_isStopping)
        {
            try
            {
                Take(listener.Accept());
            }
            catch (Exception failure) when (failure is SocketException or ObjectDisposedException)
            {
                if (_isStopping)
                    break;
                if (failure is SocketException { SocketErrorCode: SocketError.TooManyOpenSockets } && spare is not null)
                {
                    // Not even the reserve has a descriptor. The client is disconnected rather than left to wait.
                    spare.Dispose();
                    Refuse(listener);
                    spare = OpenSpare();
                    continue;
                }

                _refusals.Log(failure.Message);
                Thread.Sleep(100); // most causes pass
            }
        }

        spare?.Dispose();
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

    private void Refuse(Socket listener)
    {
        try
        {
            listener.Accept().Dispose();
        }
        catch (SocketException)
        {
            Thread.Sleep(100); // another thread has accepted it
        }

        _refusals.Log("no descriptor is left");
    }

    private static SafeFileHandle? OpenSpare()
    {
        _ = LinuxFile.Open("/dev/null", OpenMode.ReadOnly, out SafeFileHandle? spare);
        return spare;
    }

    /// <summary>The URI to which clients connect.</summary>
    private string UriOf(IPEndPoint address)
    {
        bool isAny = address.Address.Equals(IPAddress.IPv6Any) || address.Address.Equals(IPAddress.Any);
        string host = isAny ? Environment.MachineName
            : address.AddressFamily == AddressFamily.InterNetworkV6 ? $"[{address.Address}]"
            : address.Address.ToString();
        string name = exports.Default.Name;
        return $"nbd://{host}:{address.Port}{(name.Length > 0 ? "/" : "")}{Uri.EscapeDataString(name)}";
    }

    private string UriOf(string path)
    {
        string escaped = Uri.EscapeDataString(path).Replace("%2F", "/", StringComparison.Ordinal);
        return $"nbd+unix:///{Uri.EscapeDataString(exports.Default.Name)}?socket={escaped}";
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
            }
        }
    }

    private void RunSession(Connection connection, Agreement agreement)
    {
        var session = new Session(connection, agreement, _services);
        lock (_connections)
        {
            if (_isStopping)
                return;
            _sessions.Add(connection, session);
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
                _sessions.Remove(connection);
                _endedRead += session.BytesRead;
                _endedWritten += session.BytesWritten;
                Monitor.PulseAll(_connections);
            }
        }
    }

    /// <summary>Waits for the end of all sessions. The lock is held, and released while this waits.</summary>
    /// <returns>False when some are left after that time.</returns>
    private bool WaitForSessions(TimeSpan maxTime)
    {
        long start = Environment.TickCount64;
        while (_sessions.Count > 0)
        {
            TimeSpan left = maxTime - TimeSpan.FromMilliseconds(Environment.TickCount64 - start);
            if (left <= TimeSpan.Zero || !Monitor.Wait(_connections, left))
                return _sessions.Count == 0;
        }

        return true;
    }
}
