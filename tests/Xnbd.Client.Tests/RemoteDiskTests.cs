using System.Buffers.Binary;
using System.Collections.Concurrent;
using Xnbd.Protocol;
using Xnbd.Storage;
using Xnbd.Storage.Threads;
using Xnbd.TestKit;
using Peer = Xnbd.TestKit.FakeServer.Peer;

namespace Xnbd.Client.Tests;

/// <summary>A remote disk whose server lies, stalls, breaks off, or answers in an order of its own.</summary>
public sealed class RemoteDiskTests : IDisposable
{
    private const int Size = 1 << 20;

    private readonly TempFolder _folder = new();
    private readonly byte[] _image = new byte[Size];
    private readonly ConcurrentQueue<string> _lines = new();
    private readonly TestLog _log;

    public RemoteDiskTests()
    {
        new Random(1).NextBytes(_image);
        _log = new TestLog((_, _, line) => _lines.Enqueue(line));
    }

    private string LogText => string.Join('\n', _lines);

    public void Dispose() => _folder.Dispose();

    private string SocketPath => _folder.File("s");

    private RemoteDisk Connect(int connections = 1, double patienceSeconds = 30, TimeProvider? time = null)
        => RemoteDisk.Connect(Options(connections, patienceSeconds, time));

    private RemoteOptions Options(int connections = 1, double patienceSeconds = 30, TimeProvider? time = null) => new()
    {
        Servers = [RemoteAddress.Parse("unix:" + SocketPath, "-", "")],
        MaxConnections = connections,
        Log = _log,
        Patience = patienceSeconds == double.MaxValue ? RemoteOptions.Forever : TimeSpan.FromSeconds(patienceSeconds),
        Time = time ?? TimeProvider.System,
    };

    private static async Task<byte[]> Read(RemoteDisk disk, long offset, int length)
    {
        byte[] buffer = new byte[length];
        try
        {
            await disk.ReadAsync(offset, buffer).AsTask().WaitAsync(TimeSpan.FromSeconds(20));
            return buffer;
        }
        finally
        {
            await Task.Yield(); // a test may block; the thread that received the reply must not
        }
    }

    private static readonly Dictionary<string, Action<Peer, NbdRequest>> s_lies = new()
    {
        ["another magic"] = (peer, request) => peer.Send(new byte[NbdSize.SimpleReply]),
        ["an unknown cookie"] = (peer, request)
            => peer.SendData(NbdChunkFlags.Done, request.Cookie + 1, request.Offset, (int)request.Length),
        ["an old cookie"] = (peer, request)
            => peer.SendData(NbdChunkFlags.Done, request.Cookie - (1UL << 32), request.Offset, (int)request.Length),
        ["data before the request"] = (peer, request)
            => peer.SendData(NbdChunkFlags.Done, request.Cookie, request.Offset - 512, 1024),
        ["data behind the request"] = (peer, request)
            => peer.SendData(NbdChunkFlags.Done, request.Cookie, request.Offset, (int)request.Length + 1),
        ["data at an offset that overflows"] = (peer, request)
            => peer.SendData(NbdChunkFlags.Done, request.Cookie, ulong.MaxValue - 3, 8),
        ["data twice"] = (peer, request) =>
        {
            peer.SendData(NbdChunkFlags.None, request.Cookie, request.Offset, 1024);
            peer.SendData(NbdChunkFlags.None, request.Cookie, request.Offset + 512, 1024);
        },
        ["too little data"] = (peer, request)
            => peer.SendData(NbdChunkFlags.Done, request.Cookie, request.Offset, (int)request.Length - 1),
        ["no data at all"] = (peer, request)
            => peer.SendChunk(NbdChunkFlags.Done, NbdChunkType.None, request.Cookie, []),
        ["an empty chunk of data"] = (peer, request)
            => peer.SendData(NbdChunkFlags.Done, request.Cookie, request.Offset, 0),
        ["nothing, without an end"] = (peer, request)
            => peer.SendChunk(NbdChunkFlags.None, NbdChunkType.None, request.Cookie, []),
        ["a hole of no length"] = (peer, request) => SendHole(peer, request, request.Offset, 0),
        ["a hole behind the request"] = (peer, request) => SendHole(peer, request, request.Offset, request.Length + 1),
        ["a short hole chunk"] = (peer, request)
            => peer.SendChunk(NbdChunkFlags.Done, NbdChunkType.OffsetHole, request.Cookie, new byte[11]),
        ["an unknown chunk"] = (peer, request)
            => peer.SendChunk(NbdChunkFlags.Done, (NbdChunkType)99, request.Cookie, new byte[4]),
        ["the status of blocks"] = (peer, request)
            => peer.SendChunk(NbdChunkFlags.Done, NbdChunkType.BlockStatus, request.Cookie, new byte[12]),
        ["an error too short"] = (peer, request)
            => peer.SendChunk(NbdChunkFlags.Done, NbdChunkType.Error, request.Cookie, new byte[3]),
        ["an error too long"] = (peer, request)
            => peer.SendChunk(NbdChunkFlags.Done, NbdChunkType.Error, request.Cookie, new byte[10_000]),
        ["errors without an end"] = (peer, request) =>
        {
            byte[] error = [0, 0, 0, (byte)NbdError.Io, 0, 0];
            for (int i = 0; i < 100; i++)
                peer.SendChunk(NbdChunkFlags.None, NbdChunkType.Error, request.Cookie, error);
        },
        ["a simple reply"] = (peer, request) => SendSimple(peer, request),
    };

    public static TheoryData<string> Lies => [.. s_lies.Keys];

    private static void SendHole(Peer peer, NbdRequest request, ulong offset, uint length)
    {
        byte[] payload = new byte[NbdSize.OffsetHolePayload];
        BinaryPrimitives.WriteUInt64BigEndian(payload, offset);
        BinaryPrimitives.WriteUInt32BigEndian(payload.AsSpan(8), length);
        peer.SendChunk(NbdChunkFlags.Done, NbdChunkType.OffsetHole, request.Cookie, payload);
    }

    private static void SendSimple(Peer peer, NbdRequest request)
    {
        byte[] reply = new byte[NbdSize.SimpleReply + request.Length];
        NbdReply.WriteSimple(reply, NbdError.None, request.Cookie);
        peer.Send(reply);
    }

    /// <summary>The first connection lies. The read goes to the next one, and the log names the culprit.</summary>
    [Theory]
    [MemberData(nameof(Lies))]
    public async Task A_server_that_lies_is_named_and_its_data_are_not_used(string lie)
    {
        using FakeServer server = new FakeServer(SocketPath, _image)
        {
            Answer = (peer, number, request) =>
            {
                if (number > 0)
                    return false;
                s_lies[lie](peer, request);
                return true;
            },
        }.Start();
        using RemoteDisk disk = Connect();
        Assert.Equal(_image[8192..12288], await Read(disk, 8192, 4096));
        Assert.Equal(2, server.Count);
        Assert.Contains("this is a fault of that server", LogText, StringComparison.Ordinal);
        Assert.Contains(SocketPath, LogText, StringComparison.Ordinal);
    }

    private static async Task<Extent[]> Extents(RemoteDisk disk, long offset, long length, int capacity = 100)
    {
        var extents = new ExtentList(capacity);
        await disk.GetExtentsAsync(offset, length, extents).AsTask().WaitAsync(TimeSpan.FromSeconds(20));
        return [.. extents.Extents];
    }

    private static Extent Data(long length) => new(length, IsHole: false, 1);

    private static Extent Zeroes(long length) => new(length, IsHole: true, 1);

    [Fact]
    public async Task Zeroes_are_what_the_server_says()
    {
        _image.AsSpan(8192, 40960).Clear();
        using FakeServer server = new FakeServer(SocketPath, _image)
        {
            AllocationId = 7,
            Answer = (peer, _, request) =>
            {
                if (request.Command != NbdCommand.BlockStatus || request.Offset < 512 * 1024)
                    return false;
                if (request.Offset == 512 * 1024)
                    // Zeroes with space, no zeroes without it, and more than was asked for.
                    peer.SendStatus(request.Cookie, 7, (4096, 2), (4096, 1), (uint.MaxValue, 3));
                else
                    peer.SendChunk(NbdChunkFlags.Done, NbdChunkType.Error, request.Cookie, [0, 0, 0, 5, 0, 0]);
                return true;
            },
        }.Start();
        using RemoteDisk disk = Connect();
        Assert.Equal([Data(8192), Zeroes(40960), Data(4096)], await Extents(disk, 0, 53248));
        Assert.Equal([Data(8192), Zeroes(40960)], await Extents(disk, 0, 53248, capacity: 2));
        Assert.Equal([Zeroes(4096), Data(4096), Zeroes(92160)], await Extents(disk, 512 * 1024, 100_352));
        Assert.Equal([Data(4096)], await Extents(disk, 600 * 1024, 4096)); // it does not know
        Assert.Equal(_image[..4096], await Read(disk, 0, 4096));
        Assert.Equal(1, server.Count);
    }

    [Fact]
    public async Task Without_an_answer_all_is_data()
    {
        using FakeServer server = new FakeServer(SocketPath, new byte[Size])
        {
            Answer = (_, _, request)
                => request.Command == NbdCommand.BlockStatus ? throw new EndOfStreamException() : false,
        }.Start();
        using RemoteDisk disk = Connect();
        Assert.Equal([Data(Size)], await Extents(disk, 0, Size));
        Assert.Equal(new byte[4096], await Read(disk, 0, 4096));
        Assert.Equal(1, server.Count);
    }

    private static readonly Dictionary<string, Action<Peer, NbdRequest>> s_statusLies = new()
    {
        ["another context"] = (peer, request) => peer.SendStatus(request.Cookie, 8, (request.Length, 3)),
        ["an extent of no length"] = (peer, request) => peer.SendStatus(request.Cookie, 7, (0, 3), (request.Length, 3)),
        ["no extents"] = (peer, request) => peer.SendStatus(request.Cookie, 7),
        ["half an extent"] = (peer, request)
            => peer.SendChunk(NbdChunkFlags.Done, NbdChunkType.BlockStatus, request.Cookie, [0, 0, 0, 7, 0, 0, 16, 0]),
        ["a hundred million extents"] = (peer, request) => peer.Send(Header(request, 800_000_004)),
        ["no answer"] = (peer, request) => peer.SendChunk(NbdChunkFlags.Done, NbdChunkType.None, request.Cookie, []),
        ["two answers"] = (peer, request) =>
        {
            byte[] status = [0, 0, 0, 7, 0, 0, 16, 0, 0, 0, 0, 3];
            peer.SendChunk(NbdChunkFlags.None, NbdChunkType.BlockStatus, request.Cookie, status);
            peer.SendChunk(NbdChunkFlags.Done, NbdChunkType.BlockStatus, request.Cookie, status);
        },
        ["data"] = (peer, request) => peer.SendData(NbdChunkFlags.Done, request.Cookie, request.Offset, 4096),
        ["a hole"] = (peer, request) => SendHole(peer, request, request.Offset, 4096),
        ["success, simply"] = (peer, request) => SendSimple(peer, request with { Length = 0 }),
    };

    public static TheoryData<string> StatusLies => [.. s_statusLies.Keys];

    private static byte[] Header(NbdRequest request, int length)
    {
        byte[] header = new byte[NbdSize.StructuredReply];
        NbdReply.WriteChunkHeader(header, NbdChunkFlags.Done, NbdChunkType.BlockStatus, request.Cookie, length);
        return header;
    }

    /// <summary>The server is named, the question is not repeated, and reads go to the next connection.</summary>
    [Theory]
    [MemberData(nameof(StatusLies))]
    public async Task A_server_that_lies_of_zeroes_is_named_and_all_is_data(string lie)
    {
        using FakeServer server = new FakeServer(SocketPath, _image)
        {
            AllocationId = 7,
            Answer = (peer, _, request) =>
            {
                if (request.Command != NbdCommand.BlockStatus)
                    return false;
                s_statusLies[lie](peer, request);
                return true;
            },
        }.Start();
        using RemoteDisk disk = Connect();
        Assert.Equal([Data(65536)], await Extents(disk, 0, 65536));
        Assert.Contains("this is a fault of that server", LogText, StringComparison.Ordinal);
        Assert.Equal(_image[8192..12288], await Read(disk, 8192, 4096));
        Assert.Equal(2, server.Count);
    }

    /// <summary>The log says why, once, and the server is not asked all the time.</summary>
    [Fact]
    public async Task A_server_that_comes_back_with_another_length_is_named_in_the_log()
    {
        FakeServer first = new FakeServer(SocketPath, _image).Start();
        using RemoteDisk disk = Connect(patienceSeconds: 2);
        Assert.Equal(_image[..4096], await Read(disk, 0, 4096));
        first.Dispose();
        File.Delete(SocketPath);
        using FakeServer other = new FakeServer(SocketPath, _image[..(Size / 2)]).Start();
        var failure = await Assert.ThrowsAsync<DiskException>(() => Read(disk, 4096, 4096));
        Assert.Contains(
            $"the export has {Size / 2} bytes, not {Size}: it is another disk",
            failure.Message,
            StringComparison.Ordinal);
        Assert.Contains(failure.Message, LogText, StringComparison.Ordinal);
        Assert.Equal(DiskError.Unreachable, failure.Error);
        Assert.InRange(other.Count, 1, 10);
    }

    [Fact]
    public async Task A_read_that_is_passed_over_by_others_fails()
    {
        using FakeServer server = new FakeServer(SocketPath, _image)
        {
            Answer = (_, _, request) => request.Offset == 4096,
        }.Start();
        using RemoteDisk disk = Connect(patienceSeconds: 0.5);
        Task<byte[]> lost = Read(disk, 4096, 512);
        while (!lost.IsCompleted)
        {
            Assert.Equal(_image[..512], await Read(disk, 0, 512));
            await Task.Delay(20, TestContext.Current.CancellationToken);
        }

        Assert.Contains(
            "and others since",
            (await Assert.ThrowsAsync<DiskException>(() => lost)).Message,
            StringComparison.Ordinal);
    }

    /// <summary>
    /// One of two connections has become silent: what was asked for on it lately goes to the other one.
    /// </summary>
    [Fact]
    public async Task Recent_reads_of_a_silent_connection_go_to_another_one()
    {
        int silent = -1, unanswered = 0;
        using var submitted = new ManualResetEventSlim();
        using FakeServer server = new FakeServer(SocketPath, _image)
        {
            Flags = NbdTransmissionFlags.HasFlags | NbdTransmissionFlags.CanMultiConn,
            Answer = (_, number, request) =>
            {
                if (request.Offset == 8192)
                    Interlocked.CompareExchange(ref silent, number, -1);
                if (number == silent)
                {
                    Interlocked.Increment(ref unanswered);
                    return true;
                }

                submitted.Wait(TimeSpan.FromSeconds(20)); // or all reads would go to this connection, one by one
                return false;
            },
        }.Start();
        var clock = new TestClock();
        using RemoteDisk disk = Connect(connections: 2, time: clock);
        Wait.Until(() => disk.ConnectionCount == 2, "both are made");
        Task<byte[]> old = Read(disk, 8192, 512);
        Wait.Until(() => Volatile.Read(ref silent) >= 0, "it was received");
        clock.Turn(TimeSpan.FromSeconds(25));
        Task<byte[]>[] young = [.. Enumerable.Range(0, 50).Select(_ => Read(disk, 0, 512))];
        submitted.Set();
        Wait.Until(() => Volatile.Read(ref unanswered) > 1, "young reads wait there");
        clock.Turn(TimeSpan.FromSeconds(10));
        foreach (Task<byte[]> read in young)
            Assert.Equal(_image[..512], await read);
        await Assert.ThrowsAsync<DiskException>(() => old);
    }

    [Fact]
    public async Task A_handshake_that_hangs_keeps_no_read_waiting()
    {
        using FakeServer server = new FakeServer(SocketPath, _image)
        {
            Flags = NbdTransmissionFlags.HasFlags | NbdTransmissionFlags.CanMultiConn,
            Handshake = (peer, number) => number > 0 && peer.Receive(1000).Length > 0, // which never come
            Answer = (_, _, _) => true,
        }.Start();
        using RemoteDisk disk = Connect(connections: 2, patienceSeconds: 1);
        long start = Environment.TickCount64;
        await Assert.ThrowsAsync<DiskException>(() => Read(disk, 0, 512));
        Assert.InRange(Environment.TickCount64 - start, 900, 5000);
    }

    [Theory]
    [InlineData(1u, 65536u)]
    [InlineData(4096u, 65536u)]
    public async Task Reads_under_way_keep_to_the_limits_of_the_server_that_they_go_to(uint block, uint most)
    {
        using var asked = new CountdownEvent(2);
        using FakeServer old = new FakeServer(SocketPath, _image)
        {
            Answer = (_, _, _) => asked.Signal() || true,
        }.Start();
        var seen = new List<NbdRequest>();
        string path = _folder.File("t");
        using FakeServer fresh = Demanding(path, block, most, seen);
        using RemoteDisk disk = Connect();
        Task<byte[]> large = Read(disk, 512, 512 * 1024), small = Read(disk, 700 * 1024, 512);
        Assert.True(asked.Wait(TimeSpan.FromSeconds(20), TestContext.Current.CancellationToken));
        disk.SwitchTo(RemoteAddress.Parse("unix:" + path, "-", ""));
        Assert.Equal(_image[512..(512 + (512 * 1024))], await large);
        Assert.Equal(_image[(700 * 1024)..((700 * 1024) + 512)], await small);
        Assert.All(
            seen,
            request
                => Assert.True(request.Length <= most && request.Length % block == 0 && request.Offset % block == 0));
    }

    [Fact]
    public async Task Structured_replies_that_were_not_negotiated_are_a_lie_too()
    {
        using FakeServer server = new FakeServer(SocketPath, _image)
        {
            Structured = false,
            Answer = (peer, number, request) =>
            {
                if (number > 0)
                    return false;
                peer.SendData(NbdChunkFlags.Done, request.Cookie, request.Offset, (int)request.Length);
                return true;
            },
        }.Start();
        using RemoteDisk disk = Connect();
        Assert.Equal(_image[8192..12288], await Read(disk, 8192, 4096));
        Assert.Contains("this is a fault of that server", LogText, StringComparison.Ordinal);
    }

    /// <summary>A read is handed to a connection, and the connection breaks before the read is sent.</summary>
    [Fact]
    public async Task A_read_whose_connection_breaks_before_it_is_sent_goes_to_the_next_one()
    {
        Peer? first = null;
        using FakeServer server = new FakeServer(SocketPath, _image)
        {
            Handshake = (peer, _) =>
            {
                Interlocked.CompareExchange(ref first, peer, null);
                return false;
            },
        }.Start();
        using RemoteDisk disk = Connect();
        DeferredWork.Begin();
        Task<byte[]> read = Read(disk, 8192, 4096);
        first!.Close();
        DeferredWork.End();
        Assert.Equal(_image[8192..12288], await read);
        Assert.Equal(2, server.Count);
    }

    /// <summary>The same, and it is certain that the break is known before anything is sent.</summary>
    [Fact]
    public async Task A_connection_that_breaks_before_it_sends_hands_its_reads_back()
    {
        Peer? peer = null;
        using FakeServer server = new FakeServer(SocketPath, _image)
        {
            Handshake = (connected, _) =>
            {
                peer = connected;
                return false;
            },
        }.Start();
        var left = new TaskCompletionSource<List<RemoteRequest>>(TaskCreationOptions.RunContinuationsAsynchronously);
        using RemoteConnection connection = RemoteConnection.Connect(
            RemoteAddress.Parse("unix:" + SocketPath, "-", ""),
            TimeSpan.FromSeconds(20),
            () => { },
            (_, _, requests) => left.SetResult(requests),
            TimeProvider.System);
        var request = RemoteRequest.Rent(0, new byte[512], TimeProvider.System.GetTimestamp());
        Assert.True(connection.TryAdd(request, out bool mustSend));
        Assert.True(mustSend);
        peer!.Close();
        Wait.Until(() => connection.IsBroken, "it is broken");
        Assert.False(left.Task.IsCompleted); // whoever has promised to send may be using the socket
        connection.SendSoon();
        Assert.Equal([request], await left.Task.WaitAsync(TimeSpan.FromSeconds(20)));
    }

    [Fact]
    public async Task A_server_that_always_lies_fails_the_read_in_the_end()
    {
        using FakeServer server = new FakeServer(SocketPath, _image)
        {
            Answer = (peer, _, _) =>
            {
                peer.Send(new byte[NbdSize.SimpleReply]);
                return true;
            },
        }.Start();
        using RemoteDisk disk = Connect(patienceSeconds: 1);
        DiskException failure = await Assert.ThrowsAsync<DiskException>(() => Read(disk, 0, 4096));
        // Whether there is a connection when the patience ends is chance.
        Assert.True(failure.Error is DiskError.TimedOut or DiskError.Unreachable, failure.Error.ToString());
    }

    [Fact]
    public async Task A_connection_that_breaks_amid_a_reply_is_made_anew()
    {
        using FakeServer server = new FakeServer(SocketPath, _image)
        {
            Answer = (peer, number, request) =>
            {
                if (number > 0)
                    return false;
                byte[] part = new byte[NbdSize.StructuredReply + NbdSize.OffsetDataPrefix + 1000];
                NbdReply.WriteOffsetData(part, NbdChunkFlags.Done, request.Cookie, request.Offset, (int)request.Length);
                peer.Send(part);
                peer.Close();
                return true;
            },
        }.Start();
        using RemoteDisk disk = Connect();
        Assert.Equal(_image[..200_000], await Read(disk, 0, 200_000));
        Assert.Contains("the server has closed the connection", LogText, StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_silent_server_fails_the_reads_that_wait_and_serves_those_that_come_when_it_speaks_again()
    {
        using FakeServer server = new FakeServer(SocketPath, _image) { Answer = (_, number, _) => number == 0 }.Start();
        using RemoteDisk disk = Connect(patienceSeconds: 1);
        Task<byte[]>[] reads = [.. Enumerable.Range(0, 5).Select(i => Read(disk, i * 4096, 4096))];
        foreach (Task<byte[]> read in reads)
        {
            DiskException failure = await Assert.ThrowsAsync<DiskException>(() => read);
            Assert.Contains("the server has been silent for 1 seconds", failure.Message, StringComparison.Ordinal);
            Assert.Equal(DiskError.TimedOut, failure.Error);
        }

        Assert.Equal(_image[..4096], await Read(disk, 0, 4096));
    }

    /// <summary>A weekend without the server, and one of silence.</summary>
    [Fact]
    public async Task A_patient_read_waits_for_as_long_as_it_takes()
    {
        var clock = new TestClock();
        FakeServer first = new FakeServer(SocketPath, _image) { Answer = (_, _, _) => true }.Start();
        using RemoteDisk disk = Connect(patienceSeconds: double.MaxValue, time: clock);
        byte[] buffer = new byte[4096];
        Task read = disk.ReadAsync(0, buffer).AsTask();
        for (int silences = 1; silences < 4; silences++) // each connection is given up, and the read is sent again
        {
            int count = silences;
            Wait.Until(() => first.Count >= count && disk.ConnectionCount == 1, "it is connected");
            clock.Turn(TimeSpan.FromSeconds(31));
            Wait.Until(() => first.Count > count, "a silent server is tried anew");
        }

        first.Dispose();
        File.Delete(SocketPath);
        Wait.Until(() => disk.ConnectionCount == 0, "it is gone");
        clock.Turn(TimeSpan.FromDays(2));
        int before = clock.Readings; // by the watch alone, as long as nothing is connected
        Wait.Until(() => clock.Readings >= before + 3, "the watch has looked");
        Assert.False(read.IsCompleted);
        using FakeServer next = new FakeServer(SocketPath, _image).Start();
        await read.WaitAsync(TimeSpan.FromSeconds(20), TestContext.Current.CancellationToken);
        Assert.Equal(_image[..4096], buffer);
    }

    [Fact]
    public async Task Without_patience_a_read_fails_at_once_while_there_is_no_connection_and_only_then()
    {
        bool isSilent = false;
        FakeServer first = new FakeServer(SocketPath, _image)
        {
            Answer = (_, _, _) => Volatile.Read(ref isSilent),
        }.Start();
        var clock = new TestClock();
        using RemoteDisk disk = Connect(patienceSeconds: 0, time: clock);
        Assert.Equal(_image[..4096], await Read(disk, 0, 4096));
        Volatile.Write(ref isSilent, true);
        Task<byte[]> cut = Read(disk, 0, 4096); // a reply takes its time: this is no loss yet
        clock.Turn(TimeSpan.FromSeconds(4));
        int before = clock.Readings;
        Wait.Until(() => clock.Readings >= before + 3, "the watch has looked");
        Assert.False(cut.IsCompleted);
        long start = Environment.TickCount64;
        first.Dispose();
        File.Delete(SocketPath);
        Assert.Equal(DiskError.TimedOut, (await Assert.ThrowsAsync<DiskException>(() => cut)).Error);
        Assert.Equal(DiskError.Unreachable, (await Assert.ThrowsAsync<DiskException>(() => Read(disk, 0, 512))).Error);
        Assert.InRange(Environment.TickCount64 - start, 0, 4000);
        using FakeServer next = new FakeServer(SocketPath, _image).Start();
        Wait.Until(() => disk.ConnectionCount == 1, "it is back");
        Assert.Equal(_image[..4096], await Read(disk, 0, 4096));
    }

    [Fact]
    public async Task A_disk_whose_server_is_away_is_connected_later_to_a_server_of_its_length()
    {
        using RemoteDisk disk = RemoteDisk.ConnectLater(Options(), Size);
        Assert.Equal((Size, 0), ((int)disk.Length, disk.ConnectionCount));
        Task<byte[]> read = Read(disk, Size - 4096, 4096);
        FakeServer other = new FakeServer(SocketPath, _image[..(Size / 2)]).Start();
        Wait.Until(() => LogText.Contains("it is another disk", StringComparison.Ordinal), "it is refused");
        other.Dispose();
        File.Delete(SocketPath);
        using FakeServer server = new FakeServer(SocketPath, _image).Start();
        Assert.Equal(_image[^4096..], await read);
    }

    [Fact]
    public async Task An_error_fails_its_own_read_only()
    {
        using FakeServer server = new FakeServer(SocketPath, _image)
        {
            Answer = (peer, _, request) =>
            {
                if (request.Offset != 4096)
                    return false;
                peer.SendError(request.Cookie, NbdError.Io, "a bad sector");
                return true;
            },
        }.Start();
        using RemoteDisk disk = Connect();
        Task<byte[]> good = Read(disk, 0, 4096), bad = Read(disk, 4096, 4096), other = Read(disk, 8192, 4096);
        DiskException failure = await Assert.ThrowsAsync<DiskException>(() => bad);
        Assert.Contains("a bad sector", failure.Message, StringComparison.Ordinal);
        Assert.Equal(DiskError.Io, failure.Error);
        Assert.Contains(SocketPath, failure.Message, StringComparison.Ordinal);
        Assert.Equal(_image[..4096], await good);
        Assert.Equal(_image[8192..12288], await other);
        Assert.Equal(1, server.Count);
    }

    /// <summary>Sixteen reads, answered from the last to the first, each in three chunks, which are mixed.</summary>
    [Fact]
    public async Task Replies_come_in_any_order_and_in_pieces()
    {
        const int reads = 16, length = 8192;
        var held = new List<NbdRequest>();
        using FakeServer server = new FakeServer(SocketPath, _image)
        {
            Answer = (peer, _, request) =>
            {
                held.Add(request);
                if (held.Count < reads)
                    return true;
                held.Reverse();
                foreach ((int start, int end) in ((int, int)[])[(5000, length), (0, 100), (100, 5000)])
                {
                    foreach (NbdRequest each in held)
                    {
                        byte[] payload = new byte[8 + end - start];
                        BinaryPrimitives.WriteUInt64BigEndian(payload, each.Offset + (ulong)start);
                        _image.AsSpan((int)each.Offset + start, end - start).CopyTo(payload.AsSpan(8));
                        peer.SendChunk(
                            start == 100 ? NbdChunkFlags.Done : NbdChunkFlags.None,
                            NbdChunkType.OffsetData,
                            each.Cookie,
                            payload);
                    }
                }

                return true;
            },
        }.Start();
        using RemoteDisk disk = Connect();
        byte[][] seen = await Task.WhenAll(Enumerable.Range(0, reads).Select(i => Read(disk, i * length, length)));
        for (int i = 0; i < reads; i++)
            Assert.Equal(_image[(i * length)..((i + 1) * length)], seen[i]);
    }

    [Fact]
    public async Task Several_connections_are_made_only_where_the_server_allows_it()
    {
        using FakeServer several = new FakeServer(SocketPath, _image)
        {
            Flags = NbdTransmissionFlags.HasFlags | NbdTransmissionFlags.CanMultiConn,
        }.Start();
        using RemoteDisk disk = Connect(connections: 3);
        Wait.Until(() => disk.ConnectionCount == 3, "all are made");
        using FakeServer one = new FakeServer(_folder.File("one"), _image).Start();
        disk.SwitchTo(RemoteAddress.Parse("unix:" + one.Path, "-", ""));
        Assert.Equal(_image[..4096], await Read(disk, 0, 4096));
        Assert.Equal((1, 1), (disk.ConnectionCount, one.Count));
    }

    /// <summary>
    /// The server reads one request of the first connection, and then none; but it answers each, until that
    /// connection's socket is full, and whoever sends there waits.
    /// </summary>
    [Fact]
    public async Task A_connection_on_which_a_send_waits_holds_up_no_other()
    {
        using var end = new ManualResetEventSlim();
        Peer? full = null;
        ulong cookie = 0;
        using FakeServer server = new FakeServer(SocketPath, _image)
        {
            Flags = NbdTransmissionFlags.HasFlags | NbdTransmissionFlags.CanMultiConn,
            Answer = (peer, number, request) =>
            {
                if (number > 0)
                    return false;
                cookie = request.Cookie;
                peer.SendData(NbdChunkFlags.Done, cookie, 0, 512);
                Volatile.Write(ref full, peer);
                end.Wait(TimeSpan.FromSeconds(60));
                return true;
            },
        }.Start();
        RemoteDisk disk = Connect(connections: 2);
        try
        {
            Wait.Until(() => disk.ConnectionCount == 2, "both are made");
            await Read(disk, 0, 512); // a lone read goes to the first one
            Wait.Until(() => Volatile.Read(ref full) is not null, "the server has read it");
            Task<Task> submitting;
            for (int sent = 0; ; sent++)
            {
                var begun = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
                submitting = Task.Factory.StartNew(
                    () =>
                    {
                        begun.SetResult();
                        return disk.ReadAsync(0, new byte[512]).AsTask();
                    },
                    TestContext.Current.CancellationToken,
                    TaskCreationOptions.LongRunning,
                    TaskScheduler.Default);
                await begun.Task;
                Task tooLong = Task.Delay(1000, TestContext.Current.CancellationToken);
                if (await Task.WhenAny(submitting, tooLong) == tooLong)
                {
                    for (int i = 0; i < 10; i++)
                        Assert.Equal(_image[4096..4608], await Read(disk, 4096, 512));
                    Assert.Equal(2, disk.ConnectionCount);
                    if (!submitting.IsCompleted) // else it was only slow
                    {
                        Assert.InRange(sent, 50, int.MaxValue);
                        break;
                    }
                }

                cookie += 1UL << 32; // the same place, used once more
                full!.SendData(NbdChunkFlags.Done, cookie, 0, 512);
                await await submitting;
            }

            disk.Dispose();
            DiskException failure = await Assert.ThrowsAsync<DiskException>(
                () => submitting.Unwrap().WaitAsync(TimeSpan.FromSeconds(20)));
            Assert.Equal(DiskError.Unreachable, failure.Error);
        }
        finally
        {
            end.Set();
            disk.Dispose();
        }
    }

    [Fact]
    public async Task A_remote_whose_address_cannot_be_recorded_is_not_used()
    {
        using FakeServer old = new FakeServer(SocketPath, _image).Start();
        bool isFull = true;
        RemoteAddress? recorded = null;
        using RemoteDisk disk = RemoteDisk.Connect(Options() with
        {
            Record = address => recorded = isFull ? throw new DiskException(DiskError.NoSpace, "full") : address,
        });
        using FakeServer next = new FakeServer(_folder.File("next"), new byte[_image.Length]).Start();
        RemoteAddress before = disk.Address, after = RemoteAddress.Parse("unix:" + next.Path, "-", "");
        Assert.Throws<DiskException>(() => disk.SwitchTo(after));
        Assert.Equal(before, disk.Address);
        Assert.Equal(_image[..4096], await Read(disk, 0, 4096));
        isFull = false;
        disk.SwitchTo(after);
        Assert.Equal((after, after), (recorded, disk.Address));
        Assert.Equal(new byte[4096], await Read(disk, 0, 4096));
    }

    private static readonly Dictionary<string, (Action<Peer> Say, string Message)> s_badHandshakes = new()
    {
        ["another protocol"] = (peer => peer.Send("SSH-2.0-OpenSSH_9.2p1 Debian-2"u8), "there is no NBD server"),
        ["the end"] = (peer => peer.Close(), "has closed the connection in the handshake"),
        ["a reply to nothing"] = (
            peer => Negotiate(peer, (p, _) => p.ReplyOption(NbdOption.List, NbdOptionReplyType.Ack)),
            "fault of that server"),
        ["a reply without its magic"] = (
            peer => Negotiate(peer, (p, _) => p.Send(new byte[NbdSize.OptionReplyHeader])), "fault of that server"),
        ["a reply of a gigabyte"] = (
            peer => Negotiate(peer, (p, option) =>
            {
                byte[] reply = new byte[NbdSize.OptionReplyHeader];
                NbdHandshake.WriteOptionReply(reply, option, NbdOptionReplyType.Info, []);
                BinaryPrimitives.WriteUInt32BigEndian(reply.AsSpan(16), 1 << 30);
                p.Send(reply);
            }),
            "fault of that server"),
        ["a context that nobody wants"] = (
            peer => Negotiate(peer, (_, _) => { }, Contexts((1, "qemu:allocation-depth"))),
            "metadata context that was not asked for"),
        ["a context twice"] = (
            peer => Negotiate(peer, (_, _) => { }, Contexts((1, "base:allocation"), (2, "base:allocation"))),
            "metadata context that was not asked for"),
        ["half a context"] = (
            peer
                => Negotiate(
                    peer, (_, _) => { }, (p, option) => p.ReplyOption(option, NbdOptionReplyType.MetaContext, [0, 0])),
            "metadata context that was not asked for"),
        ["no size"] = (
            peer => Negotiate(peer, (p, option) => p.ReplyOption(option, NbdOptionReplyType.Ack)),
            "fault of that server"),
        ["an endless answer"] = (
            peer => Negotiate(peer, (p, option) =>
            {
                while (true)
                    p.ReplyOption(option, NbdOptionReplyType.Info, [0, 7]);
            }),
            "too many replies"),
        ["short information"] = (
            peer => Negotiate(peer, (p, option) => p.ReplyOption(option, NbdOptionReplyType.Info, [0])),
            "malformed information"),
        ["a size beyond all disks"] = (
            peer => Negotiate(peer, (p, option) =>
            {
                p.ReplyOption(
                    option, NbdOptionReplyType.Info, NbdHandshake.InfoExport(-1, NbdTransmissionFlags.HasFlags));
                p.ReplyOption(option, NbdOptionReplyType.Ack);
            }),
            "impossible size"),
        ["blocks of a megabyte"] = (
            peer => Negotiate(peer, (p, option) =>
            {
                p.ReplyOption(
                    option, NbdOptionReplyType.Info, NbdHandshake.InfoExport(Size, NbdTransmissionFlags.HasFlags));
                p.ReplyOption(option, NbdOptionReplyType.Info, NbdHandshake.InfoBlockSize(1 << 20, 1 << 20, 1 << 20));
                p.ReplyOption(option, NbdOptionReplyType.Ack);
            }),
            "is not supported"),
        ["a refusal"] = (
            peer
                => Negotiate(
                    peer, (p, option) => p.ReplyOption(option, NbdOptionReplyType.ErrPolicy, [.. "go away"u8])),
            "go away"),
        ["that it wants TLS"] = (
            peer => Negotiate(peer, (p, option) => p.ReplyOption(option, NbdOptionReplyType.ErrTlsRequired)), "TLS"),
    };

    public static TheoryData<string> BadHandshakes => [.. s_badHandshakes.Keys];

    /// <summary>Agrees on structured replies, tells no zeroes, and answers GO as the test says.</summary>
    private static void Negotiate(
        Peer peer, Action<Peer, NbdOption> answer, Action<Peer, NbdOption>? tellContexts = null)
    {
        peer.Greet();
        (NbdOption first, _) = peer.ReceiveOption();
        peer.ReplyOption(first, NbdOptionReplyType.Ack);
        (NbdOption zeroes, _) = peer.ReceiveOption();
        (tellContexts ?? ((p, option) => p.ReplyOption(option, NbdOptionReplyType.ErrUnsupported)))(peer, zeroes);
        (NbdOption go, _) = peer.ReceiveOption();
        answer(peer, go);
    }

    private static Action<Peer, NbdOption> Contexts(params (uint Id, string Name)[] contexts) => (peer, option) =>
    {
        foreach ((uint id, string name) in contexts)
            peer.ReplyOption(option, NbdOptionReplyType.MetaContext, NbdHandshake.MetaContext(id, name));
        peer.ReplyOption(option, NbdOptionReplyType.Ack);
    };

    [Theory]
    [MemberData(nameof(BadHandshakes))]
    public void A_handshake_that_fails_says_why_and_whose_fault_it_is(string says)
    {
        using FakeServer server = new FakeServer(SocketPath, _image)
        {
            Handshake = (peer, _) =>
            {
                s_badHandshakes[says].Say(peer);
                return true;
            },
        }.Start();
        var failure = Assert.Throws<RemoteException>(() => Connect());
        Assert.Contains(s_badHandshakes[says].Message, failure.Message, StringComparison.Ordinal);
        Assert.Contains(SocketPath, failure.Message, StringComparison.Ordinal);
    }

    /// <summary>With several sizes of blocks and payloads that a server wants.</summary>
    [Theory]
    [InlineData(1u, 4096u)]
    [InlineData(512u, 1536u)]
    [InlineData(4096u, 65536u)]
    [InlineData(1u, uint.MaxValue)]
    public async Task No_read_is_longer_or_finer_than_the_server_wants(uint block, uint most)
    {
        var seen = new List<NbdRequest>();
        using FakeServer server = Demanding(SocketPath, block, most, seen);
        using RemoteDisk disk = Connect();
        Assert.Equal(_image[4096..300_000], await Read(disk, 4096, 300_000 - 4096));
        Assert.All(
            seen,
            request
                => Assert.True(request.Length <= most && request.Length % block == 0 && request.Offset % block == 0));
    }

    /// <summary>A server that wants whole blocks and short requests, and notes what it is asked.</summary>
    private FakeServer Demanding(string path, uint block, uint most, List<NbdRequest> seen)
        => new FakeServer(path, _image)
        {
            Handshake = (peer, _) =>
            {
                Negotiate(peer, (p, option) =>
                {
                    p.ReplyOption(
                        option, NbdOptionReplyType.Info, NbdHandshake.InfoExport(Size, NbdTransmissionFlags.HasFlags));
                    p.ReplyOption(option, NbdOptionReplyType.Info, NbdHandshake.InfoBlockSize(block, 4096, most));
                    p.ReplyOption(option, NbdOptionReplyType.Ack);
                });
                return true;
            },
            Answer = (_, _, request) =>
            {
                lock (seen)
                    seen.Add(request);
                return false;
            },
        }.Start();
}
