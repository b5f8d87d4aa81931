using System.Buffers;
using System.Collections.Concurrent;
using System.Diagnostics;
using System.Net;
using System.Net.Sockets;
using System.Runtime.InteropServices;

namespace Xnbd.TestKit;

/// <summary>
/// A relay that behaves like a long line to a server: it has a rate, a round-trip time, and one queue that all
/// connections share. What the server sends stands in that queue, in the order of arrival, as it would in the router
/// before the slowest part of a line. What clients send is only delayed.
/// <para>
/// Each direction of each connection has a thread that receives and a thread that delivers. The shared state is the
/// time at which the line is free again, under <c>_line</c>.
/// </para>
/// </summary>
public sealed class SlowLink : IDisposable
{
    /// <summary>
    /// How much the queue holds, in bytes: a router with far too much memory, which is the worst case for a client.
    /// </summary>
    private const long QueueBytes = 4 << 20;

    private readonly Socket _listener = new(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp);
    private readonly ConcurrentBag<Socket> _sockets = [];
    private readonly EndPoint _server;
    private readonly Lock _line = new();
    private readonly long _oneWay; // half a round trip, in ticks of the stopwatch
    private long _freeAt; // a time stamp
    private long _bytesPerSecond;
    private long _bytes;
    private volatile bool _isClosed;

    /// <summary>Opens a line.</summary>
    /// <param name="server">Where it leads to.</param>
    /// <param name="bytesPerSecond">Its rate from the server to the client.</param>
    /// <param name="roundTrip">Its round-trip time, without any queue.</param>
    public SlowLink(EndPoint server, long bytesPerSecond, TimeSpan roundTrip)
    {
        _server = server;
        _bytesPerSecond = bytesPerSecond;
        _oneWay = (long)(roundTrip.TotalSeconds / 2 * Stopwatch.Frequency);
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
    public long Bytes => Interlocked.Read(ref _bytes);

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
                server.ReceiveBufferSize = 256 * 1024; // what waits for the line stands in the queue, or at the server
                server.Connect(_server);
            }
            catch (SocketException)
            {
                client.Dispose(); // the server is away
                continue;
            }

            Relay(client, server, isSlow: false);
            Relay(server, client, isSlow: true);
        }
    }

    /// <summary>Relays one direction of a connection.</summary>
    private void Relay(Socket from, Socket to, bool isSlow)
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
                    long passedAt = isSlow ? Pass(count) : Stopwatch.GetTimestamp();
                    underWay.Add((data, count, passedAt + _oneWay));
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
    private long Pass(int count)
    {
        Interlocked.Add(ref _bytes, count);
        long passedAt, rate = BytesPerSecond;
        lock (_line)
        {
            _freeAt = Math.Max(_freeAt, Stopwatch.GetTimestamp())
                + (long)(count / (double)rate * Stopwatch.Frequency);
            passedAt = _freeAt;
        }

        SleepUntil(passedAt - (long)(QueueBytes / (double)rate * Stopwatch.Frequency));
        return passedAt;
    }

    private void SleepUntil(long time)
    {
        for (long left; (left = time - Stopwatch.GetTimestamp()) > 0 && !_isClosed;)
            _ = Sleep((uint)Math.Clamp(left * 1_000_000 / Stopwatch.Frequency, 1, 100_000));
    }

    [DllImport("libc", EntryPoint = "usleep")]
    private static extern int Sleep(uint microseconds);
}
