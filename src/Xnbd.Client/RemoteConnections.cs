using Microsoft.Extensions.Logging;
using Xnbd.Linux;
using Xnbd.Storage;

namespace Xnbd.Client;

/// <summary>
/// The connections to a remote, and the requests that wait for one. It chooses a connection for each request, makes
/// connections anew that have broken, and hands their requests to others. All connections are to one server; when the
/// last one has broken, the next server is tried in turn.
/// <para>
/// States: open; closed, once and for all. A request is at one place: with a connection, in the queue of those that
/// wait, or completed. If requests wait, then every connection is full, or there is none. A request that has waited
/// longer than the patience is failed: as <see cref="DiskError.Unreachable"/> where there is no connection, else as
/// <see cref="DiskError.TimedOut"/>.
/// </para>
/// <para>
/// Threads: any thread submits. Two threads belong to this type: one makes connections, which takes time, and one looks
/// for silence. Each connection's receiving thread tells of room, and of its end.
/// </para>
/// <para>
/// Locks: <c>_believing</c>, under which a server is recorded and taken into use; then <c>_lock</c>, then a
/// connection's own lock. While they are held, requests are only added to connections; they are sent, and completed,
/// afterwards.
/// </para>
/// The type's other files: <c>RemoteConnections.Keeping.cs</c> (the two threads, and what they do),
/// <c>RemoteConnections.Believing.cs</c> (what is asked of a server before it is used).
/// </summary>
internal sealed partial class RemoteConnections
{
    /// <summary>
    /// From this size on, in bytes, a read is better sent alone, so that data are spread over connections.
    /// </summary>
    private const int LargeRead = 64 * 1024;

    private readonly object _lock = new(); // pulsed when a connection has left, and when all is closed
    private readonly ILogger _log;
    private readonly TimeProvider _time;
    private readonly Action<RemoteChange>? _changed;
    private readonly TimeSpan _patience;
    private readonly TimeSpan _silence;
    private readonly int _maxConnections;
    private readonly ulong _proxyId;
    private readonly Func<DiskSamples> _takeSamples;
    private readonly Action<RemoteAddress> _record;
    private readonly Lock _believing = new(); // held while another server is recorded and taken into use
    private readonly List<RemoteAddress> _servers; // those that are tried in turn
    private int _turn; // the one whose turn it is, when there is no connection
    private RemoteAddress? _lastServer; // the one that was believed last
    private readonly List<RemoteConnection> _connections = [];
    private readonly Queue<RemoteRequest> _waiting = new();
    private RemoteAddress _address; // of the connections, or of the last ones
    private long? _length; // of the export; null before the first connection, if it is not known
    private int _wanted = 1;
    private volatile uint _blockBytes = 1; // reads are multiples of it,
    private volatile int _maxReadBytes = RemoteDisk.MaxRead; // and no longer than this
    private volatile IReadOnlyList<ulong> _trail = []; // the proxies behind the server
    private long? _lastBreak; // a time stamp
    private long? _lostAt; // a time stamp; null while there is a connection, as far as it was told
    private string _lostReason = ""; // why the last connection has broken
    private volatile string? _down; // why the last connection could not be made
    private bool _isClosed;

    /// <summary>Makes a set without connections.</summary>
    /// <param name="options">Where to connect, and how long to wait.</param>
    public RemoteConnections(RemoteOptions options)
    {
        _servers = [.. options.Servers];
        if (options.LastServer is { } last && _servers.IndexOf(last) is var index and >= 0)
            _turn = index;
        (_address, _lastServer) = (_servers[_turn], options.LastServer);
        (_takeSamples, _record, _length) = (options.TakeSamples, options.Record, options.ExpectedLength);
        (_proxyId, _maxConnections) = (options.ProxyId, options.MaxConnections);
        (_patience, _silence) = (options.Patience, options.Silence);
        (_log, _time, _changed) = (options.Log, options.Time, options.Changed);
    }

    /// <summary>Reads anew what was asked for in a way that the present server does not take.</summary>
    public required Func<RemoteRequest, Task> ReadAnew { get; init; }

    /// <summary>Reads begin and end at multiples of this, in bytes, or at the end of the export.</summary>
    public uint BlockBytes => _blockBytes;

    /// <summary>Reads are at most this long, in bytes.</summary>
    public int MaxReadBytes => _maxReadBytes;

    /// <summary>Where the server is.</summary>
    public RemoteAddress Address
    {
        get
        {
            lock (_lock)
                return _address;
        }
    }

    /// <summary>The ids of the proxies behind the server, as it has told them; see <c>NbdProxyTrail</c>.</summary>
    public IReadOnlyList<ulong> Trail => _trail;

    /// <summary>Connections that are open.</summary>
    public int Count
    {
        get
        {
            lock (_lock)
                return _connections.Count;
        }
    }

    /// <summary>How the remote is at this moment.</summary>
    public RemoteState State
    {
        get
        {
            lock (_lock)
            {
                bool isLost = _connections.Count == 0;
                TimeSpan away = _lostAt is { } since ? _time.GetElapsedTime(since) : TimeSpan.Zero;
                return new RemoteState(
                    _wanted,
                    _connections.ConvertAll(connection => connection.State),
                    _waiting.Count,
                    isLost ? away : null,
                    !isLost ? null : _down is null && _lostReason.Length > 0 ? _lostReason : DownMessage);
            }
        }
    }

    /// <summary>Length of the export in bytes; known after <see cref="Start"/>.</summary>
    public long Length => _length!.Value;

    /// <summary>Starts the threads; before that, makes the first connection if the length is not known.</summary>
    /// <param name="length">Length of the export in bytes; null to learn it from the server.</param>
    /// <exception cref="RemoteException">The server cannot be used, or there is no thread to spare.</exception>
    public void Start(long? length)
    {
        _length = length ?? _length;
        if (length is null)
        {
            (RemoteConnection first, RemoteAddress address) = OpenAny();
            lock (_lock)
            {
                _length = (long)first.Export.Length;
                Believe(address);
                Adopt(first);
            }
        }

        if (LinuxThread.TryStart("remote keeper", KeepConnected) is null
            || LinuxThread.TryStart("remote watch", Watch) is null)
        {
            Close();
            throw new RemoteException($"{_address}: cannot connect: the system has no thread to spare");
        }
    }

    /// <summary>Uses another server from now on. Requests that are under way go there, too.</summary>
    /// <param name="address">The server and its export.</param>
    /// <exception cref="RemoteException">
    /// It cannot be used, or has another disk; nothing has changed.
    /// </exception>
    /// <exception cref="DiskException">It cannot be recorded; nothing has changed.</exception>
    public void SwitchTo(RemoteAddress address)
    {
        RemoteConnection fresh = OpenFirst(address, isRequired: true);
        List<RemoteConnection> old;
        try
        {
            if (fresh.IsBroken)
                throw new RemoteException($"{address}: the server has closed the connection");
            lock (_believing)
            {
                _record(address);
                lock (_lock)
                {
                    if (_isClosed)
                        throw new RemoteException("the remote is not needed any more");
                    if (!_servers.Contains(address))
                        _servers[_servers.IndexOf(_address)] = address;
                    Believe(address);
                    old = [.. _connections];
                    _connections.Clear();
                    Adopt(fresh);
                    Monitor.PulseAll(_lock);
                }
            }
        }
        catch
        {
            fresh.Dispose();
            throw;
        }

        LogSwitched(_log, address);
        old.ForEach(connection => connection.Dispose());
        SubmitWaiting();
    }

    /// <summary>The server has what is known of the disk, and is the remote from now on. The lock is held.</summary>
    private void Believe(RemoteAddress address)
    {
        _address = address;
        _lastServer = address;
        _turn = _servers.IndexOf(address);
    }

    /// <summary>Ends all connections; what waits fails.</summary>
    public void Close()
    {
        List<RemoteConnection> open;
        lock (_lock)
        {
            _isClosed = true;
            open = [.. _connections];
            _connections.Clear();
            Monitor.PulseAll(_lock);
        }

        open.ForEach(connection => connection.Dispose());
    }

    /// <summary>Sends a request with some connection, now or as soon as there is room.</summary>
    public void Submit(RemoteRequest request)
    {
        RemoteConnection? sender = null;
        string? failure;
        lock (_lock)
        {
            failure = _isClosed ? ClosedMessage
                : _patience == TimeSpan.Zero && _connections.Count == 0 ? DownMessage : null;
            if (failure is null && (_waiting.Count > 0 || !TryAdd(request, out sender)))
                _waiting.Enqueue(request);
        }

        if (failure is not null)
            request.Fail(DiskError.Unreachable, failure);
        sender?.SendSoon();
    }

    /// <summary>Ends a request that nobody wants any more, if it still waits for a connection.</summary>
    /// <param name="request">The request; it may have ended meanwhile, and stand for another one.</param>
    /// <param name="use">Its <see cref="RemoteRequest.Use"/>.</param>
    public void Withdraw(RemoteRequest request, int use)
    {
        bool isFound = false;
        lock (_lock)
        {
            if (request.Use != use)
                return;
            for (int left = _waiting.Count; left > 0; left--)
            {
                RemoteRequest waiting = _waiting.Dequeue();
                if (ReferenceEquals(waiting, request))
                    isFound = true;
                else
                    _waiting.Enqueue(waiting);
            }
        }

        if (isFound)
            request.Fail(new OperationCanceledException());
    }

    /// <summary>Sends a question where zeroes are, if a connection can take it now.</summary>
    public bool TryAsk(RemoteRequest question)
    {
        RemoteConnection? sender = null;
        bool isAdded = false;
        lock (_lock)
        {
            if (_waiting.Count > 0)
                return false;
            foreach (RemoteConnection connection in _connections)
            {
                if (!connection.TellsZeroes || !connection.TryAdd(question, out bool mustSend))
                    continue;
                isAdded = true;
                sender = mustSend ? connection : null;
                break;
            }
        }

        sender?.SendSoon();
        return isAdded;
    }

    /// <summary>
    /// Adds a request to a connection that is about to send anyway; else to the one with the fewest under way. The lock
    /// is held.
    /// </summary>
    /// <param name="request">The request.</param>
    /// <param name="sender">The connection that this thread must let send, when it has left the lock.</param>
    /// <returns>False when no connection has room.</returns>
    private bool TryAdd(RemoteRequest request, out RemoteConnection? sender)
    {
        RemoteConnection? best = null;
        foreach (RemoteConnection connection in _connections)
        {
            if (connection.IsBroken)
                continue;
            if (connection.IsGathering && request.Length < LargeRead && connection.TryAdd(request, out bool mustSend))
            {
                sender = mustSend ? connection : null;
                return true;
            }

            if (best is null || connection.UnderWay < best.UnderWay)
                best = connection;
        }

        sender = null;
        if (best is null || !best.TryAdd(request, out bool mustSendBest))
            return false;
        sender = mustSendBest ? best : null;
        return true;
    }

    /// <summary>Sends what waits, as far as there is room.</summary>
    private void SubmitWaiting()
    {
        List<RemoteRequest>? misfits = null;
        List<RemoteConnection>? senders = null;
        lock (_lock)
        {
            while (_waiting.TryPeek(out RemoteRequest? request))
            {
                if (_connections.Count > 0 && !Fits(request))
                    (misfits ??= []).Add(request);
                else if (!TryAdd(request, out RemoteConnection? sender))
                    break;
                else if (sender is not null)
                    (senders ??= []).Add(sender);
                _waiting.Dequeue();
            }
        }

        senders?.ForEach(sender => sender.SendSoon());
        misfits?.ForEach(request => _ = ReadAnew(request));
    }

    /// <summary>Whether the present server takes a request that was made for another one.</summary>
    private bool Fits(RemoteRequest request)
        => request.Length <= _maxReadBytes
            && request.Offset % _blockBytes == 0
            && (request.Length % _blockBytes == 0 || request.Offset + request.Length == _length);

    private const string ClosedMessage = "the remote disk is closed";

    /// <summary>Why there is no connection. The lock is held.</summary>
    private string DownMessage => _down ?? $"{_address}: the server cannot be reached";

    [LoggerMessage(Level = LogLevel.Warning, Message = "a connection to the remote has broken: {Reason}")]
    private static partial void LogBroken(ILogger log, string reason);

    [LoggerMessage(Level = LogLevel.Warning, Message = "the remote cannot be used; trying again: {Reason}")]
    private static partial void LogUnreachable(ILogger log, string reason);

    [LoggerMessage(
        Level = LogLevel.Warning,
        Message = "{Address}: the disk has changed since blocks were fetched; the first that was noticed is at byte "
            + "{Offset}")]
    private static partial void LogChanged(ILogger log, RemoteAddress address, long offset);

    [LoggerMessage(
        Level = LogLevel.Warning,
        Message = "{Address}: nothing of the disk is known yet: this server was recognized by its length alone")]
    private static partial void LogUnknown(ILogger log, RemoteAddress address);

    [LoggerMessage(Level = LogLevel.Information, Message = "the remote is now {Address}")]
    private static partial void LogSwitched(ILogger log, RemoteAddress address);
}
