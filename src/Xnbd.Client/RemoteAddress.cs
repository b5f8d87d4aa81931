using System.Globalization;
using System.Net;
using System.Net.Sockets;

namespace Xnbd.Client;

/// <summary>Where an NBD server is, and which of its exports is meant.</summary>
/// <param name="Host">A host name or address; null for a Unix socket.</param>
/// <param name="Port">Its TCP port.</param>
/// <param name="UnixPath">A Unix socket's path.</param>
/// <param name="ExportName">The export; empty for the default one.</param>
public sealed record RemoteAddress(string? Host, int Port, string? UnixPath, string ExportName)
{
    /// <summary>
    /// The connection is broken if the other end acknowledges nothing for this time. (By itself, the kernel would try
    /// for a quarter of an hour.) This is short enough to try a read on another connection before
    /// it has to fail.
    /// </summary>
    public static readonly TimeSpan UnacknowledgedTime = TimeSpan.FromSeconds(5);

    private const string UnixPrefix = "unix:";
    private const int ProtocolTcp = 6, TcpUserTimeout = 18; // IPPROTO_TCP, TCP_USER_TIMEOUT: tcp(7)

    /// <summary>Parses what a command line says: a host and a port, or <c>unix:PATH</c> and <c>-</c>.</summary>
    /// <exception cref="FormatException">
    /// It is neither, or the export's name cannot be one; the message says why.
    /// </exception>
    public static RemoteAddress Parse(string host, string port, string exportName)
    {
        if (host.StartsWith(UnixPrefix, StringComparison.Ordinal))
        {
            if (port != "-")
                throw new FormatException($"'{host}' is a Unix socket: give - in place of a port");
            return OfSocket(host[UnixPrefix.Length..], exportName);
        }

        if (host.StartsWith('[') && host.EndsWith(']'))
            host = host[1..^1]; // an IPv6 address, as in a URI
        CheckExportName(exportName);
        if (host.Length is 0 or > 255 || host.Contains('\0', StringComparison.Ordinal))
            throw new FormatException("the remote host's name is empty, or too long");
        if (!int.TryParse(port, NumberStyles.None, CultureInfo.InvariantCulture, out int number)
            || number is < 1 or > 65535)
            throw new FormatException($"remote port '{port}': not a number from 1 to 65535");
        return new RemoteAddress(host, number, null, exportName);
    }

    /// <summary>A Unix socket; a relative path begins at the present folder.</summary>
    /// <exception cref="FormatException">The path or the export's name is too long, or cannot be one.</exception>
    internal static RemoteAddress OfSocket(string path, string exportName)
    {
        CheckExportName(exportName);
        if (path.Length == 0 || path.Contains('\0', StringComparison.Ordinal)
            || System.Text.Encoding.UTF8.GetByteCount(Path.GetFullPath(path)) > Linux.UnixSocket.MaxPath)
            throw new FormatException(
                $"'{path}': the path of a Unix socket has 1 to {Linux.UnixSocket.MaxPath} bytes");
        return new RemoteAddress(null, 0, Path.GetFullPath(path), exportName);
    }

    private static void CheckExportName(string exportName)
    {
        if (Protocol.NbdString.FindFault(exportName) is { } fault)
            throw new FormatException($"the export's name: {fault}");
    }

    /// <summary>As a URI, for people and logs; <see cref="RemoteUri"/> reads it.</summary>
    public override string ToString()
    {
        string export = Uri.EscapeDataString(ExportName);
        if (UnixPath is not null)
            return $"nbd+unix:///{export}?socket={RemoteUri.EscapePath(UnixPath)}";
        bool isIPv6 = Host!.Contains(':', StringComparison.Ordinal);
        string host = isIPv6 ? $"[{Host.Replace("%", "%25", StringComparison.Ordinal)}]" : Host;
        return $"nbd://{host}:{Port}/{export}";
    }

    /// <summary>Connects. If a name has several addresses, the first one that answers is used.</summary>
    /// <exception cref="SocketException">Nobody answers.</exception>
    internal Socket Connect(TimeSpan timeout)
    {
        if (UnixPath is not null)
            return ConnectTo(new UnixDomainSocketEndPoint(UnixPath), timeout);
        SocketException? failure = null;
        IPAddress[] addresses = IPAddress.TryParse(Host, out IPAddress? address)
            ? [address]
            : Dns.GetHostAddresses(Host!);
        foreach (IPAddress candidate in addresses)
        {
            try
            {
                return ConnectTo(new IPEndPoint(candidate, Port), timeout);
            }
            catch (SocketException caught)
            {
                failure = caught;
            }
        }

        throw failure ?? new SocketException((int)SocketError.HostNotFound);
    }

    private static Socket ConnectTo(EndPoint endPoint, TimeSpan timeout)
    {
        var socket = new Socket(
            endPoint.AddressFamily,
            SocketType.Stream,
            endPoint is IPEndPoint ? ProtocolType.Tcp : ProtocolType.Unspecified);
        try
        {
            // The send timeout also holds for the connect (socket(7)). An asynchronous connect would need threads of
            // the runtime, and fail for ever once these could not be started.
            socket.SendTimeout = (int)timeout.TotalMilliseconds;
            try
            {
                socket.Connect(endPoint);
            }
            catch (SocketException failure) when (failure.SocketErrorCode == SocketError.WouldBlock)
            {
                throw new SocketException((int)SocketError.TimedOut); // a Unix socket on which too many wait already
            }

            socket.SendTimeout = 0;
            if (endPoint is IPEndPoint)
            {
                socket.NoDelay = true;
                socket.SetSocketOption(SocketOptionLevel.Socket, SocketOptionName.KeepAlive, true);
                socket.SetSocketOption(
                    SocketOptionLevel.Tcp, SocketOptionName.TcpKeepAliveTime, (int)UnacknowledgedTime.TotalSeconds);
                socket.SetSocketOption(SocketOptionLevel.Tcp, SocketOptionName.TcpKeepAliveInterval, 2);
                socket.SetSocketOption(SocketOptionLevel.Tcp, SocketOptionName.TcpKeepAliveRetryCount, 3);
                socket.SetRawSocketOption(
                    ProtocolTcp, TcpUserTimeout, BitConverter.GetBytes((int)UnacknowledgedTime.TotalMilliseconds));
            }

            return socket;
        }
        catch
        {
            socket.Dispose();
            throw;
        }
    }
}

/// <summary>A remote server cannot be used; the message says which, why, and whose fault it is.</summary>
public sealed class RemoteException(string message) : Exception(message)
{
    /// <summary>The server answers, and what it has is not the disk that is wanted.</summary>
    public bool IsOtherDisk { get; init; }
}
