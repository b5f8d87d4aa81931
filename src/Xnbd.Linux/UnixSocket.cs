using System.Net.Sockets;

namespace Xnbd.Linux;

/// <summary>Unix sockets as files.</summary>
public static class UnixSocket
{
    /// <summary>The longest path of a Unix socket, in bytes: <c>sockaddr_un</c>, unix(7).</summary>
    public const int LongestPath = 107;

    /// <summary>The address of a path.</summary>
    /// <exception cref="ArgumentException">The path is empty, or too long.</exception>
    public static UnixDomainSocketEndPoint Address(string path)
        => System.Text.Encoding.UTF8.GetByteCount(path) is > 0 and <= LongestPath
            ? new UnixDomainSocketEndPoint(path)
            : throw new ArgumentException($"the path of a Unix socket has 1 to {LongestPath} bytes");

    /// <summary>Removes a socket that nobody listens on any more, as a killed server leaves it. Anything else stays: binding will say so.</summary>
    /// <exception cref="ArgumentException">The path is empty, or too long.</exception>
    public static void RemoveStale(string path)
    {
        UnixDomainSocketEndPoint address = Address(path);
        if (LinuxFile.Status(path, out FileStatus status) != Errno.None || status.Kind != FileKind.Socket)
            return;
        using var probe = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        try
        {
            probe.Connect(address);
        }
        catch (SocketException failure) when (failure.SocketErrorCode == SocketError.ConnectionRefused)
        {
            Remove(path, status);
        }
        catch (SocketException)
        {
            // It cannot be asked, for want of permission for example.
        }
    }

    /// <summary>
    /// Removes a socket, unless another one has taken its place; if that is not allowed, it stays, as that of a killed server does.
    /// </summary>
    /// <param name="path">Where it is.</param>
    /// <param name="own">Which it is.</param>
    public static void Remove(string path, in FileStatus own)
    {
        if (LinuxFile.Status(path, out FileStatus present) == Errno.None && present.IsSameFile(own))
            _ = LinuxFile.Unlink(path);
    }
}
