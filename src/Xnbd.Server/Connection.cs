using System.Net;
using System.Net.Sockets;
using Xnbd.Linux;

namespace Xnbd.Server;

/// <summary>
/// A client's socket, in blocking mode. The connection's thread owns it; any thread may end it. The first reason for
/// its end is kept; later ones are ignored.
/// </summary>
internal sealed class Connection : IDisposable
{
    private readonly Socket _socket;
    private string? _endReason;
    private bool _isProbed; // by the connection's own thread

    public Connection(Socket socket)
    {
        _socket = socket;
        Handle = socket.SafeHandle;
        Peer = Describe(socket);
        if (socket.ProtocolType == ProtocolType.Tcp)
        {
            socket.NoDelay = true;
            // otherwise a vanished peer would stay for ever
            socket.SetSocketOption(SocketOptionLevel.Socket, SocketOptionName.KeepAlive, true);
        }

        IsUnix = socket.AddressFamily == AddressFamily.Unix;
        if (IsUnix)
            socket.SendBufferSize = ServerLimits.UnixSendBuffer; // TCP's grows by itself

        SendsFiles = socket.ProtocolType != ProtocolType.Tcp || !IsOfThisMachine(socket);
        socket.SendTimeout = ServerLimits.StallCheckMilliseconds;
        socket.ReceiveTimeout = ServerLimits.StallCheckMilliseconds;
    }

    /// <summary>The descriptor, for calls on the socket.</summary>
    public SafeSocketHandle Handle { get; }

    /// <summary>Who the client is, for log lines.</summary>
    public string Peer { get; }

    /// <summary>
    /// A Unix socket. Its buffer holds less than a long write, so client and server take turns while one is sent.
    /// </summary>
    public bool IsUnix { get; }

    /// <summary>
    /// Long reads may go from the file to the socket, without a copy through this process. Over TCP within this machine
    /// that is slower: the client copies the pages of the file out of memory, where they are in no processor's cache.
    /// </summary>
    public bool SendsFiles { get; }

    /// <summary>Why the connection ended; null while it has not.</summary>
    public string? EndReason => Volatile.Read(ref _endReason);

    /// <summary>Notes why the connection ends; only the first reason counts.</summary>
    /// <returns>False, so that a failing step can return it.</returns>
    public bool End(string reason)
    {
        Interlocked.CompareExchange(ref _endReason, reason, null);
        return false;
    }

    /// <summary>
    /// Puts an explanation before the reason, for the log. For the connection's own thread, after the connection has
    /// ended.
    /// </summary>
    public void AddToEndReason(string explanation)
        => Volatile.Write(ref _endReason, EndReason is { } reason ? $"{explanation} ({reason})" : explanation);

    /// <summary>
    /// Whether nothing reaches the client any more. A client that has only closed its sending side still gets its
    /// replies. If it has closed its socket, over TCP that looks the same at first: nothing is sent to it that it could
    /// refuse. So it is asked, by the probes of TCP, whether the socket is still there. For a minute its kernel says
    /// yes in any case.
    /// </summary>
    public bool IsClientGone()
    {
        PeerPresence client = LinuxSocket.LookForPeer(Handle);
        if (client == PeerPresence.HalfClosed && !_isProbed)
        {
            _isProbed = true;
            ProbeClient();
        }

        return client == PeerPresence.Gone;
    }

    private void ProbeClient()
    {
        if (IsUnix)
            return; // there it is seen at once
        try
        {
            const int time = ServerLimits.ProbeSeconds;
            _socket.SetSocketOption(SocketOptionLevel.Tcp, SocketOptionName.TcpKeepAliveTime, time);
            _socket.SetSocketOption(SocketOptionLevel.Tcp, SocketOptionName.TcpKeepAliveInterval, time);
        }
        catch (SocketException)
        {
            // Then the probes of the system's settings find out, in some hours.
        }
    }

    /// <summary>Breaks the connection off, from any thread. Threads that wait for it are woken.</summary>
    public void Abort(string reason)
    {
        End(reason);
        Shutdown(SocketShutdown.Both);
    }

    /// <summary>Fills the whole buffer before a deadline.</summary>
    /// <returns>False when the stream has ended, or the deadline has passed.</returns>
    public bool ReceiveExactly(Span<byte> buffer, Deadline deadline)
    {
        while (buffer.Length > 0)
        {
            long count = LinuxSocket.ReceiveNow(Handle, buffer);
            if (Errno.Of(count) == Errno.EAGAIN)
            {
                if (deadline.HasPassed)
                    return End("handshake took too long");
                int wait = Math.Min((int)deadline.Left.TotalMilliseconds + 1, ServerLimits.StallCheckMilliseconds);
                LinuxSocket.Wait(Handle, forReading: true, forWriting: false, wait);
                continue;
            }

            if (count <= 0)
                return End(count == 0 ? "closed by client" : Errno.Of(count).Describe());
            buffer = buffer[(int)count..];
        }

        return true;
    }

    /// <summary>Sends all of a small message, before a deadline.</summary>
    public bool SendExactly(ReadOnlySpan<byte> data, Deadline deadline)
    {
        while (data.Length > 0)
        {
            long count = LinuxSocket.Send(Handle, data, more: false);
            if (Errno.Of(count) == Errno.EAGAIN)
            {
                if (deadline.HasPassed)
                    return End("handshake took too long");
                continue;
            }

            if (count < 0)
                return End(Errno.Of(count).Describe());
            data = data[(int)count..];
        }

        return true;
    }

    /// <summary>
    /// Sends the end of the stream, and gives the client a moment to close. Closing a socket with unread data would
    /// discard the replies that are still on their way.
    /// </summary>
    public void Linger(TimeSpan maxTime)
    {
        Shutdown(SocketShutdown.Send);
        Span<byte> scratch = stackalloc byte[4096];
        long start = Environment.TickCount64;
        while (Environment.TickCount64 - start < maxTime.TotalMilliseconds)
        {
            long count = LinuxSocket.ReceiveNow(Handle, scratch);
            if (Errno.Of(count) == Errno.EAGAIN)
                LinuxSocket.Wait(Handle, forReading: true, forWriting: false, 50);
            else if (count <= 0)
                return;
        }
    }

    public void Dispose() => _socket.Dispose();

    /// <summary>Whether a TCP connection between two addresses stays within this machine.</summary>
    internal static bool IsOfThisMachine(IPAddress local, IPAddress remote)
        => IPAddress.IsLoopback(remote) || remote.Equals(local);

    private static bool IsOfThisMachine(Socket socket)
    {
        try
        {
            return socket.RemoteEndPoint is IPEndPoint remote && socket.LocalEndPoint is IPEndPoint local
                && IsOfThisMachine(local.Address, remote.Address);
        }
        catch (SocketException)
        {
            return false; // the client has already left
        }
    }

    private static string Describe(Socket socket)
    {
        try
        {
            return socket.RemoteEndPoint switch
            {
                IPEndPoint { Address.IsIPv4MappedToIPv6: true } peer => $"{peer.Address.MapToIPv4()}:{peer.Port}",
                IPEndPoint peer => peer.ToString(),
                UnixDomainSocketEndPoint => "local socket",
                _ => "client",
            };
        }
        catch (SocketException)
        {
            return "client"; // the client has already left
        }
    }

    private void Shutdown(SocketShutdown how)
    {
        try
        {
            _socket.Shutdown(how);
        }
        catch (Exception failure) when (failure is SocketException or ObjectDisposedException)
        {
            // The connection is already gone, as intended.
        }
    }
}
