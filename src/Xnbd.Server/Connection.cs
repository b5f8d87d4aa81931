using System.Net;
using System.Net.Sockets;
using Xnbd.Linux;

namespace Xnbd.Server;

/// <summary>
/// A client's socket, in blocking mode. Its owner is the connection's thread; any thread may end it. The first reason
/// for which it ends is kept, all later ones are noise.
/// </summary>
internal sealed class Connection : IDisposable
{
    private readonly Socket _socket;
    private string? _endReason;

    public Connection(Socket socket)
    {
        _socket = socket;
        Handle = socket.SafeHandle;
        Peer = Describe(socket);
        if (socket.ProtocolType == ProtocolType.Tcp)
        {
            socket.NoDelay = true;
            socket.SetSocketOption(SocketOptionLevel.Socket, SocketOptionName.KeepAlive, true); // or a vanished peer stays for ever
        }

        if (socket.AddressFamily == AddressFamily.Unix)
            socket.SendBufferSize = ServerLimits.UnixSendBuffer; // TCP's grows by itself

        socket.SendTimeout = ServerLimits.StallCheckMilliseconds;
        socket.ReceiveTimeout = ServerLimits.StallCheckMilliseconds;
    }

    /// <summary>For calls on the socket.</summary>
    public SafeSocketHandle Handle { get; }

    /// <summary>Who the client is, for log lines.</summary>
    public string Peer { get; }

    /// <summary>Why the connection ended; null while it has not.</summary>
    public string? EndReason => Volatile.Read(ref _endReason);

    /// <summary>Notes why the connection ends; only the first reason counts.</summary>
    /// <returns>False, so that a failing step can end with it.</returns>
    public bool End(string reason)
    {
        Interlocked.CompareExchange(ref _endReason, reason, null);
        return false;
    }

    /// <summary>
    /// Puts what explains the end before its reason, for the log. For the connection's own thread, after it has ended.
    /// </summary>
    public void AddToEndReason(string explanation)
        => Volatile.Write(ref _endReason, EndReason is { } reason ? $"{explanation} ({reason})" : explanation);

    /// <summary>Breaks the connection off, from any thread: whoever waits for it is woken.</summary>
    public void Abort(string reason)
    {
        End(reason);
        Shutdown(SocketShutdown.Both);
    }

    /// <summary>Receives exactly what fills the buffer, before a deadline.</summary>
    /// <returns>False when the stream or the time ended first.</returns>
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
    /// Sends the end of the stream, and gives the client a moment to close: closing a socket with unread data would
    /// discard the replies that are still on their way.
    /// </summary>
    public void Linger(TimeSpan atMost)
    {
        Shutdown(SocketShutdown.Send);
        Span<byte> scratch = stackalloc byte[4096];
        long start = Environment.TickCount64;
        while (Environment.TickCount64 - start < atMost.TotalMilliseconds)
        {
            long count = LinuxSocket.ReceiveNow(Handle, scratch);
            if (Errno.Of(count) == Errno.EAGAIN)
                LinuxSocket.Wait(Handle, forReading: true, forWriting: false, 50);
            else if (count <= 0)
                return;
        }
    }

    public void Dispose() => _socket.Dispose();

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
            return "client"; // it has left already
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
            // It is gone already, which is what was wanted.
        }
    }
}
