using Xnbd.Linux;
using Xnbd.Storage.Cache;
using Xnbd.Storage.Maps;
using Xnbd.Storage.Overlay;
using Xnbd.Storage.Threads;
using Xnbd.TestKit;

namespace Xnbd.Storage.Tests;

/// <summary>Storing alone: what has arrived is handed over by the test.</summary>
public sealed class FetchStoreTests : IDisposable
{
    private const int Block = BlockRange.BlockSize;
    private const int Length = 64 << 20;

    private readonly MemoryMap.NoStore _mapFile = new();
    private readonly BlockMap _map;
    private readonly MemoryDisk _memory = new(Length);
    private readonly FaultDisk _local;
    private readonly BlockLocks _changing = new();
    private readonly TestClock _clock = new();
    private readonly List<IDiskWork> _later = [];
    private readonly List<Fetch> _heldUp = [];
    private readonly List<(Fetch Fetch, DiskException? Failure)> _ended = [];
    private readonly List<DiskException> _failures = [];
    private readonly List<NativeBuffer> _buffers = [];
    private readonly FetchStore _store;
    private Func<ValueTask> _flush = () => ValueTask.CompletedTask;

    public FetchStoreTests()
    {
        _map = MemoryMap.Create(Length, _mapFile);
        _local = new FaultDisk(_memory);
        _store = new FetchStore(_local, _map, _changing, maxHeldUpBytes: 2 << 20)
        {
            HeldUp = _heldUp.Add,
            Ended = Note,
            CannotStore = _failures.Add,
            Flush = () => _flush(),
            RunLater = _later.Add,
            Time = _clock,
        };
    }

    /// <summary>Notes which fetches have ended; the thread that makes a hole may come at any moment.</summary>
    private void Note(IReadOnlyList<(Fetch, DiskException?)> fetches)
    {
        lock (_ended)
            _ended.AddRange(fetches);
    }

    public void Dispose() => _buffers.ForEach(buffer => buffer.Free());

    /// <summary>A fetch whose data have arrived: each byte is the given one.</summary>
    private Fetch Arrived(long first, int count, byte value = 7)
    {
        var buffer = new NativeBuffer(count * Block);
        _buffers.Add(buffer);
        buffer.GetSpan().Fill(value);
        return new Fetch(new BlockRange(first, count), FetchPurpose.Copy) { Buffer = buffer, IsCounted = true };
    }

    /// <summary>Adds fetches as the thread of a connection does, and runs what it deferred.</summary>
    private void Receive(params Fetch[] fetches)
    {
        DeferredWork.Begin();
        foreach (Fetch fetch in fetches)
            _store.Add(fetch);
        DeferredWork.End();
    }

    private void RunLater()
    {
        IDiskWork[] work = [.. _later];
        _later.Clear();
        Array.ForEach(work, each => each.Run());
    }

    private byte ByteOf(long block)
    {
        byte[] data = new byte[Block];
        _memory.TryRead(block * Block, data);
        Assert.False(data.AsSpan().ContainsAnyExcept(data[0]));
        return data[0];
    }

    [Fact]
    public void A_round_is_stored_at_the_end_of_the_batch_and_writes_the_map_once()
    {
        Fetch[] fetches = [.. Enumerable.Range(0, 10).Select(i => Arrived(i * 20, 1))];
        DeferredWork.Begin();
        foreach (Fetch fetch in fetches)
            _store.Add(fetch);
        Assert.Empty(_ended);
        int writes = _mapFile.Writes;
        DeferredWork.End();
        Assert.Equal(fetches, _ended.Select(e => e.Fetch));
        Assert.All(_ended, e => Assert.Null(e.Failure));
        Assert.Equal((10, 1), (_map.Count(BlockState.Fetched), _mapFile.Writes - writes));
        Assert.Equal(7, ByteOf(20));
        Assert.Empty(_later);
    }

    [Fact]
    public void A_fetch_that_waits_for_writers_when_the_store_stops_is_not_stored()
    {
        var held = new BlockRange(10, 1);
        Assert.True(_changing.TryEnter(held));
        Receive(Arrived(0, 20));
        Assert.Single(_heldUp);
        _store.Stop();
        int writes = _mapFile.Writes;
        _changing.Leave(held); // the file may be closed by now
        Wait.Until(() => _ended.Count == 1, "the fetch has ended");
        Assert.NotNull(_ended[0].Failure);
        Assert.Empty(_failures);
        Assert.Equal(0, ByteOf(10));
        Assert.Equal(writes, _mapFile.Writes);
    }

    [Fact]
    public void Without_a_batch_another_thread_stores()
    {
        _store.Add(Arrived(0, 1));
        _store.Add(Arrived(5, 1));
        Assert.Empty(_ended);
        Assert.Single(_later);
        RunLater();
        Assert.Equal(2, _ended.Count);
    }

    [Fact]
    public void More_than_a_MiB_is_for_a_disk_thread()
    {
        Receive([.. Enumerable.Range(0, 3).Select(i => Arrived(i * 256, 256))]);
        Assert.Single(_ended);
        Assert.Single(_later);
        Receive(Arrived(5000, 1)); // somebody stores already
        Assert.Single(_later);
        RunLater();
        Assert.Equal(4, _ended.Count);
    }

    /// <summary>The clock is turned while the file is written.</summary>
    [Fact]
    public void All_is_for_a_disk_thread_as_long_as_the_file_is_slow()
    {
        _local.Before = (_, _, _) =>
        {
            _clock.Turn(TimeSpan.FromMilliseconds(11));
            return Task.CompletedTask;
        };
        Receive(Arrived(0, 1));
        Assert.Single(_ended);
        _local.Before = null;
        Receive(Arrived(5, 1));
        Assert.Single(_ended);
        RunLater();
        Assert.Equal(2, _ended.Count);
        _clock.Turn(TimeSpan.FromMilliseconds(999));
        Receive(Arrived(10, 1));
        Assert.Single(_later);
        RunLater();
        _clock.Turn(TimeSpan.FromMilliseconds(1));
        Receive(Arrived(15, 1));
        Assert.Empty(_later);
        Assert.Equal(4, _ended.Count);
    }

    [Fact]
    public void Only_absent_blocks_are_written_and_a_stale_fetch_is_not()
    {
        _map.Set(new BlockRange(2, 1), BlockState.Written);
        _map.Set(new BlockRange(4, 1), BlockState.Zero);
        Fetch stale = Arrived(100, 4);
        stale.IsStale = true;
        Receive(Arrived(0, 8), stale);
        Assert.Equal(6, _map.Count(BlockState.Fetched));
        Assert.Equal([7, 7, 0, 7, 0, 7], Enumerable.Range(0, 6).Select(block => (int)ByteOf(block)));
        Assert.Equal(0, ByteOf(100));
        Assert.Equal(2, _ended.Count);
    }

    [Fact]
    public void Long_zeroes_become_holes()
    {
        var holes = new List<(long, long)>();
        _local.Before = (operation, offset, length) =>
        {
            if (operation == "zero")
                holes.Add((offset, length));
            return Task.CompletedTask;
        };
        Receive(Arrived(0, 16, value: 0), Arrived(100, 15, value: 0));
        Wait.Until(() => _ended.Count == 2, "both are stored"); // a hole is made by another thread
        Assert.Equal([(0L, 16L * Block)], holes);
    }

    [Fact]
    public void What_waits_for_writers_is_bounded_and_what_is_beyond_is_skipped()
    {
        BlockRange[] held = [.. Enumerable.Range(0, 3).Select(i => new BlockRange((i * 1000) + 10, 1))];
        Assert.All(held, range => Assert.True(_changing.TryEnter(range)));
        Fetch[] fetches = [.. Enumerable.Range(0, 3).Select(i => Arrived(i * 1000, 256))];
        foreach (Fetch fetch in fetches)
            Receive(fetch);
        RunLater();
        Assert.Equal(fetches[..2], _heldUp); // 2 MiB of them
        Assert.Equal(fetches[2], Assert.Single(_ended).Fetch);
        Assert.True(fetches[2].IsSkipped);
        Array.ForEach(held, _changing.Leave);
        Wait.Until(() => _ended.Count == 3, "the others are stored");
        Assert.False(fetches[0].IsSkipped || fetches[1].IsSkipped);

        // Their room is free again.
        Assert.True(_changing.TryEnter(new BlockRange(4000, 1)));
        Receive(Arrived(4000, 256));
        RunLater();
        Assert.Equal(3, _heldUp.Count);
        _changing.Leave(new BlockRange(4000, 1));
        Wait.Until(() => _ended.Count == 4, "it is stored");
    }

    /// <summary>A writer changes the block while the fetch waits for it.</summary>
    [Fact]
    public void A_fetch_that_was_held_up_does_not_overwrite_the_writer()
    {
        var held = new BlockRange(10, 1);
        Assert.True(_changing.TryEnter(held));
        Receive(Arrived(0, 20));
        _map.Set(held, BlockState.Written);
        _changing.Leave(held);
        Wait.Until(() => _ended.Count == 1, "it is stored");
        Assert.Equal((0, 7), (ByteOf(10), ByteOf(11)));
    }

    [Fact]
    public void A_failure_of_the_file_is_told_and_fails_its_fetch_alone()
    {
        _local.Before = (operation, offset, _) => operation == "write" && offset == 20 * Block
            ? throw new DiskException(DiskError.NoSpace, "full")
            : Task.CompletedTask;
        Receive(Arrived(0, 1), Arrived(20, 1), Arrived(40, 1));
        Assert.Equal([null, DiskError.NoSpace, null], _ended.Select(e => e.Failure?.Error));
        Assert.Equal(DiskError.NoSpace, Assert.Single(_failures).Error);
        Assert.Equal(2, _map.Count(BlockState.Fetched));
    }

    [Fact]
    public void A_failure_of_the_map_fails_the_round()
    {
        _mapFile.Failure = new DiskException(DiskError.Io, "bad medium");
        Receive(Arrived(0, 1), Arrived(20, 1));
        Assert.All(_ended, e => Assert.Equal(DiskError.Io, e.Failure?.Error));
        Assert.Equal(2, _failures.Count);
    }

    [Fact]
    public async Task A_step_is_made_durable_after_16_MiB_and_only_fetchers_wait_for_the_second_one()
    {
        int flushes = 0;
        var hold = new TaskCompletionSource();
        _flush = () =>
        {
            Interlocked.Increment(ref flushes);
            return new ValueTask(hold.Task);
        };
        for (int i = 0; i < 31; i++)
        {
            Receive(Arrived(i * 256, 256));
            Assert.Null(_store.StepToWaitFor());
        }

        Wait.Until(() => Volatile.Read(ref flushes) == 1, "the first step has begun");
        Receive(Arrived(31 * 256, 256));
        Task? step = _store.StepToWaitFor();
        Assert.NotNull(step);
        hold.SetResult();
        await step.WaitAsync(TimeSpan.FromSeconds(20), TestContext.Current.CancellationToken);
        Wait.Until(() => Volatile.Read(ref flushes) == 2 && _store.StepToWaitFor() is null, "the second step follows");
    }

    [Fact]
    public void The_end_gives_up_what_is_left_and_what_comes_later()
    {
        _store.Add(Arrived(0, 1));
        var stopping = new Thread(_store.Stop);
        stopping.Start();
        Wait.UntilBlocked(stopping, "it waits"); // a thread is about to store
        RunLater();
        Assert.True(stopping.Join(20_000));
        Receive(Arrived(5, 1));
        Assert.Equal(2, _ended.Count);
        Assert.All(_ended, e => Assert.NotNull(e.Failure));
        Assert.Equal(0, _map.Count(BlockState.Fetched));
        Assert.Empty(_failures); // nobody is told of what was given up
    }
}
