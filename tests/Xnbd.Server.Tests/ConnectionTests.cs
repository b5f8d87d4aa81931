using System.Net;
using System.Net.Sockets;

namespace Xnbd.Server.Tests;

/// <summary>Which connections may take long reads from the file.</summary>
public class ConnectionTests
{
    [Theory]
    [InlineData("127.0.0.1", "127.0.0.1", true)]
    [InlineData("::1", "::1", true)]
    [InlineData("::ffff:127.0.0.1", "::ffff:127.0.0.1", true)]
    [InlineData("::ffff:192.0.2.1", "::ffff:192.0.2.1", true)] // by one of the machine's own addresses
    [InlineData("192.0.2.1", "192.0.2.2", false)]
    [InlineData("::ffff:192.0.2.1", "::ffff:192.0.2.2", false)]
    public void A_connection_within_this_machine_is_known_by_its_addresses(string local, string remote, bool isOfThis)
        => Assert.Equal(isOfThis, Connection.IsOfThisMachine(IPAddress.Parse(local), IPAddress.Parse(remote)));

    [Fact]
    public void Over_tcp_within_this_machine_no_files_are_sent()
    {
        using var listener = new TcpListener(IPAddress.Loopback, 0);
        listener.Start();
        using var client = new TcpClient();
        client.Connect((IPEndPoint)listener.LocalEndpoint);
        using var connection = new Connection(listener.AcceptSocket());
        Assert.False(connection.SendsFiles);
    }
}
