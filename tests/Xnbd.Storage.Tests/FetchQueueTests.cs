using Xnbd.Storage.Cache;
using Xnbd.Storage.Maps;
using Xnbd.Storage.Threads;
using Xnbd.TestKit;

namespace Xnbd.Storage.Tests;

/// <summary>Fetches alone, with an origin that answers what a test says, and nothing that stores.</summary>
public sealed class FetchQueueTests : IDisposable
{
    private const int Block = BlockRange.BlockSize;
    private const int Length = 16 << 20;

    private readonly BlockMap _map = MemoryMap.Create(Length);
    private readonly Origin _origin = new();
    private readonly List<Fetch> _arrived = [];
    private readonly List<long> _readLocally = [];
    private FetchQueue? _queue;

    public void Dispose() => _queue?.Dispose();

    private FetchQueue Open(int requests = 64, long bytes = 32 << 20, TimeProvider? time = null)
    {
        return _queue = new FetchQueue(_origin, _map, new CacheLimits(requests, bytes), ReadLocal, _arrived.Add, time);

        ValueTask ReadLocal(long offset, Memory<byte> buffer, CancellationToken cancel)
        {
            _readLocally.Add(offset);
            return ValueTask.CompletedTask;
        }
    }

    private Task<byte[]> Read(long offset, int length)
    {
        byte[] buffer = new byte[length];
        Task<byte[]>? read = null;
        AsOnThreadsOfTheServer(() => read = Finish(_queue!.ReadAsync(offset, buffer)));
        return read!;

        async Task<byte[]> Finish(ValueTask read)
        {
            await read;
            return buffer;
        }
    }

    /// <summary>
    /// Whoever waits goes on at once, on the thread that completes; the test's own context would prevent that.
    /// </summary>
    private static void AsOnThreadsOfTheServer(Action action)
    {
        SynchronizationContext? context = SynchronizationContext.Current;
        SynchronizationContext.SetSynchronizationContext(null);
        try
        {
            action();
        }
        finally
        {
            SynchronizationContext.SetSynchronizationContext(context);
        }
    }

    /// <summary>As the store does it.</summary>
    private void StoreArrived()
    {
        Fetch[] fetches = [.. _arrived];
        _arrived.Clear();
        foreach (Fetch fetch in fetches)
        {
            if (!fetch.IsStale)
                _map.SetFetched(fetch.Range);
        }

        _queue!.End([.. fetches.Select(fetch => (fetch, (DiskException?)null))]);
    }

    private static byte[] Expected(long offset, int length)
        => [.. Enumerable.Range(0, length).Select(i => Origin.ByteAt(offset + i))];

    [Fact]
    public async Task Readers_have_their_data_even_if_it_cannot_be_stored()
    {
        // The store may be faster than the thread that received the data.
        var full = new DiskException(DiskError.NoSpace, "the disk is full");
        FetchQueue queue = null!;
        queue = _queue = new FetchQueue(
            _origin,
            _map,
            new CacheLimits(4, 1 << 20),
            (_, _, _) => ValueTask.CompletedTask,
            fetch => queue.End([(fetch, full)]));
        Task<byte[]> read = Read(5000, 100);
        _origin.Answer(0);
        Assert.Equal(Expected(5000, 100), await read);
        Task<(BlockRange, bool)> fetched = queue.FetchAsync(new BlockRange(9, 1), FetchPurpose.Copy);
        _origin.Answer(1);
        DiskException failure = await Assert.ThrowsAsync<DiskException>(() => fetched);
        Assert.Equal(DiskError.NoSpace, failure.Error);
    }

    [Fact]
    public async Task A_block_that_is_being_fetched_is_joined_until_it_is_stored()
    {
        FetchQueue queue = Open();
        Task<byte[]> first = Read(8 * Block, 4 * Block), second = Read((9 * Block) + 5, 100);
        Assert.Equal([new BlockRange(8, 4)], _origin.Asked);
        _origin.Answer(0);
        Assert.Equal(Expected(8 * Block, 4 * Block), await first);
        Assert.Equal(Expected((9 * Block) + 5, 100), await second);
        Assert.Equal(Expected(10 * Block, Block), await Read(10 * Block, Block)); // it has arrived, and is not stored
        Assert.Single(_origin.Asked);
        StoreArrived();
        await Read(10 * Block, Block);
        Assert.Equal([10L * Block], _readLocally); // it has become local
        Assert.Equal((0, 0L), queue.InFlight);
    }

    [Fact]
    public async Task Neighbours_that_are_missed_before_a_fetch_is_sent_go_out_with_it()
    {
        Open();
        DeferredWork.Begin();
        Task<byte[]>[] reads = [.. ((int[])[50, 51, 49, 60]).Select(block => Read(block * Block, Block))];
        Assert.Empty(_origin.Asked);
        DeferredWork.End();
        Assert.Equal([new BlockRange(49, 3), new BlockRange(60, 1)], _origin.Asked);
        Task<byte[]> late = Read(52 * Block, Block);
        Assert.Equal(new BlockRange(52, 1), _origin.Asked[2]);
        for (int i = 0; i < 3; i++)
            _origin.Answer(i);
        Assert.Equal(Expected(49 * Block, Block), await reads[2]);
        Assert.Equal(Expected(52 * Block, Block), await late);
    }

    [Fact]
    public void A_fetch_grows_to_a_MiB_and_no_further_than_there_is_room()
    {
        Open();
        DeferredWork.Begin();
        for (int i = 0; i < 300; i++)
            _ = Read((long)i * Block, Block);
        DeferredWork.End();
        Assert.Equal([new BlockRange(0, 256), new BlockRange(256, 44)], _origin.Asked);
        _queue!.Dispose();

        Open(bytes: Fetch.MaxBytes);
        _ = Read(2000L * Block, 100 * Block);
        DeferredWork.Begin();
        _ = Read(1000L * Block, 100 * Block);
        _ = Read(1100L * Block, 56 * Block);
        _ = Read(1156L * Block, Block); // there is no more room
        DeferredWork.End();
        Assert.Equal(new BlockRange(1000, 156), _origin.Asked[^1]);
        Assert.Equal((2, (long)Fetch.MaxBytes), _queue!.InFlight);
    }

    [Fact]
    public async Task Requests_and_bytes_are_bounded_and_go_out_in_order()
    {
        FetchQueue queue = Open(requests: 2, bytes: 2 << 20);
        Task<byte[]>[] reads = [.. Enumerable.Range(0, 4).Select(i => Read(i * 300L * Block, 128 * Block))];
        Assert.Equal(2, _origin.Asked.Count);
        Assert.Equal((2, 256L * Block), queue.InFlight);
        for (int i = 0; i < 4; i++)
            _origin.Answer(i);
        await Task.WhenAll(reads);
        Assert.Equal([0, 300, 600, 900], _origin.Asked.Select(r => r.First));

        // All of the room is taken by what has arrived and is not stored.
        Task<byte[]> waits = Read(1200L * Block, Block);
        Assert.Equal(4, _origin.Asked.Count);
        Assert.False(queue.HasRoomAhead);
        queue.ReleaseRoom(_arrived[0]); // it waits for a writer
        Assert.Equal(5, _origin.Asked.Count);
        _origin.Answer(4);
        await waits;
        StoreArrived();
        Assert.True(queue.HasRoomAhead);
        Assert.Equal((0, 0L), queue.InFlight);
    }

    [Fact]
    public async Task A_miss_overtakes_the_rest_of_which_one_of_each_kind_goes_on()
    {
        var clock = new TestClock();
        FetchQueue queue = Open(time: clock);
        Task<byte[]> first = Read(0, Block);
        clock.Turn(TimeSpan.FromMilliseconds(50)); // a slow line: it takes two blocks at a time
        _origin.Answer(0);
        await first;
        StoreArrived();

        _ = Read(100 * Block, Block); // it is not answered
        for (int i = 0; i < 3; i++)
        {
            queue.Start(new BlockRange(1000 + (i * 100), 16));
            _ = queue.FetchAsync(new BlockRange(2000 + (i * 100), 16), FetchPurpose.Copy);
        }

        Assert.Equal([0, 100, 1000, 2000], _origin.Asked.Select(range => range.First));
        _ = Read(2101 * Block, Block); // a piece of the copy that waits
        _ = Read(200 * Block, Block);
        Assert.Equal([2100, 200], _origin.Asked[4..].Select(range => range.First));
        clock.Turn(TimeSpan.FromSeconds(1));
        _origin.Answer(2);
        _origin.Answer(3);
        Assert.Equal([1100, 2200], _origin.Asked[6..].Select(range => range.First));
    }

    [Fact]
    public async Task A_failure_fails_those_who_need_the_block_and_the_others_read_alone()
    {
        Open();
        DeferredWork.Begin();
        Task<byte[]> bad = Read(8 * Block, Block), good = Read(9 * Block, 100);
        Task stored = _queue!.FetchAsync(new BlockRange(8, 2), FetchPurpose.Copy);
        DeferredWork.End();
        Assert.Single(_origin.Asked);
        _origin.Fail(0, DiskError.Io);
        Wait.Until(() => _origin.Asked.Count == 3, "each is read alone"); // the second one on another thread
        Assert.Equal([new BlockRange(8, 1), new BlockRange(9, 1)], _origin.Asked[1..].OrderBy(r => r.First));
        _origin.Fail(_origin.Asked.FindLastIndex(r => r.First == 8), DiskError.Io);
        _origin.Answer(_origin.Asked.FindLastIndex(r => r.First == 9));
        await Assert.ThrowsAsync<DiskException>(() => bad);
        Assert.Equal(Expected(9 * Block, 100), await good);
        await Assert.ThrowsAsync<DiskException>(() => stored);
        Assert.Empty(_arrived);

        Task<byte[]> again = Read(8 * Block, Block); // it is no longer in the list
        _origin.Answer(_origin.Asked.Count - 1);
        Assert.Equal(Expected(8 * Block, Block), await again);
    }

    [Theory]
    [InlineData(DiskError.TimedOut)]
    [InlineData(DiskError.Unreachable)]
    public async Task What_failed_for_want_of_a_server_is_not_read_again(DiskError error)
    {
        Open();
        DeferredWork.Begin();
        Task<byte[]>[] reads = [Read(8 * Block, Block), Read(9 * Block, Block)];
        DeferredWork.End();
        _origin.Fail(0, error);
        foreach (Task<byte[]> read in reads)
            Assert.Equal(error, (await Assert.ThrowsAsync<DiskException>(() => read)).Error);
        Assert.Single(_origin.Asked);
    }

    [Fact]
    public async Task A_detached_queue_fails_all_who_wait_and_keeps_nothing()
    {
        FetchQueue queue = Open(requests: 1);
        Task<byte[]> sent = Read(0, Block), waiting = Read(80 * Block, Block);
        queue.Detach();
        foreach (Task<byte[]> read in (Task<byte[]>[])[sent, waiting, Read(160 * Block, Block)])
            Assert.Equal(DiskError.Replaced, (await Assert.ThrowsAsync<DiskException>(() => read)).Error);
        _origin.Answer(0); // too late; then the one that waited for room is let in, and not sent
        Assert.Single(_origin.Asked);
        Assert.True(Assert.Single(_arrived).IsStale);
        StoreArrived();
        Assert.Equal((0, 0L), queue.InFlight);

        queue.Reattach();
        Task<byte[]> again = Read(0, Block);
        _origin.Answer(1);
        Assert.Equal(Expected(0, Block), await again);
    }

    [Fact]
    public async Task A_fetch_that_fails_while_the_queue_is_detached_leaves_nothing_behind()
    {
        FetchQueue queue = Open();
        Task<byte[]> read = Read(0, Block);
        queue.Detach();
        _origin.Fail(0, DiskError.Unreachable);
        Assert.Equal(DiskError.Replaced, (await Assert.ThrowsAsync<DiskException>(() => read)).Error);
        Assert.Equal((0, 0L), queue.InFlight);
        Assert.Empty(_arrived);

        queue.Reattach();
        Task<byte[]> again = Read(0, Block);
        Assert.Equal(2, _origin.Asked.Count);
        _origin.Answer(1);
        Assert.Equal(Expected(0, Block), await again);
    }

    [Fact]
    public async Task A_read_alone_ends_when_the_queue_is_detached()
    {
        FetchQueue queue = Open();
        DeferredWork.Begin();
        Task<byte[]>[] reads = [Read(8 * Block, Block), Read(9 * Block, Block)];
        DeferredWork.End();
        _origin.Fail(0, DiskError.Io);
        Wait.Until(() => _origin.Asked.Count == 3, "each is read alone");
        queue.Detach();
        foreach (Task<byte[]> read in reads)
            Assert.Equal(DiskError.Replaced, (await Assert.ThrowsAsync<DiskException>(() => read)).Error);
    }

    [Fact]
    public async Task What_is_forgotten_reaches_its_readers_and_is_fetched_anew_for_others()
    {
        FetchQueue queue = Open();
        Task<byte[]> early = Read(0, Block);
        queue.Forget();
        Task<byte[]> late = Read(0, Block);
        Assert.Equal(2, _origin.Asked.Count);
        _origin.Answer(0);
        Assert.Equal(Expected(0, Block), await early);
        Assert.False(late.IsCompleted);
        _origin.Answer(1);
        await late;
        Assert.Equal([true, false], _arrived.Select(fetch => fetch.IsStale));
    }

    [Fact]
    public async Task A_long_read_asks_for_all_its_parts_before_it_waits_for_any()
    {
        Open();
        _map.SetFetched(new BlockRange(300, 10));
        Task<byte[]> read = Read(200L * Block, 400 * Block);
        Assert.Equal([new BlockRange(200, 100), new BlockRange(310, 256), new BlockRange(566, 34)], _origin.Asked);
        _origin.Fail(1, DiskError.Unreachable);
        _origin.Answer(2);
        Assert.False(read.IsCompleted); // the first part still writes into its buffer
        _origin.Answer(0);
        await Assert.ThrowsAsync<DiskException>(() => read);
    }

    /// <summary>
    /// A writer that completes a block while it is being stored waits for what it sees, and for nothing else.
    /// </summary>
    [Fact]
    public async Task Who_waits_for_the_store_sees_what_arrived_when_it_asked()
    {
        FetchQueue queue = Open();
        _ = Read(0, Block);
        Assert.True(queue.WhenArrivedAreStored().IsCompleted); // nothing has arrived
        _origin.Answer(0);
        Task stored = queue.WhenArrivedAreStored();
        Assert.False(stored.IsCompleted);
        StoreArrived();
        await stored.WaitAsync(TimeSpan.FromSeconds(20), TestContext.Current.CancellationToken);
    }

    /// <summary>
    /// The worst that could happen: data of one client in a buffer that belongs to another one by now.
    /// </summary>
    [Theory]
    [InlineData(100)]
    [InlineData(3 << 20)] // of several fetches
    public async Task Whoever_leaves_gets_its_buffer_back_untouched_and_others_get_their_data(int length)
    {
        FetchQueue queue = Open();
        using var gone = new CancellationTokenSource();
        byte[] buffer = new byte[length];
        Task read = queue.ReadAsync(5000, buffer, gone.Token).AsTask();
        Task<byte[]> other = Read(5000, length);
        int asked = _origin.Asked.Count;
        if (asked > 1)
            _origin.Answer(1); // it waits for the first one all the same
        gone.Cancel();
        await Assert.ThrowsAnyAsync<OperationCanceledException>(() => read);
        buffer.AsSpan().Fill(0xEE); // whoever uses it now
        for (int i = 0; i < asked; i++)
        {
            if (asked == 1 || i != 1)
                _origin.Answer(i);
        }

        Assert.Equal(Expected(5000, length), await other);
        StoreArrived();
        Assert.False(buffer.AsSpan().ContainsAnyExcept((byte)0xEE));
        Assert.Equal((0, 0L), queue.InFlight);
        Assert.Empty(queue.Ranges);
        Assert.Equal(asked, _origin.Asked.Count);
    }

    [Fact]
    public async Task Clients_that_come_and_leave_while_the_origin_is_away_leave_nothing_behind()
    {
        FetchQueue queue = Open(requests: 1);
        Task<byte[]> stays = Read(0, Block);
        for (int i = 0; i < 100; i++)
        {
            using var gone = new CancellationTokenSource();
            Task[] reads =
            [
                queue.ReadAsync((100 + (i * 5)) * Block, new byte[3 * Block], gone.Token).AsTask(),
                queue.ReadAsync((101 + (i * 5)) * Block, new byte[Block], gone.Token).AsTask(),
                queue.FetchAsync(new BlockRange(2000 + i, 1), FetchPurpose.ReadAhead, gone.Token),
            ];
            gone.Cancel();
            foreach (Task read in reads)
                await Assert.ThrowsAnyAsync<OperationCanceledException>(() => read);
        }

        Assert.Equal([new BlockRange(0, 1)], queue.Ranges);
        Task<byte[]> last = Read(100 * Block, Block);
        _origin.Answer(0);
        _origin.Answer(1);
        Assert.Equal(Expected(0, Block), await stays);
        Assert.Equal(Expected(100 * Block, Block), await last);
        Assert.Equal([new BlockRange(0, 1), new BlockRange(100, 1)], _origin.Asked);
    }

    [Fact]
    public async Task A_read_that_passes_through_ends_when_its_reader_leaves()
    {
        FetchQueue queue = Open();
        using var gone = new CancellationTokenSource();
        byte[] buffer = new byte[100];
        Task read = queue.ReadThroughAsync(5000, buffer, gone.Token).AsTask();
        gone.Cancel();
        await Assert.ThrowsAnyAsync<OperationCanceledException>(() => read);
        _origin.Answer(0);
        Assert.Equal(new byte[100], buffer);
    }

    /// <summary>An origin that answers when it is told to.</summary>
    private sealed class Origin : Disk
    {
        private readonly List<(TaskCompletionSource Done, long Offset, Memory<byte> Buffer)> _reads = [];

        public static byte ByteAt(long offset) => (byte)((offset * 31) + (offset >> 12));

        public List<BlockRange> Asked
        {
            get
            {
                lock (_reads)
                    return [.. _reads.Select(read => BlockRange.Touching(read.Offset, read.Buffer.Length))];
            }
        }

        public override long Length => FetchQueueTests.Length;

        public override DiskFeatures Features => DiskFeatures.ReadOnly;

        public void Answer(int number)
        {
            (TaskCompletionSource done, long offset, Memory<byte> buffer) = _reads[number];
            for (int i = 0; i < buffer.Length; i++)
                buffer.Span[i] = ByteAt(offset + i);
            AsOnThreadsOfTheServer(done.SetResult);
        }

        public void Fail(int number, DiskError error)
            => AsOnThreadsOfTheServer(() => _reads[number].Done.SetException(new DiskException(error, "it failed")));

        public override bool IsFar(long offset, long length, bool isWrite) => true;

        public override ValueTask ReadAsync(long offset, Memory<byte> buffer, CancellationToken cancel = default)
        {
            var done = new TaskCompletionSource();
            lock (_reads)
                _reads.Add((done, offset, buffer));
            return new ValueTask(done.Task);
        }

        public override bool TryRead(long offset, Span<byte> buffer) => false;

        public override bool TryWrite(long offset, ReadOnlySpan<byte> data) => false;

        public override FileRange TryLocate(long offset, int length, bool findHoles) => FileRange.None;

        public override ValueTask WriteAsync(
            long offset, ReadOnlyMemory<byte> data, bool durable, CancellationToken cancel = default)
            => throw new InvalidOperationException();

        public override ValueTask ZeroAsync(
            long offset, long length, ZeroMode mode, bool durable, CancellationToken cancel = default)
            => throw new InvalidOperationException();

        public override ValueTask TrimAsync(
            long offset, long length, bool durable, CancellationToken cancel = default)
            => throw new InvalidOperationException();

        public override ValueTask FlushAsync() => throw new InvalidOperationException();

        public override ValueTask PrefetchAsync(long offset, long length, CancellationToken cancel = default)
            => throw new InvalidOperationException();

        public override ValueTask GetExtentsAsync(long offset, long length, ExtentList extents)
            => throw new InvalidOperationException();

        protected override void Dispose(bool disposing)
        {
        }
    }
}
