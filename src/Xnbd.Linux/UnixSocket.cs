using System.Net.Sockets;
using System.Text;
using Microsoft.Win32.SafeHandles;

namespace Xnbd.Linux;

/// <summary>
/// A listening Unix socket and its file. The file is created and removed under a lock on its directory (<c>flock</c>),
/// which is held for a moment each time. So programs that use this class never replace or remove each other's sockets.
/// A socket without a listener was left by a killed process, and is replaced. At the end the file is removed only if it
/// still belongs to this socket.
/// </summary>
public sealed unsafe class UnixSocket : IDisposable
{
    /// <summary>The longest path of a Unix socket, in bytes: <c>sockaddr_un</c>, unix(7).</summary>
    public const int MaxPath = 107;

    private const string OtherFile = "there is another file of that name";

    /// <summary>
    /// How long to wait for a directory that another process has locked. Programs that start together need
    /// milliseconds; an unrelated program may hold its lock for long.
    /// </summary>
    private static readonly TimeSpan s_lockTime = TimeSpan.FromSeconds(5);

    /// <summary>The same at the end, when a file that is left does no harm.</summary>
    private static readonly TimeSpan s_endTime = TimeSpan.FromSeconds(1);

    /// <summary>
    /// How long an existing socket may take to accept a connection. A socket that takes longer has a listener.
    /// </summary>
    private static readonly TimeSpan s_probeTime = TimeSpan.FromSeconds(1);

    private readonly FileStatus _file;
    private int _isDisposed; // 0 or 1

    private UnixSocket(string path, Socket socket, in FileStatus file)
    {
        Path = path;
        Socket = socket;
        _file = file;
    }

    /// <summary>The full path of its file.</summary>
    public string Path { get; }

    /// <summary>The listening socket. Disposing of it alone leaves the file.</summary>
    public Socket Socket { get; }

    /// <summary>Makes an address of a path.</summary>
    /// <exception cref="ArgumentException">The path is empty, or too long.</exception>
    public static UnixDomainSocketEndPoint Address(string path)
    {
        CheckLength(path);
        return new UnixDomainSocketEndPoint(path);
    }

    /// <summary>Listens on a path. A socket on which nobody listens any more is replaced.</summary>
    /// <param name="path">The path.</param>
    /// <param name="isPrivate">Only the process's own user may connect; otherwise the umask says who may.</param>
    /// <exception cref="ArgumentException">The path is empty, or too long.</exception>
    /// <exception cref="IOException">The socket cannot be opened; the message says why.</exception>
    public static UnixSocket Listen(string path, bool isPrivate)
    {
        CheckLength(path);
        path = System.IO.Path.GetFullPath(path);
        CheckLength(path);
        string folder = System.IO.Path.GetDirectoryName(path) ?? "/";
        using SafeFileHandle directory = Lock(folder, s_lockTime);
        RemoveStale(path);
        int descriptor = LibC.Socket(LibC.AddressFamilyUnix, LibC.SocketStream | LibC.SocketCloseOnExec, 0);
        if (LibC.Outcome(descriptor) is var failed and not Errno.None)
            throw new IOException(failed.Describe());
        var handle = new SafeSocketHandle(descriptor, ownsHandle: true);
        bool isBound = false;
        try
        {
            Errno errno = Bind(handle, path);
            if (errno != Errno.None)
                throw new IOException(errno == Errno.EADDRINUSE ? OtherFile : errno.Describe());
            isBound = true;
            if (isPrivate)
                errno = LibC.Outcome(LibC.ChMod(path, 0b110_000_000)); // until it listens, nobody can connect
            if (errno == Errno.None)
                errno = LibC.Outcome(LibC.Listen(handle, LibC.MaxBacklog));
            FileStatus file = default;
            if (errno == Errno.None)
                errno = LinuxFile.Status(path, out file);
            if (errno != Errno.None)
                throw new IOException(errno.Describe());

            // The BCL's Bind is not used: a Socket that knows its path removes whatever file is there when it is
            // disposed of.
            return new UnixSocket(path, new Socket(handle), file);
        }
        catch
        {
            if (isBound)
                _ = LinuxFile.Unlink(path);
            handle.Dispose();
            throw;
        }
    }

    /// <summary>
    /// Stops listening, and removes the file, unless another one has taken its place. A file that cannot be removed
    /// stays, as after the death of a process.
    /// </summary>
    public void Dispose()
    {
        if (Interlocked.Exchange(ref _isDisposed, 1) != 0)
            return; // another file may have its number by now
        try
        {
            using SafeFileHandle directory = Lock(System.IO.Path.GetDirectoryName(Path) ?? "/", s_endTime);

            // While this socket is open, no other file can get its number.
            if (LinuxFile.Status(Path, out FileStatus present) == Errno.None && present.IsSameFile(_file))
                _ = LinuxFile.Unlink(Path);
        }
        catch (IOException)
        {
            // The directory is gone or locked. The next process that listens there replaces the file.
        }

        Socket.Dispose();
    }

    private static void CheckLength(string path)
    {
        if (Encoding.UTF8.GetByteCount(path) is 0 or > MaxPath)
            throw new ArgumentException($"the path of a Unix socket has 1 to {MaxPath} bytes");
    }

    /// <summary>Opens a directory and locks it.</summary>
    private static SafeFileHandle Lock(string folder, TimeSpan maxTime)
    {
        if (!Directory.Exists(folder))
        {
            throw new IOException(
                File.Exists(folder) ? $"'{folder}' is not a directory" : $"there is no directory '{folder}'");
        }

        Errno errno = LinuxFile.Open(folder, OpenMode.ReadOnly, out SafeFileHandle? directory);
        if (errno != Errno.None)
            throw new IOException($"the directory '{folder}' cannot be opened: {errno.Describe()}");
        long start = Environment.TickCount64;
        while ((errno = LinuxFile.TryLock(directory!)) == Errno.EAGAIN)
        {
            if (Environment.TickCount64 - start > maxTime.TotalMilliseconds)
            {
                directory!.Dispose();
                throw new IOException(
                    $"the directory '{folder}' has been locked by another process for "
                    + $"{maxTime.TotalSeconds:0} seconds");
            }

            Thread.Sleep(10);
        }

        return directory!; // if the file system has no such locks, go on without one
    }

    /// <summary>
    /// Removes a socket without a listener, which a killed process has left. The directory is locked.
    /// </summary>
    /// <exception cref="IOException">Something else is there.</exception>
    private static void RemoveStale(string path)
    {
        if (LinuxFile.Status(path, out FileStatus status) != Errno.None)
            return;
        if (status.Kind != FileKind.Socket)
            throw new IOException(OtherFile);
        using var probe = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        probe.SendTimeout = (int)s_probeTime.TotalMilliseconds;
        try
        {
            probe.Connect(new UnixDomainSocketEndPoint(path));
        }
        catch (SocketException failure) when (failure.SocketErrorCode == SocketError.ConnectionRefused)
        {
            Errno errno = LinuxFile.Unlink(path);
            if (errno != Errno.None)
                throw new IOException($"a socket that a killed server has left cannot be removed: {errno.Describe()}");
            return;
        }
        catch (SocketException failure) when (failure.SocketErrorCode == SocketError.AccessDenied)
        {
            throw new IOException("there is a socket of another user");
        }
        catch (SocketException)
        {
            // There is a listener with too many waiting clients, or a socket of another kind.
        }

        throw new IOException("another process listens there");
    }

    private static Errno Bind(SafeSocketHandle socket, string path)
    {
        const int familyBytes = sizeof(ushort);
        Span<byte> address = stackalloc byte[familyBytes + MaxPath + 1];
        address.Clear();
        BitConverter.TryWriteBytes(address, (ushort)LibC.AddressFamilyUnix);
        int length = familyBytes + Encoding.UTF8.GetBytes(path, address[familyBytes..]) + 1; // and a zero byte
        fixed (byte* start = address)
            return LibC.Outcome(LibC.Bind(socket, start, (uint)length));
    }
}
