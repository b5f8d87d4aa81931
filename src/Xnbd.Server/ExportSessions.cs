namespace Xnbd.Server;

/// <summary>
/// The sessions of one export, and what they share. The server's lock guards everything here
/// (<c>NbdServer._connections</c>).
/// </summary>
internal sealed class ExportSessions(SessionServices services)
{
    private readonly Dictionary<Connection, Session> _sessions = [];
    private long _endedRead; // of sessions that have ended
    private long _endedWritten;

    /// <summary>What the sessions share.</summary>
    public SessionServices Services => services;

    /// <summary>The sessions that are open.</summary>
    public IReadOnlyDictionary<Connection, Session> Open => _sessions;

    /// <summary>What the clients have moved so far.</summary>
    public ServerTraffic Traffic => new(
        _sessions.Count,
        _endedRead + _sessions.Values.Sum(session => session.BytesRead),
        _endedWritten + _sessions.Values.Sum(session => session.BytesWritten));

    /// <summary>A session has begun.</summary>
    public void Add(Connection connection, Session session) => _sessions.Add(connection, session);

    /// <summary>A session has ended.</summary>
    public void Remove(Connection connection)
    {
        _sessions.Remove(connection, out Session? session);
        _endedRead += session!.BytesRead;
        _endedWritten += session.BytesWritten;
    }

    /// <summary>Lets all sessions end after the requests that they have received.</summary>
    public void Stop()
    {
        foreach (Session session in _sessions.Values)
            session.Stop();
        services.Stopping.Signal();
    }

    /// <summary>Breaks all connections off.</summary>
    public void Abort(string reason)
    {
        foreach (Connection connection in _sessions.Keys)
            connection.Abort(reason);
    }
}
