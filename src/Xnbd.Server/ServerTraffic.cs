namespace Xnbd.Server;

/// <summary>What the clients of a server have moved since its start.</summary>
/// <param name="Connections">Connections that are open.</param>
/// <param name="ReadBytes">Bytes of data that clients have asked for.</param>
/// <param name="WrittenBytes">Bytes of data that clients have sent.</param>
public readonly record struct ServerTraffic(int Connections, long ReadBytes, long WrittenBytes);
