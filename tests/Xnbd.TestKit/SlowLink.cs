using System.Buffers;
using System.Collections.Concurrent;
using System.Diagnostics;
using System.Net;
using System.Net.Sockets;
using System.Runtime.InteropServices;

namespace Xnbd.TestKit;

/// <summary>
/// A relay that behaves like a long line to a server: it has a rate, a round-trip time, and for each direction one
/// queue that all connections share. What is sent stands in that queue, in the order of arrival, as it would in the
/// router before the slowest part of a line.
/// <para>
/// Each direction of each connection has a thread that receives and a thread that delivers. The shared state is the
/// time at which each direction is free again, under the lock of the direction.
/// </para>
/// </summary>
public sealed class SlowLink : IDisposable
{
    /// <summary>
    /// How much the queue holds, in bytes: a router with far too much memory, which is the worst case for a client.
    /// </summary>
    private const long QueueBytes = 4 << 20;

    /// <summary>A socket's receive buffer: what waits for the line stands in the queue, or at its sender.</summary>
    private const int BufferBytes = 256 * 1024;

    private readonly Socket _listener = new(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
    private readonly ConcurrentBag<Socket> _sockets = [];
    private readonly EndPoint _server;
    private readonly Direction _toClients = new(), _toServer = new();
    private readonly long _oneWay; // half a round trip, in ticks of the stopwatch
    private long _bytesPerSecond;
    private volatile bool _isClosed;

    /// <summary>Opens a line.</summary>
    /// <param name="server">Where it leads to.</param>
    /// <param name="bytesPerSecond">Its rate in each direction.</param>
    /// <param name="roundTrip">Its round-trip time, without any queue.</param>
    public SlowLink(EndPoint server, long bytesPerSecond, TimeSpan roundTrip)
    {
        _server = server;
        _bytesPerSecond = bytesPerSecond;
        _oneWay = (long)(roundTrip.TotalSeconds / 2 * Stopwatch.Frequency);
        _listener.ReceiveBufferSize = BufferBytes; // of each connection
        _listener.Bind(new IPEndPoint(IPAddress.Loopback, 0));
        _listener.Listen(64);
        Run(Accept);
    }

    /// <summary>The TCP port of localhost at which the line begins.</summary>
    public int Port => ((IPEndPoint)_listener.LocalEndPoint!).Port;

    /// <summary>The rate; it can be changed at any time.</summary>
    public long BytesPerSecond
    {
        get => Interlocked.Read(ref _bytesPerSecond);
        set => Interlocked.Exchange(ref _bytesPerSecond, value);
    }

    /// <summary>How many bytes the server has sent through the line.</summary>
    public long Bytes => Interlocked.Read(ref _toClients.Bytes);

    /// <summary>How many bytes clients have sent through the line.</summary>
    public long BytesToServer => Interlocked.Read(ref _toServer.Bytes);

    public void Dispose()
    {
        _isClosed = true;
        _listener.Dispose();
        foreach (Socket socket in _sockets)
            socket.Dispose();
    }

    private static void Run(Action work) => new Thread(() =>
    {
        try
        {
            work();
        }
        catch (Exception failure) when (failure is SocketException or ObjectDisposedException)
        {
            // One end has left, or the test has ended.
        }
    })
    { IsBackground = true }.Start();

    private void Accept()
    {
        while (true)
        {
            Socket client = _listener.Accept();
            bool isUnix = _server is UnixDomainSocketEndPoint;
            var server = new Socket(
                _server.AddressFamily, SocketType.Stream, isUnix ? ProtocolType.Unspecified : ProtocolType.Tcp);
            client.NoDelay = true;
            _sockets.Add(client);
            _sockets.Add(server);
            try
            {
                server.ReceiveBufferSize = BufferBytes;
                server.Connect(_server);
            }
            catch (SocketException)
            {
                client.Dispose(); // the server is away
                continue;
            }

            Relay(client, server, _toServer);
            Relay(server, client, _toClients);
        }
    }

    /// <summary>Relays one direction of a connection.</summary>
    private void Relay(Socket from, Socket to, Direction direction)
    {
        var underWay = new BlockingCollection<(byte[] Data, int Length, long DueAt)>();
        Run(() =>
        {
            try
            {
                while (true)
                {
                    byte[] data = ArrayPool<byte>.Shared.Rent(PieceBytes);
                    int count = from.Receive(data, 0, PieceBytes, SocketFlags.None);
                    if (count == 0)
                        return;
                    underWay.Add((data, count, Pass(direction, count) + _oneWay));
                }
            }
            finally
            {
                underWay.CompleteAdding();
            }
        });
        Run(() =>
        {
            try
            {
                foreach ((byte[] data, int length, long dueAt) in underWay.GetConsumingEnumerable())
                {
                    SleepUntil(dueAt);
                    for (int sent = 0; sent < length;)
                        sent += to.Send(data, sent, length - sent, SocketFlags.None);
                    ArrayPool<byte>.Shared.Return(data);
                }
            }
            finally
            {
                to.Dispose();
                from.Dispose();
            }
        });
    }

    /// <summary>A millisecond of the line, about.</summary>
    private int PieceBytes => (int)Math.Clamp(BytesPerSecond / 1000, 1024, 64 * 1024);

    /// <summary>Puts bytes into the queue, as soon as it has room for more.</summary>
    /// <returns>The time stamp at which they have passed the queue.</returns>
    private long Pass(Direction direction, int count)
    {
        Interlocked.Add(ref direction.Bytes, count);
        long passedAt, rate = BytesPerSecond;
        lock (direction)
        {
            direction.FreeAt = Math.Max(direction.FreeAt, Stopwatch.GetTimestamp())
                + (long)(count / (double)rate * Stopwatch.Frequency);
            passedAt = direction.FreeAt;
        }

        SleepUntil(passedAt - (long)(QueueBytes / (double)rate * Stopwatch.Frequency));
        return passedAt;
    }

    private void SleepUntil(long time)
    {
        for (long left; (left = time - Stopwatch.GetTimestamp()) > 0 && !_isClosed;)
            _ = Sleep((uint)Math.Clamp(left * 1_000_000 / Stopwatch.Frequency, 1, 100_000));
    }

    /// <summary>One direction of the line: when it is free again, as a time stamp, and what has passed.</summary>
    private sealed class Direction
    {
        public long FreeAt;
        public long Bytes;
    }

    [DllImport("libc", EntryPoint = "usleep")]
    private static extern int Sleep(uint microseconds);
}
