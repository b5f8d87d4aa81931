using Microsoft.Win32.SafeHandles;

namespace Xnbd.Linux;

/// <summary>An <c>eventfd</c>: lets one thread end another's <see cref="LinuxSocket.Wait"/>.</summary>
public sealed unsafe class LinuxEvent : IDisposable
{
    /// <summary>Creates an event that is not signalled.</summary>
    /// <exception cref="IOException">No more descriptors are to be had.</exception>
    public LinuxEvent()
    {
        int descriptor = Create();
        Errno errno = LibC.Outcome(descriptor);
        if (errno != Errno.None)
            throw new IOException($"eventfd: {errno.Describe()}");
        Handle = new SafeFileHandle(descriptor, ownsHandle: true);
    }

    private LinuxEvent(int descriptor) => Handle = new SafeFileHandle(descriptor, ownsHandle: true);

    internal SafeFileHandle Handle { get; }

    /// <summary>Creates an event that is not signalled; null when no more descriptors are to be had.</summary>
    public static LinuxEvent? TryCreate()
    {
        int descriptor = Create();
        return descriptor < 0 ? null : new LinuxEvent(descriptor);
    }

    /// <summary>Signals the event; signalling it again before it was reset changes nothing.</summary>
    public void Signal()
    {
        ulong one = 1;
        _ = LibC.Write(Handle, (byte*)&one, sizeof(ulong));
    }

    /// <summary>Takes the signal back.</summary>
    public void Reset()
    {
        ulong value;
        _ = LibC.Read(Handle, (byte*)&value, sizeof(ulong));
    }

    /// <summary>Closes the descriptor.</summary>
    public void Dispose() => Handle.Dispose();

    private static int Create()
    {
        const int closeOnExec = 0x80000, nonBlocking = 0x800;
        return LibC.EventFd(0, closeOnExec | nonBlocking);
    }
}
