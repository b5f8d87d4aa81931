using System.Text;
using Microsoft.Win32.SafeHandles;

namespace Xnbd.Linux;

/// <summary>
/// Sends datagrams to a Unix socket, as the notifications of sd_notify(3) are. It keeps one descriptor, so that it
/// works when none is left. Any thread may send; nobody waits for the receiver.
/// </summary>
public sealed unsafe class NotifySocket : IDisposable
{
    private readonly SafeFileHandle _socket;
    private readonly byte[] _address;

    private NotifySocket(SafeFileHandle socket, byte[] address) => (_socket, _address) = (socket, address);

    /// <summary>Opens a socket. Nothing is sent yet, and the receiver need not be there.</summary>
    /// <param name="receiver">The receiver's full path, or the name of an abstract socket with "@" in front.</param>
    /// <param name="opened">The socket, if it was opened.</param>
    /// <returns>Why it was not: EINVAL for a receiver of another kind or a name that is too long.</returns>
    public static Errno Open(string receiver, out NotifySocket? opened)
    {
        opened = null;
        byte[] name = Encoding.UTF8.GetBytes(receiver);
        if (name.Length is < 2 or > UnixSocket.MaxPath || name[0] is not ((byte)'/' or (byte)'@'))
            return Errno.EINVAL;
        if (name[0] == (byte)'@')
            name[0] = 0;
        int descriptor = LibC.Socket(
            LibC.AddressFamilyUnix, LibC.SocketDatagram | LibC.SocketCloseOnExec, 0);
        if (descriptor < 0)
            return LibC.Outcome(descriptor);
        byte[] address = [.. BitConverter.GetBytes((ushort)LibC.AddressFamilyUnix), .. name];
        opened = new NotifySocket(new SafeFileHandle(descriptor, ownsHandle: true), address);
        return Errno.None;
    }

    /// <summary>Sends a datagram, if the receiver takes it at once.</summary>
    /// <returns>Why it was not sent.</returns>
    public Errno Send(string message)
    {
        const int dontWait = 0x40, noSignal = 0x4000;
        fixed (byte* text = Encoding.UTF8.GetBytes(message), address = _address)
        {
            nuint length = (nuint)Encoding.UTF8.GetByteCount(message);
            nint count = LibC.SendTo(_socket, text, length, dontWait | noSignal, address, (uint)_address.Length);
            return Errno.Of(LibC.Result(count));
        }
    }

    /// <summary>Closes the descriptor.</summary>
    public void Dispose() => _socket.Dispose();
}
