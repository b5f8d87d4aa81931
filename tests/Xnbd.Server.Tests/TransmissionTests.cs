using System.Buffers.Binary;
using System.Net.Sockets;
using Xnbd.Protocol;
using Xnbd.Storage;
using Xnbd.TestKit;

namespace Xnbd.Server.Tests;

/// <summary>The rules of the transmission phase.</summary>
public sealed class TransmissionTests : IDisposable
{
    private const int Size = 1 << 20;

    private readonly FaultDisk _disk = new(new MemoryDisk(Size));
    private readonly ServerFixture _server;

    public TransmissionTests() => _server = new ServerFixture(_disk);

    public void Dispose() => _server.Dispose();

    [Theory]
    [InlineData(true, false)]
    [InlineData(false, false)]
    [InlineData(true, true)]
    [InlineData(false, true)]
    public void What_was_written_is_read(bool structured, bool slow)
    {
        _disk.Slow = slow;
        using NbdTestClient client = _server.Open(structured);
        byte[] data = new byte[300_000];
        new Random(1).NextBytes(data);
        Assert.Equal(NbdError.None, client.Write(12345, data));
        Assert.Equal(data, client.Read(12345, 300_000));
        Assert.Equal(data[..1000], client.Read(12345, 1000));
        Assert.Equal(NbdError.None, client.Write(Size - 1, [9]));
        Assert.Equal([9], client.Read(Size - 1, 1));
    }

    [Fact]
    public void The_traffic_counts_what_all_clients_have_moved_also_those_that_left()
    {
        Assert.Equal(default, _server.Traffic);
        NbdTestClient first = _server.Open();
        first.Write(0, new byte[5000]);
        first.Read(0, 300);
        Assert.Equal(new ServerTraffic(1, 300, 5000), _server.Traffic);
        using NbdTestClient second = _server.Open();
        second.Read(0, 20);
        Assert.Equal(new ServerTraffic(2, 320, 5000), _server.Traffic);
        first.Disconnect();
        first.Dispose();
        Wait.Until(() => _server.Traffic.Connections == 1, "the client has left");
        Assert.Equal(new ServerTraffic(1, 320, 5000), _server.Traffic);
    }

    [Theory]
    [InlineData(NbdCommand.Read, Size, 1u, NbdError.Invalid)]
    [InlineData(NbdCommand.Read, Size - 10, 11u, NbdError.Invalid)]
    [InlineData(NbdCommand.Read, long.MaxValue, 4096u, NbdError.Invalid)]
    [InlineData(NbdCommand.Read, -1, 2u, NbdError.Invalid)]
    [InlineData(NbdCommand.Write, Size - 10, 11u, NbdError.NoSpace)]
    [InlineData(NbdCommand.WriteZeroes, Size, 1u, NbdError.NoSpace)]
    [InlineData(NbdCommand.WriteZeroes, 0, uint.MaxValue, NbdError.NoSpace)]
    [InlineData(NbdCommand.Trim, Size, 1u, NbdError.Invalid)]
    [InlineData(NbdCommand.Cache, Size - 1, 2u, NbdError.Invalid)]
    [InlineData(NbdCommand.BlockStatus, Size - 1, 2u, NbdError.Invalid)]
    [InlineData(NbdCommand.BlockStatus, 0, 0u, NbdError.Invalid)]
    [InlineData(NbdCommand.Read, 0, (32u << 20) + 1, NbdError.Overflow)]
    [InlineData((NbdCommand)8, 0, 0u, NbdError.Invalid)]
    [InlineData((NbdCommand)777, 0, 0u, NbdError.Invalid)]
    public void Bad_ranges_and_commands_are_refused_and_the_session_stays_up(
        NbdCommand command, long offset, uint length, NbdError expected)
    {
        foreach (bool structured in (bool[])[true, false])
        {
            using NbdTestClient client = structured ? _server.Open(true, "", "base:allocation") : _server.Open(false);
            byte[]? payload = command == NbdCommand.Write ? new byte[length] : null;
            Assert.Equal(expected, client.Try(command, (ulong)offset, length, 0, payload));
            Assert.Equal(new byte[4], client.Read(0, 4));
        }
    }

    [Theory]
    [InlineData(NbdCommand.Read, NbdCommandFlags.NoHole)]
    [InlineData(NbdCommand.Write, NbdCommandFlags.Df)]
    [InlineData(NbdCommand.Flush, NbdCommandFlags.ReqOne)]
    [InlineData(NbdCommand.Trim, NbdCommandFlags.NoHole)]
    [InlineData(NbdCommand.WriteZeroes, NbdCommandFlags.ReqOne)]
    [InlineData(NbdCommand.BlockStatus, NbdCommandFlags.Df)]
    [InlineData(NbdCommand.Read, (NbdCommandFlags)(1 << 5))]
    [InlineData(NbdCommand.Read, (NbdCommandFlags)(1 << 15))]
    public void Unknown_flags_are_refused(NbdCommand command, NbdCommandFlags flags)
    {
        using NbdTestClient client = _server.Open(true, "", "base:allocation");
        uint length = command == NbdCommand.Flush ? 0u : 512u;
        byte[]? payload = command == NbdCommand.Write ? new byte[512] : null;
        Assert.Equal(NbdError.Invalid, client.Try(command, 0, length, flags, payload));
    }

    [Fact]
    public void Df_needs_structured_replies()
    {
        using NbdTestClient client = _server.Open(structured: false);
        Assert.Equal(NbdError.Invalid, client.Try(NbdCommand.Read, 0, 512, NbdCommandFlags.Df));
    }

    [Fact]
    public void Fua_is_legal_on_every_command_and_syncs_those_that_write()
    {
        using NbdTestClient client = _server.Open(true, "", "base:allocation");
        foreach (NbdCommand command in (NbdCommand[])[NbdCommand.Read, NbdCommand.Cache, NbdCommand.BlockStatus])
            Assert.Equal(NbdError.None, client.Try(command, 0, 4096, NbdCommandFlags.Fua));
        Assert.Equal(0, _disk.Syncs);
        Assert.Equal(NbdError.None, client.Write(0, new byte[512], NbdCommandFlags.Fua));
        Assert.Equal(1, _disk.Syncs);
        Assert.Equal(NbdError.None, client.Try(NbdCommand.WriteZeroes, 0, 512, NbdCommandFlags.Fua));
        Assert.Equal(NbdError.None, client.Try(NbdCommand.Trim, 0, 512, NbdCommandFlags.Fua));
        Assert.Equal(NbdError.None, client.Try(NbdCommand.Flush, 0, 0, NbdCommandFlags.Fua));
        Assert.Equal(4, _disk.Syncs);
    }

    [Theory]
    [InlineData(NbdCommand.Read)]
    [InlineData(NbdCommand.Write)]
    [InlineData(NbdCommand.Trim)]
    [InlineData(NbdCommand.WriteZeroes)]
    [InlineData(NbdCommand.Cache)]
    public void A_request_of_length_zero_is_answered(NbdCommand command)
    {
        foreach (bool structured in (bool[])[true, false])
        {
            using NbdTestClient client = _server.Open(structured);
            Assert.Equal(NbdError.None, client.Try(command, Size, 0));
            Assert.Equal(new byte[4], client.Read(0, 4));
        }
    }

    [Fact]
    public void A_read_only_export_refuses_changes_and_the_session_stays_up()
    {
        using var server = new ServerFixture(new FaultDisk(new MemoryDisk(4096)) { ReadOnly = true });
        using NbdTestClient client = server.Open();
        Assert.Equal(NbdError.Permission, client.Write(0, new byte[4096]));
        Assert.Equal(NbdError.Permission, client.Write(0, new byte[200_000]));
        Assert.Equal(NbdError.Permission, client.Try(NbdCommand.Trim, 0, 4096));
        Assert.Equal(NbdError.Permission, client.Try(NbdCommand.WriteZeroes, 0, 4096));
        Assert.Equal(NbdError.None, client.Try(NbdCommand.Flush));
        Assert.Equal(new byte[4096], client.Read(0, 4096));
    }

    [Theory]
    [InlineData(DiskError.NoSpace, NbdError.NoSpace)]
    [InlineData(DiskError.Io, NbdError.Io)]
    [InlineData(DiskError.Permission, NbdError.Permission)]
    public void A_failed_disk_is_an_error_of_the_request(DiskError kind, NbdError expected)
    {
        foreach (bool slow in (bool[])[true, false])
        {
            _disk.Slow = slow;
            _disk.Before = (operation, offset, _) => offset == 4096 || operation == "flush"
                ? throw new DiskException(kind, "as planned, in /secret")
                : Task.CompletedTask;
            foreach (bool structured in (bool[])[true, false])
            {
                using NbdTestClient client = _server.Open(structured);
                List<Reply> read = client.Call(NbdCommand.Read, 4096, 512);
                Assert.Equal(expected, read[^1].Error);
                Assert.DoesNotContain(
                    "secret", System.Text.Encoding.UTF8.GetString(read[^1].Payload), StringComparison.Ordinal);
                if (structured)
                    Assert.Equal(NbdChunkType.Error, read.Single().ChunkType);
                Assert.Equal(expected, client.Write(4096, new byte[512]));
                Assert.Equal(expected, client.Write(4096, new byte[100_000]));
                Assert.Equal(expected, client.Try(NbdCommand.Flush));
                Assert.Equal(new byte[512], client.Read(0, 512));
            }
        }
    }

    [Fact]
    public void A_disk_that_throws_something_else_is_an_io_error()
    {
        _disk.Slow = true;
        _disk.Before = (_, offset, _)
            => offset == 0 ? throw new InvalidOperationException("a bug") : Task.CompletedTask;
        using NbdTestClient client = _server.Open();
        Assert.Equal(NbdError.Io, client.Try(NbdCommand.Read, 0, 512));
        Assert.Equal(new byte[512], client.Read(512, 512));
    }

    [Theory]
    [InlineData(true)]
    [InlineData(false)]
    public void Zeroes_are_sent_as_holes_unless_data_is_among_them(bool slow)
    {
        _disk.Slow = slow;
        using NbdTestClient client = _server.Open();
        Assert.Equal(NbdChunkType.OffsetHole, client.Call(NbdCommand.Read, 8192, 4096).Single().ChunkType);
        Assert.Equal(NbdError.None, client.Write(10_000, [1]));
        Assert.Equal(NbdChunkType.OffsetData, client.Call(NbdCommand.Read, 8192, 4096).Single().ChunkType);
    }

    [Fact]
    public void Zeroes_of_any_length_fit_their_reply()
    {
        foreach (bool slow in (bool[])[false, true])
        {
            _disk.Slow = slow;
            using NbdTestClient client = _server.Open();
            for (uint length = 1; length < 40; length++)
                Assert.Equal(new byte[length], client.Read(65536 - 20, length));
        }
    }

    [Theory]
    [InlineData(65535, 4040, 1)]
    [InlineData(65535, 8136, 1)]
    [InlineData(65535, 65480, 1)]
    [InlineData(65533, 4040, 3)]
    [InlineData(65536 - 4037, 4040, -3)]
    public void A_short_hole_beside_data_fits_its_reply(int offset, int length, int zeroes)
    {
        _disk.Slow = true;
        using NbdTestClient client = _server.Open();
        byte[] data = new byte[length];
        data.AsSpan().Fill(1);
        (zeroes > 0 ? data.AsSpan(0, zeroes) : data.AsSpan(length + zeroes)).Clear();
        client.Write((ulong)offset, data);
        List<Reply> reply = client.Call(NbdCommand.Read, (ulong)offset, (uint)length);
        Assert.Equal(2, reply.Count);
        Assert.Equal(data, NbdTestClient.Assemble(reply, (ulong)offset, (uint)length));
    }

    [Fact]
    public void A_large_read_is_cut_at_holes_unless_the_client_forbids_it()
    {
        _disk.Slow = true;
        using NbdTestClient client = _server.Open();
        client.Write(200_000, [1]);
        client.Write(400_000, [2]);
        client.Write(Size - 1, [3]);
        List<Reply> whole = client.Call(NbdCommand.Read, 0, Size);
        Assert.Equal(6, whole.Count);
        Assert.Equal(3, whole.Count(c => c.ChunkType == NbdChunkType.OffsetHole));
        byte[] expected = new byte[Size];
        (expected[200_000], expected[400_000], expected[^1]) = (1, 2, 3);
        Assert.Equal(expected, NbdTestClient.Assemble(whole, 0, Size));

        Reply single = client.Call(NbdCommand.Read, 0, Size, NbdCommandFlags.Df).Single();
        Assert.Equal(NbdChunkType.OffsetData, single.ChunkType);
        Assert.Equal(expected, single.Payload[8..]);
    }

    [Fact]
    public void Pending_requests_do_not_hold_up_others()
    {
        var gate = new TaskCompletionSource();
        _disk.Slow = true;
        _disk.Before = (operation, offset, _) => operation == "read" && offset == 0 ? gate.Task : Task.CompletedTask;
        using NbdTestClient client = _server.Open();
        ulong slow = client.SendRequest(NbdCommand.Read, 0, 512);
        ulong fast = client.SendRequest(NbdCommand.Read, 4096, 512);
        Assert.Equal(fast, client.ReceiveReply().Cookie);
        gate.SetResult();
        Assert.Equal(slow, client.ReceiveReply().Cookie);
    }

    [Fact]
    public void Cookies_may_repeat()
    {
        _disk.Slow = true;
        using NbdTestClient client = _server.Open();
        for (int i = 0; i < 50; i++)
        {
            client.NextCookie = ulong.MaxValue;
            client.SendRequest(NbdCommand.Read, (ulong)i * 512, 512);
        }

        for (int i = 0; i < 50; i++)
            Assert.Equal(ulong.MaxValue, client.ReceiveReply().Cookie);
    }

    [Fact]
    public void Requests_in_flight_are_bounded_and_all_are_answered()
    {
        const int count = 1000;
        var gate = new TaskCompletionSource();
        int running = 0;
        _disk.Slow = true;
        _disk.Before = (_, _, _) =>
        {
            Interlocked.Increment(ref running);
            return gate.Task;
        };
        using NbdTestClient client = _server.Open();
        Task sender = Task.Run(() =>
        {
            for (int i = 0; i < count; i++)
                client.SendRequest(NbdCommand.Read, 0, 512);
        });
        Wait.Until(() => Volatile.Read(ref running) == ServerLimits.MaxInFlight, "the bound is reached");
        Thread.Sleep(100);
        Assert.Equal(ServerLimits.MaxInFlight, Volatile.Read(ref running));
        gate.SetResult();
        var cookies = new HashSet<ulong>();
        for (int i = 0; i < count; i++)
            cookies.Add(client.ReceiveReply().Cookie);
        Assert.Equal(count, cookies.Count);
        sender.Wait();
    }

    [Fact]
    public void Disconnect_finishes_what_is_in_flight()
    {
        var gate = new TaskCompletionSource();
        _disk.Slow = true;
        using var isReceived = new ManualResetEventSlim();
        _disk.Before = (_, _, _) =>
        {
            isReceived.Set();
            return gate.Task;
        };
        using NbdTestClient client = _server.Open();
        byte[] requests = new byte[(2 * NbdSize.Request) + 3];
        new NbdRequest(NbdCommandFlags.None, NbdCommand.Write, 1, 0, 3).Write(requests);
        new NbdRequest(NbdCommandFlags.None, NbdCommand.Disconnect, 2, 0, 0).Write(requests.AsSpan(^NbdSize.Request..));
        client.Send(requests); // in one go, so that both are received together
        Assert.True(isReceived.Wait(TimeSpan.FromSeconds(20)));
        gate.SetResult();
        Assert.Equal(NbdError.None, client.ReceiveReply().Error);
        Assert.True(client.IsClosed());
    }

    [Fact]
    public void A_client_that_sends_no_more_still_gets_its_replies()
    {
        _disk.Slow = true;
        using NbdTestClient client = _server.Open();
        for (int i = 0; i < 20; i++)
            client.SendRequest(NbdCommand.Read, 0, 65536);
        client.Socket.Shutdown(SocketShutdown.Send);
        for (int i = 0; i < 20; i++)
            Assert.Equal(NbdError.None, client.ReceiveReply().Error);
        Assert.True(client.IsClosed());
    }

    [Fact]
    public void A_write_whose_payload_does_not_arrive_changes_nothing()
    {
        foreach (int length in (int[])[1000, 200_000])
        {
            using (NbdTestClient client = _server.Open())
            {
                client.SendRequest(NbdCommand.Write, 0, (uint)length);
                byte[] part = new byte[length - 1];
                part.AsSpan().Fill(7);
                client.Send(part);
                client.Socket.Shutdown(SocketShutdown.Send);
                Assert.True(client.IsClosed());
            }

            using NbdTestClient other = _server.Open();
            Assert.Equal(new byte[1000], other.Read(0, 1000));
        }
    }

    [Fact]
    public void A_refused_write_is_drained_whatever_its_length()
    {
        using NbdTestClient client = _server.Open();
        Assert.Equal(NbdError.Invalid, client.Write(0, new byte[(32 << 20) + 100]));
        Assert.Equal(NbdError.NoSpace, client.Write(Size, new byte[100_000]));
        Assert.Equal(NbdError.NoSpace, client.Write(Size, new byte[10]));
        Assert.Equal(new byte[4], client.Read(0, 4));
    }

    [Fact]
    public void A_wrong_request_magic_ends_the_connection()
    {
        using NbdTestClient client = _server.Open();
        client.SendRequest(NbdCommand.Read, 0, 16);
        client.Send(new byte[28]);
        Assert.Equal(NbdError.None, client.ReceiveReply().Error); // what came before is answered
        Assert.True(client.IsClosed());
    }

    [Fact]
    public void Requests_are_understood_byte_by_byte()
    {
        using NbdTestClient client = _server.Open();
        byte[] header = new byte[28];
        for (int i = 0; i < 10; i++)
        {
            new NbdRequest(0, NbdCommand.Write, 5, (ulong)i, 2).Write(header);
            foreach (byte one in (byte[])[.. header, (byte)i, (byte)(i + 1)])
                client.Send([one]);
            Assert.Equal(NbdError.None, client.ReceiveReply().Error);
        }

        Assert.Equal([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], client.Read(0, 11));
    }

    [Fact]
    public void A_client_that_reads_nothing_harms_nobody_and_gets_all_later()
    {
        _disk.Slow = true;
        using NbdTestClient lazy = _server.Open();
        const int count = 400;
        Task sender = Task.Run(() =>
        {
            for (int i = 0; i < count; i++)
                lazy.SendRequest(NbdCommand.Read, 0, 65536, NbdCommandFlags.Df);
        });
        using (NbdTestClient client = _server.Open())
        {
            client.Write(0, [1]);
            for (int i = 0; i < 200; i++)
                Assert.Equal(NbdError.None, client.Try(NbdCommand.Read, 0, 65536));
        }

        for (int i = 0; i < count; i++)
            Assert.Equal(NbdError.None, lazy.ReceiveReply().Error);
        sender.Wait();
    }

    /// <summary>A long read in memory may go to another thread, but it could be answered at once as well.</summary>
    [Theory]
    [InlineData(true)]
    [InlineData(false)]
    public void A_long_read_in_memory_waits_for_no_bytes_of_the_budget(bool isReaderIdle)
    {
        var clock = new TestClock(); // it stands still: nobody is ever too slow
        using var server = new ServerFixture(
            new FaultDisk(new MemoryDisk(33 << 20)) { IsReaderIdle = isReaderIdle }, time: clock);
        using NbdTestClient first = server.Open(), second = server.Open(), third = server.Open();
        using NbdTestClient fourth = server.Open();
        byte[] data = new byte[32 << 20];
        foreach (NbdTestClient other in new[] { first, second, third, fourth })
        {
            other.SendRequest(NbdCommand.Write, 0, 32u << 20); // all four at once: 128 MiB of 128
            other.Send(data.AsSpan(1));
        }

        using NbdTestClient reader = server.Open();
        foreach (uint length in new[] { 512u << 10, 1u << 20, 2u << 20, 4u << 20 })
            Assert.Equal((int)length, reader.Read(0, length).Length);
    }

    [Fact]
    public void A_long_read_in_memory_goes_to_another_thread_only_if_one_is_idle()
    {
        int elsewhere = 0;
        Task Count(string operation, long offset, long length)
        {
            elsewhere += operation == "read" ? 1 : 0;
            return Task.CompletedTask;
        }

        using var busy = new ServerFixture(new FaultDisk(new MemoryDisk(2 << 20)) { After = Count });
        using (NbdTestClient client = busy.Open())
        {
            for (int i = 0; i < 20; i++)
                client.Read(0, 1 << 20);
        }

        Assert.Equal(0, elsewhere);

        using var idle = new ServerFixture(
            new FaultDisk(new MemoryDisk(2 << 20)) { After = Count, IsReaderIdle = true });
        using (NbdTestClient client = idle.Open())
        {
            long start = Environment.TickCount64; // other tests may keep all processors busy for a while
            while (elsewhere == 0 && Environment.TickCount64 - start < 30_000)
                client.Read(0, 1 << 20);
        }

        Assert.NotEqual(0, elsewhere);
    }

    /// <summary>Replies in order are waited for by those behind them, so none is given away needlessly.</summary>
    [Fact]
    public void A_long_read_in_memory_of_a_client_that_needs_order_goes_to_no_other_thread()
    {
        int elsewhere = 0;
        var slow = new TaskCompletionSource();
        var disk = new FaultDisk(new MemoryDisk(4 << 20)) { IsReaderIdle = true, SlowAt = offset => offset >= 2 << 20 };
        disk.After = (operation, offset, _) =>
        {
            elsewhere += operation == "read" && offset < 2 << 20 ? 1 : 0;
            return offset < 2 << 20 ? Task.CompletedTask : slow.Task;
        };
        using var server = new ServerFixture(disk);
        using NbdTestClient client = server.Open();
        elsewhere = 1;
        for (int attempts = 0; attempts < 20 && elsewhere > 0; attempts++)
        {
            slow = new TaskCompletionSource();
            SendSame(2 << 20, 4096, count: 2); // the second one finds its cookie in use: from then on order is kept,
            Thread.Sleep(50); // unless the session's thread has not come so far; then once more
            slow.SetResult();
            Receive(2);
            elsewhere = 0;
            SendSame(0, 1 << 20, count: 20);
            Receive(20);
        }

        Assert.Equal(0, elsewhere);

        void SendSame(ulong offset, uint length, int count)
        {
            for (int i = 0; i < count; i++)
            {
                client.NextCookie = 1;
                client.SendRequest(NbdCommand.Read, offset, length);
            }
        }

        void Receive(int count)
        {
            while (count > 0)
                count -= client.ReceiveReply().IsLast ? 1 : 0;
        }
    }

    [Fact]
    public void A_client_that_receives_nothing_holds_few_bytes_by_long_reads_in_memory()
    {
        var clock = new TestClock(); // it stands still: nobody is ever too slow
        var memory = new MemoryDisk(33 << 20);
        byte[] data = new byte[32 << 20];
        data.AsSpan().Fill(5);
        memory.TryWrite(0, data);
        using var server = new ServerFixture(new FaultDisk(memory) { IsReaderIdle = true }, time: clock);
        using NbdTestClient lazy = server.Open();
        for (int i = 0; i < 128; i++)
            lazy.SendRequest(NbdCommand.Read, 0, 1 << 20, NbdCommandFlags.None);
        using NbdTestClient first = server.Open(), second = server.Open(), third = server.Open();
        NbdTestClient[] others = [first, second, third];
        foreach (NbdTestClient other in others)
        {
            other.SendRequest(NbdCommand.Write, 0, 32u << 20); // all three at once: 96 MiB of 128
            other.Send(data.AsSpan(1));
        }

        foreach (NbdTestClient other in others)
        {
            other.Send(data.AsSpan(0, 1));
            Assert.Equal(NbdError.None, other.ReceiveReply().Error);
        }

        for (int i = 0; i < 128;)
        {
            Reply reply = lazy.ReceiveReply();
            Assert.Equal(NbdError.None, reply.Error);
            i += reply.IsLast ? 1 : 0;
        }
    }

    [Fact]
    public void A_client_that_stalls_while_others_wait_for_its_bytes_is_disconnected()
    {
        // Four clients claim all bytes that may be in flight; each sends 1 MiB of its 32.
        var hoarders = new List<NbdTestClient>();
        var clock = new TestClock();
        using var server = new ServerFixture(new FaultDisk(new MemoryDisk(33 << 20)), time: clock);
        try
        {
            for (int i = 0; i < 4; i++)
            {
                hoarders.Add(server.Open());
                hoarders[i].SendRequest(NbdCommand.Write, 0, 32u << 20);
                hoarders[i].Send(new byte[1 << 20]);
            }

            Thread.Sleep(300);
            using NbdTestClient honest = server.Open();
            byte[] data = new byte[8 << 20];
            data.AsSpan().Fill(5);
            TurnWhile(clock, () => Assert.Equal(NbdError.None, honest.Write(0, data)));
            Assert.Equal(data, honest.Read(0, 8 << 20));
            Assert.Contains(hoarders, h => h.Socket.Poll(5_000_000, SelectMode.SelectRead) && h.IsClosed());
        }
        finally
        {
            hoarders.ForEach(h => h.Dispose());
        }
    }

    [Fact]
    public void A_client_that_sends_a_byte_now_and_then_is_disconnected_as_well()
    {
        // As above, but each sends a byte now and then: two of the rest of a write, two of a write that is refused.
        var clock = new TestClock();
        using var server = new ServerFixture(new FaultDisk(new MemoryDisk(33 << 20)), time: clock);
        using var stop = new CancellationTokenSource();
        using (NbdTestClient writer = server.Open())
            Assert.Equal(NbdError.None, writer.Write(0, [1])); // otherwise the read is one short hole
        NbdTestClient[] hoarders = [.. Enumerable.Range(0, 4).Select(_ => server.Open())];
        try
        {
            for (int i = 0; i < 4; i++)
            {
                if (i % 2 == 1)
                {
                    // The client does not read its reply, which holds the bytes.
                    ((FaultDisk)server.Disk).Slow = true;
                    hoarders[i].SendRequest(NbdCommand.Read, 0, 31u << 20, NbdCommandFlags.Df);
                    Thread.Sleep(200);
                    hoarders[i].SendRequest(NbdCommand.Write, 1ul << 40, 1u << 31);
                }
                else
                {
                    hoarders[i].SendRequest(NbdCommand.Write, 0, 32u << 20);
                }
            }

            Task trickle = Task.Run(() =>
            {
                while (!stop.Token.WaitHandle.WaitOne(100))
                {
                    foreach (NbdTestClient hoarder in hoarders)
                        _ = Record.Exception(() => hoarder.Send([0]));
                }
            });
            using NbdTestClient honest = server.Open();
            TimeSpan waited = TurnWhile(clock, () => Assert.Equal(NbdError.None, honest.Write(0, new byte[16 << 20])));
            Assert.InRange(waited, ServerLimits.StallTime / 2, ServerLimits.StallTime * 3); // the write had to wait
            stop.Cancel();
            Assert.True(Task.WaitAny([trickle], 10_000) == 0);
        }
        finally
        {
            stop.Cancel();
            foreach (NbdTestClient hoarder in hoarders)
                hoarder.Dispose();
        }
    }

    /// <summary>Turns a clock five times as fast as time goes by, until an action has ended.</summary>
    /// <returns>How far the clock was turned.</returns>
    private static TimeSpan TurnWhile(TestClock clock, Action action)
    {
        long start = clock.GetTimestamp();
        var task = Task.Run(action);
        while (!task.Wait(100))
            clock.Turn(TimeSpan.FromSeconds(0.5));
        task.GetAwaiter().GetResult();
        return clock.GetElapsedTime(start);
    }

    [Fact]
    public async Task Many_large_requests_at_once_share_the_budget()
    {
        using var server = new ServerFixture(new FaultDisk(new MemoryDisk(33 << 20)) { Slow = true });
        Task[] clients = [.. Enumerable.Range(0, 12).Select(i => Task.Run(() =>
        {
            using NbdTestClient client = server.Open();
            byte[] data = new byte[20 << 20];
            for (int round = 0; round < 2; round++)
            {
                Assert.Equal(NbdError.None, client.Write(0, data));
                Assert.Equal(20 << 20, client.Read(0, 20 << 20).Length);
            }
        }))];
        await Task.WhenAll(clients).WaitAsync(TimeSpan.FromSeconds(60));
    }

    [Fact]
    public void Stopping_answers_what_was_received_and_closes()
    {
        var gate = new TaskCompletionSource();
        _disk.Slow = true;
        using var isReceived = new ManualResetEventSlim();
        _disk.Before = (_, _, _) =>
        {
            isReceived.Set();
            return gate.Task;
        };
        using NbdTestClient busy = _server.Open();
        using NbdTestClient idle = _server.Open();
        using NbdTestClient negotiating = _server.Connect();
        negotiating.Start();
        ulong cookie = busy.SendRequest(NbdCommand.Write, 0, 3, 0, [1, 2, 3]);
        Assert.True(isReceived.Wait(TimeSpan.FromSeconds(20)));
        Task stop = Task.Run(_server.Server.Stop);
        Assert.True(idle.IsClosed());
        Assert.True(negotiating.IsClosed());
        Assert.False(stop.IsCompleted);
        gate.SetResult();
        Assert.Equal(cookie, busy.ReceiveReply().Cookie);
        Assert.True(busy.IsClosed());
        Assert.True(stop.Wait(10_000));
        Assert.ThrowsAny<SocketException>(() => _server.Connect());
    }

    [Fact]
    public void Block_status_is_one_chunk_for_the_context()
    {
        using NbdTestClient client = _server.Open(true, "", "base:allocation");
        Reply reply = client.Call(NbdCommand.BlockStatus, 4096, 8192).Single();
        Assert.Equal(NbdChunkType.BlockStatus, reply.ChunkType);
        Assert.Equal(1u, BinaryPrimitives.ReadUInt32BigEndian(reply.Payload));
        Assert.Equal([(8192u, 0u)], client.BlockStatus(4096, 8192));
    }

    [Fact]
    public async Task Random_requests_on_four_connections_leave_what_a_byte_array_would_hold()
    {
        byte[] held = new byte[Size];
        foreach (bool slow in (bool[])[false, true])
        {
            _disk.Slow = slow;
            if (slow)
                _disk.Before = async (_, _, _) => await Task.Delay(Random.Shared.Next(2));
            int operations = slow ? 2000 : 10_000;
            var model = new ModelRun(_server.SocketPath, Size, seed: slow ? 7 : 8, operations)
            {
                Initial = held,
                TrimUnit = 1,
            };
            await model.Run();
            held = model.Model;
        }
    }

    [Fact]
    public async Task No_client_is_forgotten_under_a_mixed_load()
    {
        // Fast, slow and stuck requests on many connections: after a lost wake-up a client would get no reply.
        int count = 0;
        _disk.Slow = true;
        _disk.Before = (_, _, _) => Interlocked.Increment(ref count) % 3 == 0 ? Task.Delay(1) : Task.CompletedTask;
        Task[] clients = [.. Enumerable.Range(0, 16).Select(i => Task.Run(() =>
        {
            using NbdTestClient client = _server.Open(i % 2 == 0);
            client.Socket.ReceiveBufferSize = 4096; // the server's sends block often
            var random = new Random(i);
            for (int round = 0; round < 20; round++)
            {
                int batch = random.Next(1, 40);
                for (int k = 0; k < batch; k++)
                    client.SendRequest(NbdCommand.Read, (ulong)random.Next(1000), (uint)random.Next(1, 60_000), 0);
                for (int k = 0; k < batch;)
                    k += client.ReceiveReply().IsLast ? 1 : 0;
            }
        }))];
        await Task.WhenAll(clients).WaitAsync(TimeSpan.FromSeconds(60));
    }
}
