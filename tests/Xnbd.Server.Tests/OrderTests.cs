using System.Buffers.Binary;
using Xnbd.Protocol;
using Xnbd.Storage;
using Xnbd.TestKit;

namespace Xnbd.Server.Tests;

/// <summary>
/// Clients that tell replies apart by their order, not by their cookies: clients of the old style, and those that give
/// several requests one cookie. The disk answers some requests at once, and others late and in any order.
/// </summary>
public sealed class OrderTests : IDisposable
{
    private const int Size = 8 << 20, Requests = 300;

    private readonly byte[] _bytes = new byte[Size];
    private readonly FaultDisk _disk;
    private readonly Stack<TaskCompletionSource> _held = new(); // slow operations, the newest on top
    private readonly Timer _answering; // in the opposite of the order of the requests, as far as several are held

    public OrderTests()
    {
        new Random(7).NextBytes(_bytes);
        var memory = new MemoryDisk(Size);
        memory.TryWrite(0, _bytes);
        _disk = new FaultDisk(memory)
        {
            SlowAt = offset => offset / 4096 % 3 != 0,
            Before = (_, offset, _) => offset / 4096 % 3 != 0 ? Hold() : Task.CompletedTask,
        };
        _answering = new Timer(_ => AnswerNewest(), null, 1, 1);
    }

    public void Dispose()
    {
        _answering.Dispose();
        _disk.Dispose();
    }

    private Task Hold()
    {
        var held = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
        lock (_held)
            _held.Push(held);
        return held.Task;
    }

    private void AnswerNewest()
    {
        lock (_held)
        {
            if (_held.TryPop(out TaskCompletionSource? newest))
                newest.SetResult();
        }
    }

    public enum Style
    {
        Old,
        NewSimple,
        NewStructured,
    }

    [Theory]
    [InlineData(Style.Old, true)]
    [InlineData(Style.Old, false)]
    [InlineData(Style.NewSimple, true)]
    [InlineData(Style.NewStructured, true)]
    public async Task Replies_come_in_the_order_of_the_requests(Style style, bool hasOneCookie)
    {
        using var server =
            new ServerFixture(_disk, style == Style.Old ? HandshakeStyle.Oldstyle : HandshakeStyle.FixedNewstyle);
        using NbdTestClient client = style == Style.Old ? server.Connect() : server.Open(style == Style.NewStructured);
        if (style == Style.Old)
            client.Receive(NbdSize.OldstyleGreeting);

        // Reads and writes of mixed sizes, flushes, errors, and requests of nothing.
        var random = new Random(11);
        var requests = new List<NbdRequest>();
        for (int i = 0; i < Requests; i++)
        {
            NbdCommand command = random.Next(10) switch
            {
                0 => NbdCommand.Flush,
                1 or 2 => NbdCommand.Write,
                _ => NbdCommand.Read,
            };
            uint length = command == NbdCommand.Flush
                ? 0
                : (uint)(random.Next(4) == 0 ? random.Next(200_000) : random.Next(5000));
            ulong offset = command == NbdCommand.Flush ? 0
                : random.Next(20) == 0 ? Size
                : (ulong)random.Next(Size - 200_000);
            requests.Add(new NbdRequest(NbdCommandFlags.None, command, hasOneCookie ? 77 : (ulong)i, offset, length));
        }

        Task sending = Task.Run(() =>
        {
            byte[] header = new byte[NbdSize.Request];
            foreach (NbdRequest request in requests)
            {
                request.Write(header);
                client.Send(header);
                if (request.Command != NbdCommand.Write)
                    continue;

                // A write does not change the data, so the order of reads and writes does not matter.
                client.Send(request.Offset < Size ? Expected(request) : new byte[request.Length]);
            }
        });
        foreach (NbdRequest request in requests)
            CheckReply(client, request, style == Style.NewStructured);
        await sending;
    }

    private void CheckReply(NbdTestClient client, NbdRequest request, bool isStructured)
    {
        bool fails = request.Offset + request.Length > Size;
        if (!isStructured || request.Command != NbdCommand.Read)
        {
            // Errors have a form of their own where replies are structured.
            byte[] start = client.Receive(NbdSize.SimpleReply);
            bool isChunk = BinaryPrimitives.ReadUInt32BigEndian(start) == NbdMagic.StructuredReply;
            Assert.Equal(request.Cookie, BinaryPrimitives.ReadUInt64BigEndian(start.AsSpan(8)));
            if (isChunk)
                client.Receive(BinaryPrimitives.ReadInt32BigEndian(client.Receive(4)));
            Assert.Equal(fails, isChunk || BinaryPrimitives.ReadUInt32BigEndian(start.AsSpan(4)) != 0);
            if (request.Command == NbdCommand.Read && !fails)
                Assert.True(
                    client.Receive((int)request.Length).AsSpan().SequenceEqual(Expected(request)),
                    $"wrong data at {request.Offset}");
            return;
        }

        var chunks = new List<Reply>();
        do
        {
            chunks.Add(client.ReceiveReply());
            Assert.Equal(request.Cookie, chunks[^1].Cookie);
        }
        while (!chunks[^1].IsLast);
        if (fails)
            Assert.NotEqual(NbdError.None, chunks[0].Error);
        else if (request.Length > 0)
        {
            byte[] data = NbdTestClient.Assemble(chunks, request.Offset, request.Length);
            Assert.True(data.AsSpan().SequenceEqual(Expected(request)), $"wrong data at {request.Offset}");
        }

    }

    private ReadOnlySpan<byte> Expected(NbdRequest request) => _bytes.AsSpan((int)request.Offset, (int)request.Length);

    /// <summary>
    /// QEMU uses a cookie again as soon as it has the reply. That does not count as one cookie for two requests.
    /// </summary>
    [Fact]
    public void A_cookie_may_be_used_again_at_once()
    {
        using var release = new ManualResetEventSlim();
        _disk.SlowAt = _ => true;
        _disk.Before = (_, offset, _) => offset == 0 ? Task.Run(release.Wait) : Task.CompletedTask;
        using var server = new ServerFixture(_disk);
        using NbdTestClient client = server.Open();
        client.NextCookie = 1;
        client.SendRequest(NbdCommand.Read, 0, 512); // it is answered after all others
        for (int i = 0; i < 20_000; i++)
        {
            client.NextCookie = 2;
            client.SendRequest(NbdCommand.Read, 4096, 16);
            Assert.Equal(2ul, client.ReceiveReply().Cookie);
        }

        release.Set();
        Assert.Equal(1ul, client.ReceiveReply().Cookie);
    }

    /// <summary>
    /// The session's thread answers the first one, and gathers replies. Another thread answers the second one.
    /// </summary>
    [Theory]
    [InlineData(NbdCommand.Flush)]
    [InlineData(NbdCommand.Read)]
    public void A_pending_request_does_not_overtake_a_fast_one_with_its_cookie(NbdCommand second)
    {
        const uint fastAt = 0, slowAt = 4096, length = 512;
        _disk.SlowAt = offset => offset == slowAt;
        _disk.Before = null; // what is slow completes at once
        using var server = new ServerFixture(_disk);
        using NbdTestClient client = server.Open(structured: false);
        byte[] requests = new byte[2 * NbdSize.Request];
        var first = new NbdRequest(NbdCommandFlags.None, NbdCommand.Read, 77, fastAt, length);
        first.Write(requests);
        var next = new NbdRequest(
            NbdCommandFlags.None,
            second,
            77,
            second == NbdCommand.Read ? slowAt : 0,
            second == NbdCommand.Read ? length : 0);
        next.Write(requests.AsSpan(NbdSize.Request));
        client.Send(requests); // in one go, so that the first reply is gathered
        CheckReply(client, first, isStructured: false);
        CheckReply(client, next, isStructured: false);
    }

    /// <summary>The first pieces of a long read are in memory, and the rest comes from the disk, at any time.</summary>
    [Fact]
    public void The_last_chunk_of_a_reply_comes_last()
    {
        _disk.SlowAt = offset => offset % (1 << 20) >= 128 << 10;
        _disk.Before = null;
        using var server = new ServerFixture(_disk);
        using NbdTestClient client = server.Open();
        const int reads = 40, length = 160 << 10;
        var replies = new Dictionary<ulong, (ulong Offset, List<Reply> Chunks)>();
        byte[] requests = new byte[reads * NbdSize.Request];
        for (int i = 0; i < reads; i++) // in one go, so that replies are gathered
        {
            replies.Add((ulong)i, ((ulong)(i % 8) << 20, []));
            new NbdRequest(NbdCommandFlags.None, NbdCommand.Read, (ulong)i, (ulong)(i % 8) << 20, length)
                .Write(requests.AsSpan(i * NbdSize.Request));
        }

        Task sending = Task.Run(() => client.Send(requests));
        for (int left = reads; left > 0;)
        {
            Reply chunk = client.ReceiveReply();
            Assert.True(
                replies.TryGetValue(chunk.Cookie, out (ulong Offset, List<Reply> Chunks) read),
                "a chunk behind the last one");
            read.Chunks.Add(chunk);
            if (!chunk.IsLast)
                continue;
            byte[] data = NbdTestClient.Assemble(read.Chunks, read.Offset, length);
            Assert.True(data.AsSpan().SequenceEqual(_bytes.AsSpan((int)read.Offset, length)));
            replies.Remove(chunk.Cookie);
            left--;
        }

        sending.GetAwaiter().GetResult();
    }

    [Fact]
    public void Requests_with_cookies_of_their_own_overtake_each_other()
    {
        using var release = new ManualResetEventSlim();
        _disk.SlowAt = offset => offset == 4096;
        _disk.Before = (_, offset, _) => offset == 4096 ? Task.Run(release.Wait) : Task.CompletedTask;
        using var server = new ServerFixture(_disk);
        using NbdTestClient client = server.Open();
        ulong slow = client.SendRequest(NbdCommand.Read, 4096, 512), fast = client.SendRequest(NbdCommand.Read, 0, 512);
        Assert.Equal(fast, client.ReceiveReply().Cookie);
        release.Set();
        Assert.Equal(slow, client.ReceiveReply().Cookie);
    }
}
