using System.Runtime.InteropServices;
using Microsoft.Win32.SafeHandles;

namespace Xnbd.Linux;

/// <summary>What <see cref="LinuxSocket.Wait"/> found.</summary>
[Flags]
public enum Readiness
{
    /// <summary>Nothing: the time ran out.</summary>
    None = 0,

    /// <summary>Data or an end of stream can be received.</summary>
    Readable = 1,

    /// <summary>Something can be sent.</summary>
    Writable = 2,

    /// <summary>The wake-up event was signalled.</summary>
    Woken = 4,

    /// <summary>The connection is broken or closed on both sides.</summary>
    Broken = 8,
}

/// <summary>Whether the peer of a connection is still there.</summary>
public enum PeerPresence
{
    /// <summary>It may send.</summary>
    Open,

    /// <summary>
    /// It sends nothing more. It may still receive, or have closed its socket: over TCP this looks the same.
    /// </summary>
    HalfClosed,

    /// <summary>The connection is closed both ways, or was reset: nothing reaches the peer any more.</summary>
    Gone,
}

/// <summary>
/// Stream sockets by descriptor, with the flags that the BCL's <c>Socket</c> does not offer. Methods that return a
/// <c>long</c> return a count of bytes, or a negated <see cref="Errno"/> (see <see cref="ErrnoExtensions"/>).
/// Interrupted calls are repeated.
/// </summary>
public static unsafe class LinuxSocket
{
    private const int DontWait = 0x40;
    private const int NoSignal = 0x4000;
    private const int More = 0x8000;

    private const short PollIn = 1, PollOut = 4, PollError = 8, PollHangUp = 16, PollPeerHangUp = 0x2000;

    /// <summary>Receives what is there, without waiting.</summary>
    /// <returns>Bytes received; 0 when the peer has closed its side; -EAGAIN when nothing is there.</returns>
    public static long ReceiveNow(SafeHandle socket, Span<byte> buffer) => Receive(socket, buffer, DontWait);

    /// <summary>Receives what is there, waiting for the first byte, at most for the socket's receive timeout.</summary>
    /// <returns>Bytes received; 0 when the peer has closed its side; -EAGAIN when the time ran out.</returns>
    public static long Receive(SafeHandle socket, Span<byte> buffer) => Receive(socket, buffer, 0);

    /// <summary>Sends, waiting while the peer's window is full, at most for the socket's send timeout.</summary>
    /// <param name="socket">The socket.</param>
    /// <param name="buffer">The data.</param>
    /// <param name="more">More will follow at once: the kernel may hold back a partial packet.</param>
    /// <returns>Bytes sent, perhaps fewer than asked for; -EAGAIN when none were sent in time.</returns>
    public static long Send(SafeHandle socket, ReadOnlySpan<byte> buffer, bool more)
        => Send(socket, buffer, more ? NoSignal | More : NoSignal);

    /// <summary>Sends what the socket takes at once.</summary>
    /// <returns>Bytes sent, perhaps fewer than asked for; -EAGAIN when it takes none.</returns>
    public static long SendNow(SafeHandle socket, ReadOnlySpan<byte> buffer)
        => Send(socket, buffer, NoSignal | DontWait);

    /// <summary>Whether an error of <see cref="SendFile"/> belongs to the socket, not to the file.</summary>
    public static bool IsOfSocket(Errno errno)
        => errno is Errno.EPIPE or Errno.ECONNRESET or Errno.ETIMEDOUT or Errno.ENOTCONN or Errno.EAGAIN;

    /// <summary>Sends a part of a file without copying it through this process.</summary>
    /// <returns>
    /// Bytes sent, perhaps fewer than asked for; 0 at the end of the file; -EAGAIN when none were sent in time.
    /// </returns>
    public static long SendFile(SafeHandle socket, SafeFileHandle file, long offset, long length)
    {
        long count;
        do
        {
            count = LibC.Result(LibC.SendFile(socket, file, &offset, (nuint)length));
        }
        while (Errno.Of(count) == Errno.EINTR);
        return count;
    }

    /// <summary>Waits until the socket is ready, or an event is signalled.</summary>
    /// <param name="socket">The socket.</param>
    /// <param name="forReading">Wait for data.</param>
    /// <param name="forWriting">Wait for room to send.</param>
    /// <param name="timeoutMilliseconds">Longest time to wait; negative for no limit.</param>
    /// <param name="first">An event to wait for as well; may be null.</param>
    /// <param name="second">Another one; may be null.</param>
    public static Readiness Wait(
        SafeHandle socket,
        bool forReading,
        bool forWriting,
        int timeoutMilliseconds,
        LinuxEvent? first = null,
        LinuxEvent? second = null)
    {
        var entries = stackalloc LibC.PollEntry[3];
        bool addedSocket = false, addedFirst = false, addedSecond = false;
        try
        {
            nuint count = 0;
            Add(socket, (short)((forReading ? PollIn : 0) | (forWriting ? PollOut : 0)), ref addedSocket);
            if (first is not null)
                Add(first.Handle, PollIn, ref addedFirst);
            if (second is not null)
                Add(second.Handle, PollIn, ref addedSecond);

            int answer = LibC.Poll(entries, count, timeoutMilliseconds);
            if (answer <= 0)
                return Readiness.None; // also when interrupted: callers wait again

            Readiness ready = Readiness.None;
            if ((entries[0].Returned & PollIn) != 0)
                ready |= Readiness.Readable;
            if ((entries[0].Returned & PollOut) != 0)
                ready |= Readiness.Writable;
            if ((entries[0].Returned & (PollError | PollHangUp)) != 0)
                ready |= Readiness.Broken;
            for (nuint i = 1; i < count; i++)
                ready |= entries[i].Returned != 0 ? Readiness.Woken : 0;
            return ready;

            void Add(SafeHandle handle, short events, ref bool added)
            {
                handle.DangerousAddRef(ref added);
                int descriptor = (int)handle.DangerousGetHandle();
                entries[count++] = new LibC.PollEntry { Descriptor = descriptor, Events = events };
            }
        }
        finally
        {
            if (addedSocket)
                socket.DangerousRelease();
            if (addedFirst)
                first!.Handle.DangerousRelease();
            if (addedSecond)
                second!.Handle.DangerousRelease();
        }
    }

    /// <summary>Looks whether the peer is still there; waits for nothing.</summary>
    public static PeerPresence LookForPeer(SafeHandle socket)
    {
        bool added = false;
        try
        {
            socket.DangerousAddRef(ref added);
            int descriptor = (int)socket.DangerousGetHandle();
            var entry = new LibC.PollEntry { Descriptor = descriptor, Events = PollPeerHangUp };
            if (LibC.Poll(&entry, 1, 0) <= 0)
                return PeerPresence.Open; // also when interrupted: callers look again
            return (entry.Returned & (PollError | PollHangUp)) != 0 ? PeerPresence.Gone : PeerPresence.HalfClosed;
        }
        finally
        {
            if (added)
                socket.DangerousRelease();
        }
    }

    /// <summary>Turns a descriptor to blocking mode.</summary>
    public static Errno SetBlocking(SafeHandle descriptor)
    {
        const int getFlags = 3, setFlags = 4, nonBlocking = 0x800;
        int flags = LibC.FCntl(descriptor, getFlags, 0);
        return flags < 0 ? LibC.Outcome(flags) : LibC.Outcome(LibC.FCntl(descriptor, setFlags, flags & ~nonBlocking));
    }

    private static long Receive(SafeHandle socket, Span<byte> buffer, int flags)
    {
        fixed (byte* start = buffer)
        {
            long count;
            do
            {
                count = LibC.Result(LibC.Recv(socket, start, (nuint)buffer.Length, flags));
            }
            while (Errno.Of(count) == Errno.EINTR);
            return count;
        }
    }

    private static long Send(SafeHandle socket, ReadOnlySpan<byte> buffer, int flags)
    {
        fixed (byte* start = buffer)
        {
            long count;
            do
            {
                count = LibC.Result(LibC.Send(socket, start, (nuint)buffer.Length, flags));
            }
            while (Errno.Of(count) == Errno.EINTR);
            return count;
        }
    }
}
