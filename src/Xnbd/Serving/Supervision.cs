using System.Diagnostics;
using System.Globalization;
using System.Net.Sockets;
using Xnbd.Linux;

namespace Xnbd.Programs.Serving;

/// <summary>
/// What the service manager that has started this process, such as systemd, has handed over, and what it wants to be
/// told: sd_listen_fds(3), sd_notify(3), sd_watchdog_enabled(3).
/// <para>
/// It is read once, and removed from the environment: programs that this process starts are other services. Any thread
/// may tell something. What cannot be sent is lost: the service does not depend on its manager.
/// </para>
/// </summary>
internal sealed class Supervision
{
    private const int FirstDescriptor = 3; // SD_LISTEN_FDS_START

    private readonly NotifySocket? _notify;

    private Supervision(int descriptorCount, NotifySocket? notify, TimeSpan? watchdog)
        => (DescriptorCount, _notify, Watchdog) = (descriptorCount, notify, watchdog);

    /// <summary>The number of sockets that were handed over.</summary>
    public int DescriptorCount { get; }

    /// <summary>It wants to be told what happens.</summary>
    public bool IsNotified => _notify is not null;

    /// <summary>It wants a sign of life at least this often; null if it wants none.</summary>
    public TimeSpan? Watchdog { get; }

    /// <summary>Reads the environment. It can be called only once.</summary>
    /// <exception cref="FailureException">What is there makes no sense.</exception>
    public static Supervision Take()
    {
        string? process = Take("LISTEN_PID"), count = Take("LISTEN_FDS");
        _ = Take("LISTEN_FDNAMES");
        string? receiver = Take("NOTIFY_SOCKET"), time = Take("WATCHDOG_USEC"), watched = Take("WATCHDOG_PID");
        int descriptors = IsThis(process) && count is not null ? ReadCount(count) : 0;
        for (int i = 0; i < descriptors; i++)
            _ = LinuxDescriptors.CloseOnExec(FirstDescriptor + i);
        NotifySocket? notify = null;
        if (receiver is { Length: > 0 } && NotifySocket.Open(receiver, out notify) is var errno and not Errno.None)
            throw new FailureException($"NOTIFY_SOCKET={receiver} cannot be used: {errno.Describe()}");
        bool isWatched = notify is not null && time is not null && (watched is null || IsThis(watched));
        return new Supervision(descriptors, notify, isWatched ? ReadTime(time!) : null);
    }

    /// <summary>Checks that the server can be supervised with these options.</summary>
    /// <exception cref="UsageException">It cannot.</exception>
    public void Validate(ListenOptions options)
    {
        if (options.Daemonize && DescriptorCount > 0)
        {
            throw new UsageException(
                "the service manager has handed over sockets (LISTEN_FDS), "
                + "which a server in the background cannot use: leave --daemonize out");
        }

        if (options.Daemonize && IsNotified)
        {
            StandardError.WriteLine(
                "with --daemonize the service manager is told nothing (NOTIFY_SOCKET): "
                + "leave it out in a unit of Type=notify");
        }

        bool isOneConnection = options.Inetd || options.ConnectedDescriptor is not null;
        if (DescriptorCount > 0 && !isOneConnection
            && (options.Port is not null || options.Address is not null || options.UnixPath is not null))
        {
            throw new UsageException(
                "the service manager has handed over the sockets (LISTEN_FDS): "
                + "--lport, --laddr and --unix make no sense here");
        }
    }

    /// <summary>Makes sockets of what was handed over.</summary>
    /// <exception cref="FailureException">One is not a listening TCP or Unix socket.</exception>
    public IReadOnlyList<Socket> TakeListeners()
        => [.. Enumerable.Range(FirstDescriptor, DescriptorCount).Select(TakeListener)];

    /// <summary>Tells that the server serves.</summary>
    public void Ready() => Tell("READY=1");

    /// <summary>Tells that the server begins to read its settings again; <see cref="Ready"/> ends that.</summary>
    public void Reloading()
    {
        long microseconds = Stopwatch.GetTimestamp() / (Stopwatch.Frequency / 1_000_000);
        Tell(string.Create(CultureInfo.InvariantCulture, $"RELOADING=1\nMONOTONIC_USEC={microseconds}"));
    }

    /// <summary>Tells that the server ends.</summary>
    public void Ending() => Tell("STOPPING=1");

    /// <summary>Tells what the server does at present, in one line for people.</summary>
    public void Status(string line) => Tell("STATUS=" + line);

    /// <summary>Gives a sign of life.</summary>
    public void IsAlive() => Tell("WATCHDOG=1");

    private void Tell(string message) => _ = _notify?.Send(message);

    private static string? Take(string variable)
    {
        string? value = Environment.GetEnvironmentVariable(variable);
        Environment.SetEnvironmentVariable(variable, null);
        return value;
    }

    private static bool IsThis(string? process)
        => process == Environment.ProcessId.ToString(CultureInfo.InvariantCulture);

    private static int ReadCount(string text)
        => int.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out int count)
            && count < LinuxDescriptors.Limit
            ? count
            : throw new FailureException($"LISTEN_FDS={text} is not a number of descriptors");

    private static TimeSpan ReadTime(string text)
        => long.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out long microseconds)
            && microseconds is > 0 and < long.MaxValue / TimeSpan.TicksPerMicrosecond
            ? TimeSpan.FromMicroseconds(microseconds)
            : throw new FailureException($"WATCHDOG_USEC={text} is not a time in microseconds");

    private static Socket TakeListener(int descriptor)
    {
        const int ofSocket = 1, type = 3, isListening = 30; // SOL_SOCKET, SO_TYPE, SO_ACCEPTCONN
        string name = $"descriptor {descriptor}, which the service manager has handed over,";
        var handle = new SafeSocketHandle(descriptor, ownsHandle: true);
        if (LinuxFile.Status(handle, out FileStatus status) != Errno.None)
            throw new FailureException($"{name} is not open");
        if (status.Kind != FileKind.Socket)
            throw new FailureException($"{name} is not a socket");
        try
        {
            var socket = new Socket(handle);
            if (socket.AddressFamily is not (AddressFamily.InterNetwork or AddressFamily.InterNetworkV6
                or AddressFamily.Unix) || Read(socket, type) != (int)SocketType.Stream)
            {
                throw new FailureException($"{name} is not a TCP socket or a Unix stream socket");
            }

            if (Read(socket, isListening) == 0)
                throw new FailureException($"{name} does not listen: a unit with Accept=yes needs --inetd");
            return socket;
        }
        catch (SocketException failure)
        {
            throw new FailureException($"{name} cannot be used: {failure.Message}");
        }

        static int Read(Socket socket, int option)
        {
            Span<byte> value = stackalloc byte[sizeof(int)];
            _ = socket.GetRawSocketOption(ofSocket, option, value);
            return BitConverter.ToInt32(value);
        }
    }
}
