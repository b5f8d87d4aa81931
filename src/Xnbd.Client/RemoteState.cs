namespace Xnbd.Client;

/// <summary>How a remote is at a moment.</summary>
/// <param name="WantedConnections">How many connections there should be.</param>
/// <param name="Connections">Those that are open.</param>
/// <param name="WaitingReads">Reads that wait for a connection, or for room in one.</param>
/// <param name="Lost">How long there has been no connection; null if there is one.</param>
/// <param name="Reason">Why there is no connection; null if there is one.</param>
public sealed record RemoteState(
    int WantedConnections,
    IReadOnlyList<RemoteConnectionState> Connections,
    int WaitingReads,
    TimeSpan? Lost,
    string? Reason);

/// <summary>How a connection to a remote is at a moment.</summary>
/// <param name="Id">Tells this connection from all others of the process.</param>
/// <param name="Requests">Requests that the server has not answered.</param>
/// <param name="Silence">How long the server has sent nothing while it owes answers; zero if it owes none.</param>
/// <param name="ReceivedBytes">Bytes that were received so far, with everything around the data.</param>
public readonly record struct RemoteConnectionState(int Id, int Requests, TimeSpan Silence, long ReceivedBytes);
