using System.Net.Sockets;

namespace Xnbd.Fuzz;

/// <summary>
/// Connected pairs of Unix sockets. They come from a listening socket in the abstract namespace, which leaves nothing
/// in
/// the file system.
/// </summary>
internal sealed class SocketPairs
{
    private readonly Socket _listener = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
    private readonly UnixDomainSocketEndPoint _place = new($"\0xnbd-fuzz-{Guid.NewGuid():N}");

    public SocketPairs()
    {
        _listener.Bind(_place);
        _listener.Listen();
    }

    /// <summary>Makes a pair; each end belongs to the caller.</summary>
    public (Socket Near, Socket Far) Make()
    {
        var near = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        near.Connect(_place);
        return (near, _listener.Accept());
    }
}

/// <summary>Whole conversations over sockets.</summary>
internal static class SocketExtensions
{
    /// <summary>Sends all of it.</summary>
    /// <returns>False when the other end has gone.</returns>
    public static bool TrySendAll(this Socket socket, ReadOnlySpan<byte> data)
    {
        try
        {
            while (data.Length > 0)
                data = data[socket.Send(data)..];
            return true;
        }
        catch (SocketException)
        {
            return false;
        }
    }

    /// <summary>Sends the end of the stream, unless the other end has gone.</summary>
    public static void TryShutdownSend(this Socket socket)
    {
        try
        {
            socket.Shutdown(SocketShutdown.Send);
        }
        catch (SocketException)
        {
            // Nobody is there to see it.
        }
    }

    /// <summary>Receives so many bytes.</summary>
    /// <returns>False when the stream ends first.</returns>
    public static bool TryReceive(this Socket socket, int length)
    {
        byte[] data = new byte[length];
        try
        {
            for (int done = 0; done < length;)
            {
                int count = socket.Receive(data.AsSpan(done));
                if (count == 0)
                    return false;
                done += count;
            }

            return true;
        }
        catch (SocketException)
        {
            return false;
        }
    }

    /// <summary>Receives until the other end closes.</summary>
    public static byte[] ReceiveAll(this Socket socket)
    {
        byte[] piece = new byte[64 * 1024];
        using var all = new MemoryStream();
        try
        {
            for (int count; (count = socket.Receive(piece)) > 0;)
                all.Write(piece, 0, count);
        }
        catch (SocketException)
        {
            // The other end has broken off: what has arrived is all there is.
        }

        return all.ToArray();
    }
}
