using System.Net.Sockets;
using System.Runtime.InteropServices;

namespace Xnbd.Bench.Clients;

/// <summary>Waits for many sockets at once: epoll, level-triggered. Used by one thread.</summary>
internal sealed class ReadySockets : IDisposable
{
    private const int Add = 1; // EPOLL_CTL_ADD
    private const uint Readable = 1; // EPOLLIN
    private const int MaxEvents = 256;

    // struct epoll_event is packed on x86-64 alone; it is a 32 bit mask and 64 bits for the caller
    private static readonly int s_indexAt = RuntimeInformation.ProcessArchitecture == Architecture.X64 ? 4 : 8;
    private static readonly int s_eventBytes = s_indexAt + 8;

    private readonly int _epoll;
    private readonly byte[] _events = new byte[MaxEvents * s_eventBytes];

    public ReadySockets(IEnumerable<Socket> sockets)
    {
        _epoll = Create(0);
        int index = 0;
        foreach (Socket socket in sockets)
        {
            byte[] wanted = new byte[s_eventBytes];
            MemoryMarshal.Write(wanted, Readable);
            MemoryMarshal.Write(wanted.AsSpan(s_indexAt), (long)index++);
            if (Control(_epoll, Add, (int)socket.Handle, wanted) != 0)
                throw new IOException("epoll refuses a socket");
        }
    }

    /// <summary>Waits until there is something to receive.</summary>
    /// <param name="indexes">Receives the sockets' places in the order in which they were given.</param>
    /// <param name="milliseconds">How long to wait at most.</param>
    public void Wait(List<int> indexes, int milliseconds)
    {
        indexes.Clear();
        int count = Wait(_epoll, _events, MaxEvents, milliseconds);
        for (int i = 0; i < count; i++)
            indexes.Add((int)MemoryMarshal.Read<long>(_events.AsSpan((i * s_eventBytes) + s_indexAt)));
    }

    public void Dispose() => _ = Close(_epoll);

    [DllImport("libc", EntryPoint = "epoll_create1")]
    private static extern int Create(int flags);

    [DllImport("libc", EntryPoint = "epoll_ctl")]
    private static extern int Control(int epoll, int operation, int descriptor, byte[] wanted);

    [DllImport("libc", EntryPoint = "epoll_wait")]
    private static extern int Wait(int epoll, [Out] byte[] events, int maxEvents, int milliseconds);

    [DllImport("libc", EntryPoint = "close")]
    private static extern int Close(int descriptor);
}
