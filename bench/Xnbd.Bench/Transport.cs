using System.Net;
using System.Net.Sockets;
using Xnbd.TestKit;

namespace Xnbd.Bench;

/// <summary>How clients reach a server.</summary>
public enum Transport
{
    /// <summary>A Unix socket.</summary>
    Unix,

    /// <summary>TCP on the loopback interface.</summary>
    Tcp,

    /// <summary>TCP on a pair of virtual network cards; the server is in a network namespace of its own.</summary>
    Veth,
}

/// <summary>Where a server listens.</summary>
/// <param name="Transport">How clients reach it.</param>
/// <param name="Path">The path of its Unix socket, if it has one.</param>
/// <param name="Address">Its IPv4 address, if it has none.</param>
/// <param name="Port">A free TCP port, also of a server on a Unix socket: nbd-server always has a port, too.</param>
/// <param name="Prefix">What stands before the server's command line.</param>
public sealed record Endpoint(Transport Transport, string Path, string Address, int Port, string[] Prefix)
{
    public bool IsUnix => Transport == Transport.Unix;

    /// <summary>Where clients connect to.</summary>
    public EndPoint Remote
        => IsUnix ? new UnixDomainSocketEndPoint(Path) : new IPEndPoint(IPAddress.Parse(Address), Port);

    /// <summary>The address in the form of all clients.</summary>
    public string Uri(string export)
        => IsUnix ? $"nbd+unix:///{export}?socket={Path}" : $"nbd://{Address}:{Port}/{export}";

    /// <summary>
    /// Whether a server greets there. That the kernel accepts a connection would say less: nbd-server listens some time
    /// before it serves.
    /// </summary>
    public bool Greets()
    {
        try
        {
            using NbdTestClient client = NbdTestClient.Connect(Remote);
            client.Start();
            return true;
        }
        catch (Exception failure) when (failure is SocketException or EndOfStreamException)
        {
            return false;
        }
    }
}

/// <summary>Makes endpoints, and the network namespace of those that need one.</summary>
internal sealed class Network : IDisposable
{
    private NetworkNamespace? _namespace;

    /// <summary>Makes what a transport needs.</summary>
    /// <returns>Why it cannot be used here; null when it can.</returns>
    public async Task<string?> Prepare(Transport transport)
    {
        if (transport != Transport.Veth || _namespace is not null)
            return null;
        (_namespace, string? reason) = await NetworkNamespace.TryCreate();
        return reason;
    }

    /// <summary>An endpoint where nobody listens.</summary>
    /// <param name="transport">The transport, which was prepared.</param>
    /// <param name="folder">Where a Unix socket goes.</param>
    /// <param name="name">The name of a Unix socket.</param>
    public Endpoint Free(Transport transport, string folder, string name)
        => new(
            transport,
            Path.Combine(folder, name),
            transport == Transport.Veth ? _namespace!.Address : "127.0.0.1",
            ServerProcess.FreePort(),
            transport == Transport.Veth ? _namespace!.Prefix : []);

    public void Dispose() => _namespace?.Dispose();
}
