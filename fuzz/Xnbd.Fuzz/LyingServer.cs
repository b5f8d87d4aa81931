using System.Net.Sockets;
using Xnbd.Client;

namespace Xnbd.Fuzz;

/// <summary>
/// The other end of a connection that <c>Xnbd.Client</c> makes: it accepts one, sends the bytes that it was given, and
/// then the end of its stream.
/// </summary>
internal sealed class LyingServer
{
    private readonly string _path = Path.Combine(Path.GetTempPath(), $"xnbd-fuzz-{Guid.NewGuid():N}");
    private readonly Socket _listener = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);

    public LyingServer()
    {
        _listener.Bind(new UnixDomainSocketEndPoint(_path));
        _listener.Listen();
        AppDomain.CurrentDomain.ProcessExit += (_, _) => File.Delete(_path);
        Address = new RemoteAddress(null, 0, _path, "");
    }

    /// <summary>Where the client is to connect.</summary>
    public RemoteAddress Address { get; }

    /// <summary>Serves the next connection on a thread of the pool.</summary>
    /// <param name="first">Bytes that are sent at once.</param>
    /// <param name="awaited">So many bytes of the client are received,</param>
    /// <param name="then">before these are sent.</param>
    /// <returns>Ends when the client has closed the connection.</returns>
    public Task Serve(byte[] first, int awaited = 0, byte[]? then = null) => Task.Run(() =>
    {
        using Socket socket = _listener.Accept();
        if (!socket.TrySendAll(first) || !socket.TryReceive(awaited) || !socket.TrySendAll(then))
            return;
        socket.TryShutdownSend();
        socket.ReceiveAll();
    });
}
