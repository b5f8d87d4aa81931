using Microsoft.Win32.SafeHandles;

namespace Xnbd.Linux;

/// <summary>An <c>eventfd</c>, by which one thread ends the <see cref="LinuxSocket.Wait"/> of another one.</summary>
public sealed unsafe class LinuxEvent : IDisposable
{
    /// <summary>Creates an event that is not signalled.</summary>
    /// <exception cref="IOException">There are no more descriptors.</exception>
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

    /// <summary>Creates an event that is not signalled, for a client's connection.</summary>
    /// <returns>Null when no descriptors are left outside the reserve (<see cref="LinuxDescriptors"/>).</returns>
    public static LinuxEvent? TryCreate()
    {
        int descriptor = Create();
        if (descriptor < 0)
            return null;
        var created = new LinuxEvent(descriptor);
        if (!LinuxDescriptors.IsOfReserve(created.Handle, LinuxDescriptors.Limit))
            return created;
        created.Dispose();
        return null;
    }

    /// <summary>Signals the event; signalling it again before it was reset changes nothing.</summary>
    public void Signal()
    {
        ulong one = 1;
        _ = LibC.Write(Handle, (byte*)&one, sizeof(ulong));
    }

    /// <summary>Resets the event, so that it is not signalled any more.</summary>
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
