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

    /// <summary>
    /// Creates an event that is not signalled; null when no descriptor is to be had but one of the reserve
    /// (<see cref="LinuxDescriptors"/>).
    /// </summary>
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
