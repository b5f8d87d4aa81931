using System.Collections.Concurrent;
using Xnbd.Protocol;
using Xnbd.Storage;
using Xnbd.TestKit;

namespace Xnbd.Client.Tests;

/// <summary>Several servers of one disk, and servers that have another one.</summary>
public sealed class RemoteServersTests : IDisposable
{
    private const int Size = 1 << 20, Block = 4096;

    private readonly TempFolder _folder = new();
    private readonly byte[] _image = new byte[Size];
    private readonly byte[] _other = new byte[Size];
    private readonly ConcurrentQueue<string> _lines = new();
    private readonly TestLog _log;
    private readonly ConcurrentQueue<RemoteAddress> _recorded = new();
    private DiskSamples _samples = DiskSamples.None;
    private bool _isFull;

    public RemoteServersTests()
    {
        new Random(1).NextBytes(_image);
        new Random(2).NextBytes(_other);
        _log = new TestLog((_, _, line) => _lines.Enqueue(line));
    }

    public void Dispose() => _folder.Dispose();

    private string LogText => string.Join('\n', _lines);

    private RemoteAddress Address(string name) => RemoteAddress.Parse("unix:" + _folder.File(name), "-", "");

    private FakeServer Serve(string name, byte[]? image = null)
        => new FakeServer(_folder.File(name), image ?? _image).Start();

    private void End(FakeServer server)
    {
        server.Dispose();
        File.Delete(server.Path);
    }

    /// <summary>From now on these blocks are known.</summary>
    private void Know(params int[] blocks)
        => _samples = DiskSamples.Choose(
            [.. blocks.Select(block => ((long)block * Block, _image.AsSpan(block * Block, Block).ToArray()))], false);

    private RemoteDisk Connect(params string[] names) => RemoteDisk.Connect(Options(names));

    private RemoteOptions Options(params string[] names) => new()
    {
        Servers = [.. names.Select(Address)],
        Log = _log,
        TakeSamples = () => _samples,
        Record = server =>
        {
            if (_isFull)
                throw new DiskException(DiskError.NoSpace, "full");
            _recorded.Enqueue(server);
        },
        ProxyId = 7,
    };

    private static async Task<byte[]> Read(RemoteDisk disk, long offset, int length)
    {
        byte[] buffer = new byte[length];
        await disk.ReadAsync(offset, buffer).AsTask().WaitAsync(TimeSpan.FromSeconds(20));
        await Task.Yield();
        return buffer;
    }

    [Fact]
    public async Task Servers_are_tried_in_turn_and_reads_go_on_with_the_next_one()
    {
        FakeServer second = Serve("b");
        using RemoteDisk disk = Connect("a", "b", "c");
        Assert.Equal(Address("b"), disk.Address);
        Assert.Equal(_image[..Block], await Read(disk, 0, Block));
        Know(0, 7);
        using FakeServer wrong = Serve("c", _other);
        End(second);
        Wait.Until(() => disk.ConnectionCount == 0, "it is gone");
        Task<byte[]> waiting = Read(disk, Block, Block);
        Wait.Until(
            () => LogText.Contains("the block at byte 0 is not the one that was fetched", StringComparison.Ordinal),
            "another disk is refused");
        Assert.False(waiting.IsCompleted);
        using FakeServer first = Serve("a");
        Assert.Equal(_image[Block..(2 * Block)], await waiting);
        Assert.Equal(Address("a"), disk.Address);
        Assert.Contains($"the remote is now {Address("a")}", LogText, StringComparison.Ordinal);
        Assert.Equal(2, LogText.Split("is not the one that was fetched").Length); // logged once
    }

    /// <summary>After a restart, the server that was used last is the one that need not prove itself.</summary>
    [Fact]
    public async Task Another_server_is_recorded_before_anything_is_read_from_it()
    {
        FakeServer first = Serve("a");
        using FakeServer second = Serve("b");
        using RemoteDisk disk = Connect("a", "b");
        _isFull = true;
        End(first);
        Task<byte[]> read = Read(disk, 0, Block);
        Wait.Until(() => LogText.Contains("it cannot be recorded: full", StringComparison.Ordinal), "it is refused");
        Assert.False(read.IsCompleted);
        _isFull = false;
        Assert.Equal(_image[..Block], await read);
        Assert.Equal([Address("b")], _recorded);
    }

    [Fact]
    public async Task The_state_of_the_remote_tells_its_connections_and_why_it_is_lost()
    {
        using var hold = new ManualResetEventSlim();
        FakeServer server = new FakeServer(_folder.File("a"), _image)
        {
            Answer = (_, _, _) =>
            {
                hold.Wait();
                return false;
            },
        }.Start();
        using RemoteDisk disk = Connect("a");
        RemoteState state = disk.State;
        RemoteConnectionState connection = Assert.Single(state.Connections);
        Assert.Equal((1, 0, null, null), (state.WantedConnections, state.WaitingReads, state.Lost, state.Reason));
        Assert.Equal((0, TimeSpan.Zero, 0L), (connection.Requests, connection.Silence, connection.ReceivedBytes));

        Task<byte[]> read = Read(disk, 0, Block);
        Wait.Until(() => disk.State.Connections[0] is { Requests: 1, Silence.TotalMilliseconds: > 20 }, "it is silent");
        hold.Set();
        Assert.Equal(_image[..Block], await read);
        connection = Assert.Single(disk.State.Connections);
        Assert.Equal((0, TimeSpan.Zero), (connection.Requests, connection.Silence));
        Assert.InRange(connection.ReceivedBytes, Block, Block + 100);

        End(server);
        Wait.Until(() => disk.ConnectionCount == 0, "it is gone");
        Task<byte[]> waiting = Read(disk, Block, Block);
        Wait.Until(() => disk.State is { WaitingReads: 1, Lost.TotalMilliseconds: > 0 }, "a read waits");
        Assert.Contains(Address("a").ToString(), disk.State.Reason, StringComparison.Ordinal);
        using FakeServer back = Serve("a");
        await waiting;
        Wait.Until(() => disk.State is { Lost: null, Reason: null, WaitingReads: 0 }, "it is back");
        Assert.NotEqual(connection.Id, Assert.Single(disk.State.Connections).Id);
    }

    [Fact]
    public void A_server_with_another_length_than_the_known_one_is_passed_over()
    {
        using FakeServer other = Serve("a", new byte[2 * Size]), right = Serve("b");
        using RemoteDisk disk = RemoteDisk.Connect(
            Options("a", "b") with { LastServer = Address("a"), ExpectedLength = Size });
        Assert.Equal((Address("b"), Size), (disk.Address, disk.Length));
    }

    [Fact]
    public async Task The_server_of_last_time_is_believed_although_its_disk_has_changed()
    {
        Know(3);
        using FakeServer changed = Serve("a", _other);
        string refused = Assert.Throws<RemoteException>(() => Connect("a").Dispose()).Message;
        Assert.Contains($"the block at byte {3 * Block} is not", refused, StringComparison.Ordinal);
        using RemoteDisk disk = RemoteDisk.Connect(Options("b", "a") with { LastServer = Address("a") });
        Assert.Equal(_other[..Block], await Read(disk, 0, Block));
        Assert.Contains(
            $"the disk has changed since blocks were fetched; the first that was noticed is at byte {3 * Block}",
            LogText,
            StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_change_of_the_remote_is_refused_if_it_is_another_disk()
    {
        using FakeServer server = Serve("a"), wrong = Serve("b", _other), right = Serve("c");
        using RemoteDisk disk = Connect("a");
        Know(1, 2, 3);
        Assert.Throws<RemoteException>(() => disk.SwitchTo(Address("b")));
        Assert.Equal(Address("a"), disk.Address);
        Assert.Empty(_recorded);
        Assert.Equal(_image[..Block], await Read(disk, 0, Block));
        disk.SwitchTo(Address("c"));
        Assert.Equal(_image[..Block], await Read(disk, 0, Block));
        Assert.Equal(1, right.Count);
    }

    public static TheoryData<string> Faults => ["silent", "gone", "bad sector", "bad disk"];

    [Theory]
    [MemberData(nameof(Faults))]
    public void A_server_that_cannot_show_its_blocks_is_not_believed_unless_a_sector_is_bad(string fault)
    {
        Know([.. Enumerable.Range(0, 40)]);
        using FakeServer server = new FakeServer(_folder.File("a"), _image)
        {
            Answer = (peer, _, request) =>
            {
                if (fault == "gone")
                    peer.Close();
                if (fault is "silent" or "gone")
                    return true;
                if (fault == "bad sector" && request.Offset != 0)
                    return false;
                peer.SendError(request.Cookie, NbdError.Io, "a bad sector");
                return true;
            },
        }.Start();
        if (fault == "bad sector")
            Connect("a").Dispose();
        else
            Assert.Throws<RemoteException>(() => Connect("a").Dispose());
    }

    [Fact]
    public void A_message_names_its_server_once()
    {
        Know(0, 7);
        string path = _folder.File("a");
        using FakeServer server = new FakeServer(path, _image) { Answer = Leave }.Start();
        string message = Assert.Throws<RemoteException>(() => Connect("a")).Message;
        Assert.Equal(2, message.Split(path).Length);

        static bool Leave(FakeServer.Peer peer, int connection, NbdRequest request)
        {
            peer.Close();
            return true;
        }
    }

    [Fact]
    public async Task That_a_server_is_recognized_by_its_length_alone_is_logged()
    {
        using FakeServer second = Serve("b");
        FakeServer first = Serve("a");
        using RemoteDisk disk = Connect("a", "b");
        Assert.DoesNotContain("by its length alone", LogText, StringComparison.Ordinal);
        End(first);
        Assert.Equal(_image[..Block], await Read(disk, 0, Block));
        Assert.Contains("recognized by its length alone", LogText, StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_read_that_nobody_wants_any_more_is_not_sent_when_the_server_is_back()
    {
        int asked = 0;
        FakeServer first = Serve("a");
        using RemoteDisk disk = Connect("a");
        End(first);
        Wait.Until(() => disk.ConnectionCount == 0, "it is lost");
        using var gone = new CancellationTokenSource();
        byte[] buffer = new byte[Block];
        Task[] left = [.. Enumerable.Range(1, 20).Select(
            i => disk.ReadAsync(i * Block, buffer, gone.Token).AsTask())];
        Task<byte[]> stays = Read(disk, 0, Block);
        Assert.Equal(21, disk.State.WaitingReads);
        gone.Cancel();
        foreach (Task read in left)
            await Assert.ThrowsAnyAsync<OperationCanceledException>(() => read);
        Assert.Equal(1, disk.State.WaitingReads);
        using FakeServer again = new FakeServer(_folder.File("a"), _image) { Answer = Count }.Start();
        Assert.Equal(_image[..Block], await stays);
        Assert.Equal(1, Volatile.Read(ref asked));
        Assert.Equal(new byte[Block], buffer);

        bool Count(FakeServer.Peer peer, int connection, NbdRequest request)
        {
            Interlocked.Increment(ref asked);
            return false;
        }
    }

    [Fact]
    public void A_server_whose_trail_comes_back_is_refused()
    {
        foreach ((ulong[] trail, bool isRefused) in ((ulong[], bool)[])[([1, 7], true), ([7], true), ([1, 2], false)])
        {
            FakeServer server = new FakeServer(_folder.File("a"), _image)
            {
                Description = NbdProxyTrail.Append("disk", trail),
            }.Start();
            if (isRefused)
            {
                string refused = Assert.Throws<RemoteException>(() => Connect("a").Dispose()).Message;
                Assert.Contains("go round in a circle", refused, StringComparison.Ordinal);
            }
            else
            {
                using RemoteDisk disk = Connect("a");
                Assert.Equal([7, 1, 2], disk.Trail);
            }

            End(server);
        }
    }
}
