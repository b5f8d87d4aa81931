namespace Xnbd.Server;

/// <summary>What the clients of a server, or of one export, have moved since its start.</summary>
/// <param name="Connections">Connections that are open.</param>
/// <param name="ReadBytes">Bytes of data that clients have asked for.</param>
/// <param name="WrittenBytes">Bytes of data that clients have sent.</param>
public readonly record struct ServerTraffic(int Connections, long ReadBytes, long WrittenBytes);

/// <summary>A client that is connected to an export.</summary>
/// <param name="Address">Where it is, for people.</param>
/// <param name="Export">The export's name.</param>
/// <param name="Since">When its session began.</param>
/// <param name="ReadBytes">Bytes of data that it has asked for.</param>
/// <param name="WrittenBytes">Bytes of data that it has sent.</param>
/// <param name="Requests">Requests that it has sent.</param>
/// <param name="InFlight">Requests that wait for the disk, or for the client to take their replies.</param>
public readonly record struct ServerClient(
    string Address,
    string Export,
    DateTimeOffset Since,
    long ReadBytes,
    long WrittenBytes,
    long Requests,
    int InFlight);
