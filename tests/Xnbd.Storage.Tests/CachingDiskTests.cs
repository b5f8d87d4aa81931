using Microsoft.Win32.SafeHandles;
using Xnbd.Storage.Cache;
using Xnbd.Storage.Images;
using Xnbd.Storage.Maps;
using Xnbd.Storage.Threads;
using Xnbd.TestKit;

namespace Xnbd.Storage.Tests;

/// <summary>The cache of a far disk: what is fetched, when, and what never waits or is overwritten.</summary>
public sealed class CachingDiskTests : IDisposable
{
    private const int Block = BlockRange.BlockSize;
    private const int Length = (16 << 20) + 1234;

    private readonly TempFolder _folder = new();
    private readonly byte[] _bytes = new byte[Length];
    private readonly MemoryDisk _memory = new(Length);
    private readonly FaultDisk _origin;
    private readonly List<(long Offset, long Length)> _asked = []; // of the origin
    private readonly List<DiskException> _notStored = [];
    private SafeFileHandle? _mapFile;

    public CachingDiskTests()
    {
        new Random(1).NextBytes(_bytes);
        _memory.TryWrite(0, _bytes);
        _origin = new FaultDisk(_memory) { Slow = true, Before = Ask };
    }

    public void Dispose()
    {
        _mapFile?.Dispose();
        _folder.Dispose();
    }

    private Task Ask(string operation, long offset, long length)
    {
        if (operation == "extents")
            return Task.CompletedTask; // reads only
        lock (_asked)
            _asked.Add((offset, length));
        return Task.CompletedTask;
    }

    /// <summary>The origin answers nothing before this task ends.</summary>
    private void Hold(Task until) => _origin.Before = async (operation, offset, length) =>
    {
        await Ask(operation, offset, length);
        await until;
    };

    private List<(long Offset, long Length)> Asked
    {
        get
        {
            lock (_asked)
                return [.. _asked];
        }
    }

    private CachingDisk Open(
        Func<Disk, Disk>? local = null, int requests = 64, long bytes = 32 << 20, Action<IDiskWork>? storeLater = null)
    {
        (ImageFile image, BlockMap map, _mapFile) = CacheFiles.Open(
            _folder.File("image"), _folder.File("map"), "origin", Length, CacheOpening.GoOn);
        return new CachingDisk(
            _origin,
            local?.Invoke(image) ?? image,
            map,
            readOnly: false,
            new CacheLimits(requests, bytes),
            CannotStore,
            storeLater);

        void CannotStore(DiskException failure)
        {
            lock (_notStored)
                _notStored.Add(failure);
        }
    }

    /// <summary>
    /// A comparison, and the samples by which a server is recognized, rely on what counts as fetched.
    /// </summary>
    [Theory]
    [InlineData("write")]
    [InlineData("partial write")]
    [InlineData("zero")]
    [InlineData("trim")]
    public async Task A_block_that_a_failed_write_may_have_changed_does_not_count_as_fetched(string what)
    {
        FaultDisk? file = null;
        using CachingDisk disk = Open(image => file = new FaultDisk(image));
        Assert.Equal(_bytes[..8192], await Read(disk, 0, 8192));
        await disk.FlushAll();
        Assert.True(disk.Map.IsAll(new BlockRange(0, 2), BlockState.Fetched));
        file!.Before = (operation, _, _)
            => operation == "read" ? Task.CompletedTask : throw new DiskException(DiskError.NoSpace, "full");
        await Assert.ThrowsAsync<DiskException>(async () =>
        {
            byte[] data = new byte[what == "write" ? 8192 : 5000];
            if (what == "zero")
                await disk.ZeroAsync(0, 8192, ZeroMode.None, durable: false);
            else if (what == "trim")
                await disk.TrimAsync(0, 8192, durable: false);
            else if (!disk.TryWrite(0, data))
                await disk.WriteAsync(0, data, durable: false);
        });
        Assert.True(disk.Map.IsAll(new BlockRange(0, 2), BlockState.Written));
    }

    [Fact]
    public async Task What_is_being_fetched_is_drawn_and_the_wait_of_a_miss_is_counted()
    {
        using CachingDisk disk = Open();
        var answer = new TaskCompletionSource();
        Hold(answer.Task);
        Assert.Equal(new string('.', 4), disk.DrawMap(4));
        Task<byte[]> miss = Read(disk, 0, 4096);
        Wait.Until(() => Asked.Count == 1, "the origin is asked");
        Assert.Equal("*...", disk.DrawMap(4));
        Assert.Empty(disk.MissLatency);
        await Task.Delay(20);
        answer.SetResult();
        await miss;
        await disk.WaitUntilStored();
        Assert.Equal("f...", disk.DrawMap(4));
        LatencyBucket counted = Assert.Single(disk.MissLatency);
        Assert.Equal(1, counted.Count);
        Assert.InRange(counted.MaxMicroseconds, 20_000, 60_000_000);
        await Read(disk, 0, 4096); // a hit
        Assert.Equal(counted, Assert.Single(disk.MissLatency));

        // A miss of several fetches counts once; one that fails, not at all.
        await Read(disk, 4 << 20, 2 * Fetch.MaxBytes);
        Assert.Equal(2, disk.MissLatency.Sum(bucket => bucket.Count));
        _origin.Before = (_, _, _) => throw new DiskException(DiskError.Io, "broken");
        await Assert.ThrowsAsync<DiskException>(() => Read(disk, 8 << 20, 4096));
        Assert.Equal(2, disk.MissLatency.Sum(bucket => bucket.Count));
    }

    /// <summary>The file takes nothing before this is set.</summary>
    private static FaultDisk HoldWrites(Disk image, ManualResetEventSlim until)
        => new(image)
        {
            Before = (operation, _, _) =>
            {
                if (operation == "write")
                    until.Wait();
                return Task.CompletedTask;
            },
        };

    /// <summary>Lets the file go on when a test has failed, since the disk waits for it at its end.</summary>
    private sealed class Release(ManualResetEventSlim hold) : IDisposable
    {
        public void Dispose() => hold.Set();
    }

    private static Task<byte[]> Read(CachingDisk disk, long offset, int length)
    {
        byte[] buffer = new byte[length];
        return Read();

        async Task<byte[]> Read()
        {
            if (!disk.TryRead(offset, buffer))
                await disk.ReadAsync(offset, buffer);
            await Task.Yield(); // a test may block; the thread that brought the data must not
            return buffer;
        }
    }

    private static async Task<T> Soon<T>(Task<T> task) => await task.WaitAsync(TimeSpan.FromSeconds(20));

    private static async Task Soon(ValueTask task)
    {
        await task.AsTask().WaitAsync(TimeSpan.FromSeconds(20));
        await Task.Yield();
    }

    private byte[] Expected(long offset, int length) => _bytes.AsSpan((int)offset, length).ToArray();

    private static void WaitUntilStored(CachingDisk disk, long blocks)
        => Wait.Until(() => disk.Statistics.FetchedBlocks >= blocks, $"{blocks} blocks are stored");

    [Fact]
    public async Task A_block_is_fetched_once_however_many_ask()
    {
        using CachingDisk disk = Open();
        var hold = new TaskCompletionSource();
        Hold(hold.Task);
        Task<byte[]>[] reads = [.. Enumerable.Range(0, 50).Select(
            i => Task.Run(() => Read(disk, (100 * Block) + (i * 70), 500)))];
        Wait.Until(() => Asked.Count > 0, "the origin is asked");
        hold.SetResult();
        for (int i = 0; i < 50; i++)
            Assert.Equal(Expected((100 * Block) + (i * 70), 500), await Soon(reads[i]));
        Assert.Equal([(100L * Block, Block)], Asked);
        WaitUntilStored(disk, 1);
        Assert.Equal(Expected(100 * Block, Block), await Read(disk, 100 * Block, Block));
        Assert.Single(Asked);
    }

    [Fact]
    public async Task Neighbouring_misses_go_out_as_one_request()
    {
        using CachingDisk disk = Open();
        var reads = new List<(int Block, Task<byte[]> Task)>();
        DeferredWork.Begin(); // as a session does, while it works off what one receive brought
        foreach (int block in (int[])[500, 502, 501, 499, 700, 503])
            reads.Add((block, Read(disk, (long)block * Block, Block)));
        Assert.Empty(Asked);
        DeferredWork.End();
        foreach ((int block, Task<byte[]> task) in reads)
            Assert.Equal(Expected((long)block * Block, Block), await Soon(task));

        // 501 came after 500 and 502, and went with the former.
        Assert.Equal([(499L * Block, 3L * Block), (502L * Block, 2L * Block), (700L * Block, Block)], Asked.Order());

    }

    [Fact]
    public async Task Neighbouring_misses_of_more_than_a_MiB_go_out_as_requests_of_a_MiB()
    {
        // No other fetch goes before: the thread on which one ends sends what has been gathered by then.
        using CachingDisk disk = Open();
        var reads = new List<(int Block, Task<byte[]> Task)>();
        DeferredWork.Begin();
        for (int block = 1500; block > 1500 - 300; block--) // downwards: nobody takes it for a stream
            reads.Add((block, Read(disk, (long)block * Block, Block)));
        DeferredWork.End();
        foreach ((int block, Task<byte[]> task) in reads)
            Assert.Equal(Expected((long)block * Block, Block), await Soon(task));
        Assert.Equal([(1201L * Block, 44L * Block), (1245L * Block, 256L * Block)], Asked.Order());
    }

    [Fact]
    public async Task A_write_whose_client_leaves_lets_the_next_writer_in_and_changes_nothing()
    {
        using CachingDisk disk = Open();
        var hold = new TaskCompletionSource();
        Hold(hold.Task);
        using CancellationTokenSource first = new(), second = new();
        Task fetching = disk.WriteAsync(10, new byte[] { 1, 2, 3 }, durable: false, first.Token).AsTask();
        Task waiting = disk.WriteAsync(20, new byte[] { 4, 5, 6 }, durable: false, second.Token).AsTask();
        Task zeroing = disk.ZeroAsync(30, 8, ZeroMode.MayPunch, durable: false, second.Token).AsTask();
        Task prefetching = disk.PrefetchAsync(0, 3 << 20, second.Token).AsTask();
        Task staying = disk.WriteAsync(40, new byte[] { 7, 8, 9 }, durable: false).AsTask();
        second.Cancel();
        foreach (Task left in (Task[])[waiting, zeroing, prefetching])
            await Assert.ThrowsAnyAsync<OperationCanceledException>(() => Soon(new ValueTask(left)));
        Assert.False(fetching.IsCompleted);
        first.Cancel();
        await Assert.ThrowsAnyAsync<OperationCanceledException>(() => Soon(new ValueTask(fetching)));
        Assert.False(staying.IsCompleted);
        hold.SetResult();
        await Soon(new ValueTask(staying));
        byte[] expected = Expected(0, 2 * Block);
        ((byte[])[7, 8, 9]).CopyTo(expected, 40);
        Assert.Equal(expected, await Soon(Read(disk, 0, 2 * Block)));
    }

    [Fact]
    public async Task Only_what_is_absent_is_far()
    {
        using CachingDisk disk = Open();
        await Read(disk, 0, 2 * Block);
        await disk.FlushAll();
        await disk.WaitUntilStored();
        Assert.False(disk.IsFar(100, 2 * Block - 100, isWrite: false));
        Assert.True(disk.IsFar(100, 2 * Block, isWrite: false));
        Assert.False(disk.IsFar(100, 3 * Block - 100, isWrite: true)); // the absent block is written as a whole
        Assert.True(disk.IsFar(100, 2 * Block, isWrite: true));
        Assert.True(disk.IsFar((10 * Block) - 1, 1, isWrite: true));
        Assert.False(disk.IsFar(Length - (Length % Block), Length % Block, isWrite: true)); // a short last block
    }

    [Fact]
    public async Task A_write_is_not_overwritten_by_a_fetch_that_started_earlier()
    {
        using CachingDisk disk = Open();
        var hold = new TaskCompletionSource();
        Hold(hold.Task);
        Task<byte[]> early = Read(disk, 0, 8 * Block);
        byte[] whole = new byte[2 * Block];
        whole.AsSpan().Fill(7);
        await Soon(disk.WriteAsync(2 * Block, whole, durable: true)); // whole blocks wait for nobody
        await Soon(disk.ZeroAsync(5 * Block, Block, ZeroMode.MayPunch, durable: false));
        await Soon(disk.TrimAsync(6 * Block, Block, durable: false));
        // Waits for the rest of its block.
        ValueTask partial = disk.WriteAsync((7 * Block) + 10, new byte[] { 1, 2, 3 }, durable: false);
        Assert.False(partial.IsCompleted);
        hold.SetResult();
        await Soon(early);
        await Soon(partial);

        byte[] model = Expected(0, 8 * Block);
        whole.CopyTo(model, 2 * Block);
        model.AsSpan(5 * Block, 2 * Block).Clear();
        ((byte[])[1, 2, 3]).CopyTo(model, (7 * Block) + 10);
        Wait.Until(() => disk.Statistics.AbsentBlocks == BlockRange.CountOf(Length) - 8, "the rest is stored");
        Assert.Equal(model, await Read(disk, 0, 8 * Block));
        Assert.Equal(3, disk.Statistics.FetchedBlocks);
        Assert.Equal([(0L, 8L * Block)], Asked);
    }

    [Fact]
    public async Task What_is_local_waits_for_no_miss()
    {
        using CachingDisk disk = Open(requests: 2);
        await Read(disk, 0, 4 * Block);
        WaitUntilStored(disk, 4);
        var hold = new TaskCompletionSource();
        Hold(hold.Task);
        Task<byte[]>[] misses = [.. Enumerable.Range(0, 20).Select(i => Read(disk, (100 + (2 * i)) * Block, Block))];
        byte[] buffer = new byte[4 * Block];
        Assert.True(disk.TryRead(0, buffer));
        Assert.Equal(Expected(0, 4 * Block), buffer);
        Assert.True(disk.TryWrite(Block, new byte[Block]));
        await Soon(disk.FlushAsync());
        Assert.Equal(2, disk.Statistics.FetchesInFlight);
        Assert.DoesNotContain(misses, task => task.IsCompleted);
        hold.SetResult();
        await Task.WhenAll(misses).WaitAsync(TimeSpan.FromSeconds(20));
    }

    [Fact]
    public async Task No_reader_waits_for_the_file()
    {
        using var writing = new ManualResetEventSlim();
        using CachingDisk disk = Open(image => HoldWrites(image, writing));
        using var release = new Release(writing);
        Assert.Equal(Expected(0, Block), await Soon(Read(disk, 0, Block)));
        Assert.Equal(Expected(40 * Block, Block), await Soon(Read(disk, 40 * Block, Block)));
        Assert.Equal(Expected(0, Block), await Soon(Read(disk, 0, Block))); // of memory, while it is being stored
        Assert.Equal(2, Asked.Count);
        Assert.Equal(0, disk.Statistics.FetchedBlocks);
        writing.Set();
        WaitUntilStored(disk, 2);
    }

    [Fact]
    public async Task A_random_reader_is_not_read_ahead_of_and_a_sequential_one_is_within_bounds()
    {
        using (CachingDisk disk = Open())
        {
            var random = new Random(5);
            var touched = new HashSet<long>();
            for (int i = 0; i < 1000; i++)
            {
                long block = random.Next(Length / Block);
                touched.Add(block);
                await Soon(Read(disk, block * Block, Block));
            }

            Assert.InRange(disk.Statistics.FetchedBytes, touched.Count * Block, (long)(touched.Count * Block * 1.2));
            _mapFile!.Dispose();
            _mapFile = null;
        }

        File.Delete(_folder.File("image"));
        File.Delete(_folder.File("map"));
        lock (_asked)
            _asked.Clear();
        // At once: nobody is read ahead of while much is to be stored.
        using CachingDisk fresh = Open(storeLater: work => work.Run());
        const int read = 4 << 20;
        for (int offset = 0; offset < read; offset += Block)
            Assert.Equal(Expected(offset, Block), await Soon(Read(fresh, offset, Block)));
        Wait.Until(() => fresh.Statistics.FetchesInFlight == 0, "nothing is under way");
        Assert.InRange(Asked.Count, 1, 64); // not a thousand
        Assert.InRange(fresh.Statistics.FetchedBytes, read, read + (4 << 20) + (256 * Block));
    }

    [Fact]
    public async Task A_failing_origin_fails_those_who_need_it_and_is_asked_again()
    {
        using CachingDisk disk = Open();
        _origin.Before = (_, offset, _)
            => offset == 8 * Block ? throw new DiskException(DiskError.Io, "the line is down") : Task.CompletedTask;
        Task<byte[]> bad = Read(disk, 8 * Block, Block), good = Read(disk, 30 * Block, Block);
        Assert.Contains(
            "the line is down", (await Assert.ThrowsAsync<DiskException>(() => bad)).Message, StringComparison.Ordinal);
        Assert.Equal(Expected(30 * Block, Block), await Soon(good));
        await Assert.ThrowsAsync<DiskException>(
            () => disk.WriteAsync(8 * Block, new byte[100], durable: false).AsTask());
        await Soon(disk.WriteAsync(9 * Block, new byte[Block], durable: true));
        await Assert.ThrowsAsync<DiskException>(() => disk.CacheAll(1, 4, CancellationToken.None));
        _origin.Before = Ask;
        // The write that failed has changed nothing.
        Assert.Equal(Expected(8 * Block, Block), await Soon(Read(disk, 8 * Block, Block)));
        await disk.CacheAll(256, 4, CancellationToken.None);
        Assert.Equal(0, disk.Statistics.AbsentBlocks);
        Assert.Empty(_notStored);
    }

    [Fact]
    public async Task A_bad_sector_fails_only_those_who_need_it()
    {
        using CachingDisk disk = Open();
        _origin.Before = (_, offset, length) => offset <= 50 * Block && offset + length > 50 * Block
            ? throw new DiskException(DiskError.Io, "a bad sector")
            : Ask("read", offset, length);
        var reads = new List<(int Block, Task<byte[]> Task)>();
        DeferredWork.Begin();
        foreach (int block in (int[])[48, 49, 50, 51])
            reads.Add((block, Read(disk, (long)block * Block, Block)));
        DeferredWork.End();
        foreach ((int block, Task<byte[]> task) in reads)
        {
            if (block == 50)
                await Assert.ThrowsAsync<DiskException>(() => Soon(task));
            else
                Assert.Equal(Expected((long)block * Block, Block), await Soon(task));
        }

        for (int block = 0; block < 80; block++) // and of what is read ahead
        {
            if (block != 50)
                Assert.Equal(Expected((long)block * Block, Block), await Soon(Read(disk, (long)block * Block, Block)));
        }
    }

    /// <summary>The file takes nothing. What was fetched fills the room, and then no more is fetched.</summary>
    [Fact]
    public async Task What_is_fetched_and_not_stored_is_bounded()
    {
        const long most = 2 << 20;
        using var writing = new ManualResetEventSlim();
        using CachingDisk disk = Open(image => HoldWrites(image, writing), bytes: most);
        using var release = new Release(writing);
        Task<byte[]>[] reads = [.. Enumerable.Range(0, 64).Select(i => Read(disk, i * 50L * Block, 16 * Block))];
        Wait.Until(() => Asked.Sum(r => r.Length) > most - (16 * Block), "the room is taken");
        Assert.True(
            reads.Count(r => r.IsCompleted) is var completed and < 64 && completed * 16 * Block <= most,
            "more is held than there is room for");
        writing.Set();
        for (int i = 0; i < reads.Length; i++)
            Assert.Equal(Expected(i * 50L * Block, 16 * Block), await Soon(reads[i]));
        WaitUntilStored(disk, 64 * 16);
    }

    /// <summary>
    /// Storing waits for a writer, who waits for a fetch, for which there is room only after storing: unless what waits
    /// for a writer does not count.
    /// </summary>
    [Fact]
    public async Task Writers_and_storing_do_not_wait_for_each_other()
    {
        using CachingDisk disk = Open(requests: 1, bytes: Fetch.MaxBytes);
        for (int round = 0; round < 15; round++)
        {
            long at = round * 258L * Block;
            var hold = new TaskCompletionSource();
            Hold(hold.Task);
            Task<byte[]> all = Read(disk, at, 256 * Block); // all of the room
            // Holds its last block, and needs one behind.
            ValueTask writer = disk.WriteAsync(at + (255 * Block) + 1, new byte[2 * Block], durable: false);
            hold.SetResult();
            await Soon(writer);
            Assert.Equal(Expected(at, 255 * Block), (await Soon(all))[..(255 * Block)]);
            Wait.Until(
                () => disk.Statistics.AbsentBlocks <= BlockRange.CountOf(Length) - ((round + 1) * 258),
                "all is stored");
        }
    }

    /// <summary>
    /// Writers that are stuck hold a block in each MiB that is read: the rest of those MiBs must not fill the memory.
    /// </summary>
    [Fact]
    public async Task What_waits_for_writers_is_bounded_too_and_fetched_again()
    {
        const int most = 1 << 20, writers = 15;
        using var writing = new ManualResetEventSlim();
        using var started = new CountdownEvent(writers);
        using CachingDisk disk = Open(image => new FaultDisk(image)
        {
            Before = (operation, _, length) =>
            {
                if (operation == "write" && length == Block && !writing.IsSet) // of the clients'
                {
                    started.Signal();
                    writing.Wait();
                }

                return Task.CompletedTask;
            },
        }, bytes: most);
        using var release = new Release(writing);
        byte[] ones = [.. Enumerable.Repeat((byte)1, Block)];
        Task[] writes = [.. Enumerable.Range(0, writers).Select(i => Task.Factory.StartNew(
            () => disk.WriteAsync((i << 20) + (512 << 10), ones, durable: false).AsTask().GetAwaiter().GetResult(),
            TestContext.Current.CancellationToken,
            TaskCreationOptions.LongRunning,
            TaskScheduler.Default))];
        started.Wait(TestContext.Current.CancellationToken); // they hold their blocks
        for (int i = 0; i < writers; i++)
            Assert.Equal(Expected(i << 20, 1 << 20), await Soon(Read(disk, i << 20, 1 << 20)));
        Task caching = disk.CacheAll(256, 4, CancellationToken.None);
        await Task.Delay(100, TestContext.Current.CancellationToken);
        writing.Set();
        await Task.WhenAll(writes);
        await caching.WaitAsync(TimeSpan.FromSeconds(20), TestContext.Current.CancellationToken);
        for (int i = 0; i < writers; i++)
            ones.CopyTo(_bytes, (i << 20) + (512 << 10));
        Assert.Equal(0, disk.Statistics.AbsentBlocks);
        Assert.Equal(_bytes, await Soon(Read(disk, 0, Length)));
    }

    /// <summary>The kernel drops what it cannot write, and says so once.</summary>
    [Fact]
    public async Task After_a_failed_sync_and_a_new_start_what_was_not_durable_is_fetched_again()
    {
        using (CachingDisk disk = Open(image => new FaultDisk(image)
        {
            Before = (operation, _, _)
                => operation == "flush" ? throw new DiskException(DiskError.Io, "bad medium") : Task.CompletedTask,
        }))
        {
            await disk.CacheAll(256, 4, CancellationToken.None);
            await Assert.ThrowsAsync<DiskException>(() => disk.FlushAll().AsTask());
        }

        Linux.LinuxFile.Unlock(_mapFile!);
        _mapFile!.Dispose();
        File.WriteAllBytes(_folder.File("image"), new byte[Length]); // what the medium has
        using CachingDisk again = Open();
        Assert.Equal(_bytes, await Soon(Read(again, 0, Length)));
    }

    [Fact]
    public async Task Zeroes_of_the_origin_take_no_space()
    {
        byte[] zeroes = new byte[8 << 20];
        _memory.TryWrite(1 << 20, zeroes);
        zeroes.CopyTo(_bytes, 1 << 20);
        string image = _folder.File("image");
        using CachingDisk disk = Open();
        await disk.CacheAll(256, 8, CancellationToken.None);
        Assert.Equal(_bytes, await Soon(Read(disk, 0, Length)));
        Assert.Equal(BlockRange.CountOf(Length), disk.Statistics.FetchedBlocks);
        Assert.InRange(
            long.Parse((await Tool.Succeed("stat", "-c", "%b", image)).Trim(), null) * 512,
            Length - (9 << 20),
            Length - (7 << 20));
        var extents = new ExtentList(2);
        await disk.GetExtentsAsync(0, Length, extents);
        Assert.Equal([new(1 << 20, false, 1), new(8 << 20, true, 1)], extents.Extents);
    }

    /// <summary>A fetch at each moment of its life: waiting for room, sent, being stored, stored.</summary>
    [Fact]
    public async Task An_origin_that_has_changed_is_asked_anew()
    {
        const int stored = 0, storing = 300, asked = 600, waiting = 900;
        using var writing = new ManualResetEventSlim(initialState: true);
        using var isStoring = new ManualResetEventSlim();
        using CachingDisk disk = Open(image => new FaultDisk(HoldWrites(image, writing))
        {
            Before = (operation, offset, _) =>
            {
                if (operation == "write" && offset == storing * Block)
                    isStoring.Set();
                return Task.CompletedTask;
            },
        }, requests: 1);
        using var release = new Release(writing);
        var hold = new TaskCompletionSource();
        await Soon(Read(disk, stored * Block, 2 * Block));
        WaitUntilStored(disk, 2);
        writing.Reset();
        await Soon(Read(disk, storing * Block, Block));
        Assert.True(isStoring.Wait(TimeSpan.FromSeconds(20), TestContext.Current.CancellationToken));
        using var isRead = new ManualResetEventSlim();
        _origin.After = (_, offset, _) =>
        {
            isRead.Set();
            return offset == asked * Block ? hold.Task : Task.CompletedTask;
        };
        byte[] before = Expected(asked * Block, Block);
        Task<byte[]> early = Read(disk, asked * Block, Block), late = Read(disk, waiting * Block, Block);
        Assert.True(isRead.Wait(TimeSpan.FromSeconds(20), TestContext.Current.CancellationToken));

        _origin.After = null;
        foreach (int block in (int[])[stored, storing, asked, waiting])
        {
            new Random(block).NextBytes(_bytes.AsSpan(block * Block, Block));
            _memory.TryWrite(block * Block, Expected(block * Block, Block));
        }

        int asksBefore = Asked.Count;
        Task invalidating = disk.Invalidate();
        Wait.Until(() => Asked.Count > asksBefore, "the origin is asked whether it is there");
        Assert.Equal((0L, (long)Block), Asked[^1]);
        await Task.Delay(50, TestContext.Current.CancellationToken);
        Assert.False(invalidating.IsCompleted); // for something old is being stored
        writing.Set();
        await invalidating.WaitAsync(TimeSpan.FromSeconds(20), TestContext.Current.CancellationToken);
        Assert.Equal(0, disk.Statistics.FetchedBlocks);
        Task<byte[]> anew = Read(disk, asked * Block, Block);
        hold.SetResult();
        Assert.Equal(before, await Soon(early));
        foreach (int block in (int[])[stored, storing, asked, waiting])
            Assert.Equal(Expected(block * Block, Block), await Soon(Read(disk, block * Block, Block)));
        Assert.Equal(Expected(asked * Block, Block), await Soon(anew));
        Assert.Equal(Expected(waiting * Block, Block), await Soon(late)); // it was asked for afterwards
        WaitUntilStored(disk, 4);
        foreach (int block in (int[])[stored, storing, asked, waiting])
            Assert.Equal(Expected(block * Block, Block), await Soon(Read(disk, block * Block, Block)));
    }

    [Fact]
    public async Task What_was_fetched_is_not_given_up_while_the_origin_is_away()
    {
        using CachingDisk disk = Open();
        await Soon(Read(disk, 0, 4 * Block));
        WaitUntilStored(disk, 4);
        _origin.Before = (_, _, _) => throw new DiskException(DiskError.Io, "the line is down");
        await Assert.ThrowsAsync<DiskException>(disk.Invalidate);
        Assert.Equal(Expected(0, 4 * Block), await Soon(Read(disk, 0, 4 * Block)));
    }

    /// <summary>A target does not note what it writes, and may write where something was fetched.</summary>
    [Fact]
    public async Task What_was_written_after_a_switch_is_not_given_up()
    {
        using (OriginCache cache = OpenCache())
        {
            await cache.CacheAll(256, CancellationToken.None);
            cache.Switch(force: false);
            await Soon(cache.Disk.WriteAsync(0, new byte[Block], durable: true));
        }

        using OriginCache again = OpenCache();
        Assert.Equal(0, again.Statistics.WrittenBlocks);
        Assert.Equal(Remedy.ClearMap, Assert.Throws<DiskException>(again.Invalidate).Remedy);
        byte[] seen = new byte[Block];
        await Soon(again.Disk.ReadAsync(0, seen));
        Assert.Equal(new byte[Block], seen);

        OriginCache OpenCache() => OriginCache.Open(
            _origin,
            ["origin"],
            _folder.File("image"),
            _folder.File("map"),
            CacheOpening.GoOn,
            readOnly: false,
            new CacheLimits(64, 32 << 20),
            _notStored.Add);
    }

    /// <summary>
    /// The map of a large disk is looked at once, not once for each part of it: the switch does so while clients wait.
    /// </summary>
    [Fact]
    public async Task The_time_of_a_switch_grows_with_the_disk_and_not_with_its_square()
    {
        const long length = 1L << 40;
        BlockMap map = MemoryMap.Create(length);
        map.SetFetched(new BlockRange(0, map.BlockCount));
        using var disk = new CachingDisk(
            _origin, new MemoryDisk(0), map, readOnly: false, new CacheLimits(64, 32 << 20), _notStored.Add);
        // A quarter of a second; else minutes.
        await disk.Materialize(giveUpAbsent: false, CancellationToken.None).WaitAsync(
            TimeSpan.FromSeconds(20), TestContext.Current.CancellationToken);
        await disk.CacheAll(256, 4, CancellationToken.None).WaitAsync(
            TimeSpan.FromSeconds(20), TestContext.Current.CancellationToken);
    }

    [Fact]
    public async Task What_was_written_is_not_mixed_with_other_contents_of_the_origin()
    {
        using CachingDisk disk = Open();
        await Soon(Read(disk, 0, 4 * Block));
        WaitUntilStored(disk, 4);
        await Soon(disk.ZeroAsync(8 * Block, Block, ZeroMode.MayPunch, durable: false));
        Assert.Contains(
            "1 blocks were written here",
            (await Assert.ThrowsAsync<DiskException>(disk.Invalidate)).Message,
            StringComparison.Ordinal);
        Assert.Equal((4, 1), (disk.Statistics.FetchedBlocks, disk.Statistics.WrittenBlocks));
    }

    /// <summary>
    /// Of zeroes at both ends, of some between parts of blocks, around what was written, and of a few only, which are
    /// fetched.
    /// </summary>
    [Fact]
    public async Task Zeroes_that_the_origin_knows_of_are_not_fetched()
    {
        (int Start, int Length)[] zeroes =
        [
            (0, 1 << 20),
            ((2 << 20) + 100, 1 << 20),
            (5 << 20, 8192),
            (6 << 20, 4 << 20),
            (Length - (1 << 20), 1 << 20),
        ];
        foreach ((int start, int length) in zeroes)
            _bytes.AsSpan(start, length).Clear();
        _memory.TryWrite(0, _bytes);
        _origin.Extents = (offset, length, extents) =>
        {
            long end = Math.Min(offset + length, offset + (7 << 20)); // a part of the answer at a time
            while (offset < end)
            {
                bool isZero = zeroes.Any(z => z.Start <= offset && offset < z.Start + z.Length);
                IEnumerable<int> ends = zeroes.SelectMany(z => (int[])[z.Start, z.Start + z.Length]);
                long next = ends.Where(at => at > offset).Append(Length).Min();
                extents.Add(Math.Min(next, end) - offset, isZero);
                offset = next;
            }
        };
        using CachingDisk disk = Open();
        // A part of a block: it is fetched for that.
        await Soon(disk.WriteAsync((7 << 20) + 5, new byte[] { 1, 2, 3 }, durable: false));
        ((byte[])[1, 2, 3]).CopyTo(_bytes, (7 << 20) + 5);
        await Soon(Read(disk, 8 << 20, Block));
        lock (_asked)
            _asked.Clear();
        await disk.CacheAll(256, 4, CancellationToken.None);
        Assert.Equal((0, 1), (disk.Statistics.AbsentBlocks, disk.Statistics.WrittenBlocks));
        Assert.Equal(_bytes, await Soon(Read(disk, 0, Length)));
        long data = Length - (7 << 20); // all but the long zeroes
        Assert.InRange(Asked.Sum(r => r.Length), data, data + (8 * Block));
        await disk.FlushAll();
        long taken = long.Parse((await Tool.Succeed("stat", "-c", "%b", _folder.File("image"))).Trim(), null) * 512;
        Assert.InRange(taken, data - (8 * Block), data + (16 * Block));
    }

    [Fact]
    public async Task What_the_origin_said_of_zeroes_before_it_changed_is_forgotten()
    {
        var hold = new TaskCompletionSource();
        using var isAsked = new ManualResetEventSlim();
        _origin.Extents = (_, length, extents) => extents.Add(length, isHole: true);
        _origin.After = (operation, _, _) =>
        {
            if (operation != "extents")
                return Task.CompletedTask;
            isAsked.Set();
            return hold.Task;
        };
        using CachingDisk disk = Open();
        Task caching = disk.CacheAll(256, 4, CancellationToken.None);
        Assert.True(isAsked.Wait(TimeSpan.FromSeconds(20), TestContext.Current.CancellationToken));
        await disk.Invalidate();
        hold.SetResult();
        await caching.WaitAsync(TimeSpan.FromSeconds(20), TestContext.Current.CancellationToken);
        Assert.Equal(0, disk.Statistics.FetchedBlocks);
        Assert.Equal(_bytes, await Soon(Read(disk, 0, Length)));
    }

    /// <summary>A client's flush must not have to write all that was fetched.</summary>
    [Fact]
    public async Task What_is_fetched_is_made_durable_in_steps_for_which_no_reader_waits()
    {
        const int length = 80 << 20;
        var memory = new MemoryDisk(length);
        memory.TryWrite(0, [.. Enumerable.Repeat((byte)1, length)]);
        (ImageFile image, BlockMap map, _mapFile) = CacheFiles.Open(
            _folder.File("image"), _folder.File("map"), "origin", length, CacheOpening.GoOn);
        using var flushing = new ManualResetEventSlim();
        using var release = new Release(flushing);
        var local = new FaultDisk(image);
        using var disk = new CachingDisk(
            new FaultDisk(memory) { Slow = true },
            local,
            map,
            readOnly: false,
            new CacheLimits(64, 32 << 20),
            _notStored.Add);
        long unsynced = 0, mostUnsynced = 0;
        local.Before = (operation, _, count) =>
        {
            if (operation == "write")
                mostUnsynced = Math.Max(mostUnsynced, Interlocked.Add(ref unsynced, count));
            if (operation == "flush")
                Interlocked.Exchange(ref unsynced, 0);
            return Task.CompletedTask;
        };
        local.After = (operation, _, _) =>
        {
            if (operation == "flush")
                flushing.Wait(TimeSpan.FromSeconds(20));
            return Task.CompletedTask;
        };
        Task caching = disk.CacheAll(256, 16, CancellationToken.None);
        byte[] buffer = new byte[1 << 20];
        for (int offset = 0; offset < length; offset += buffer.Length)
            Assert.Equal(1, (await Soon(Read(disk, offset, buffer.Length)))[^1]);
        WaitUntilStored(disk, map.BlockCount);
        Assert.False(caching.IsCompleted); // it waits for the second step
        flushing.Set();
        await caching.WaitAsync(TimeSpan.FromSeconds(20), TestContext.Current.CancellationToken);
        Assert.InRange(local.Syncs, 1, 10);

        // And a copy that nobody disturbs never has more under way than two steps, and what it has asked for.
        await disk.Invalidate();
        mostUnsynced = 0;
        await disk.CacheAll(256, 16, CancellationToken.None).WaitAsync(
            TimeSpan.FromSeconds(20), TestContext.Current.CancellationToken);
        Assert.InRange(mostUnsynced, 1 << 20, 48 << 20);
    }

    /// <summary>A part of an absent block cannot be zeroed fast: the rest would have to be fetched.</summary>
    [Fact]
    public async Task Fast_zeroes_fetch_nothing_and_change_nothing_that_they_refuse()
    {
        using CachingDisk disk = Open();
        Hold(new TaskCompletionSource().Task); // the origin answers nothing
        (long, long)[] ranges =
            [(10, 100), ((8 * Block) + 1, 8 * Block), (8 * Block, (4 * Block) + 1), (Length - 1300, 100)];
        foreach ((long offset, long length) in ranges)
        {
            foreach (ZeroMode mode in (ZeroMode[])[ZeroMode.FastOnly, ZeroMode.FastOnly | ZeroMode.MayPunch])
            {
                var refused = await Assert.ThrowsAsync<DiskException>(
                    () => Soon(disk.ZeroAsync(offset, length, mode, durable: false)));
                Assert.Equal(DiskError.NotSupported, refused.Error);
            }
        }

        Assert.Equal(disk.Map.BlockCount, disk.Statistics.AbsentBlocks);
        Assert.Empty(Asked);
        // Whole blocks are fast.
        await Soon(disk.ZeroAsync(8 * Block, 4 * Block, ZeroMode.FastOnly | ZeroMode.MayPunch, durable: false));
        // So is the end of the disk.
        await Soon(disk.ZeroAsync(Length - 1234, 1234, ZeroMode.FastOnly | ZeroMode.MayPunch, durable: false));
        // So is what is local.
        await Soon(disk.ZeroAsync((8 * Block) + 1, Block, ZeroMode.FastOnly | ZeroMode.MayPunch, durable: false));
        Assert.Empty(Asked);
    }

    /// <summary>
    /// Four clients, each in places of its own, but not in blocks of its own; everything else goes on at the same time.
    /// </summary>
    [Theory]
    [InlineData(1, false)]
    [InlineData(2, true)]
    public async Task Concurrent_clients_and_fetching_all_equal_the_model(int seed, bool isSlowFile)
    {
        const int clients = 4, stripe = 1000;
        byte[] model = [.. _bytes];
        using CachingDisk disk = Open(
            image => isSlowFile ? new FaultDisk(image) { Slow = true } : image, requests: 8, bytes: 2 << 20);
        var seeds = new Random(seed);
        Task[] running = [.. Enumerable.Range(0, clients).Select(client =>
        {
            var random = new Random(seeds.Next());
            return Task.Run(async () =>
            {
                for (int i = 0; i < 1500; i++)
                {
                    int index = (random.Next((Length / stripe / clients) - 1) * clients) + client;
                    int offset = index * stripe, length = random.Next(1, stripe);
                    if (random.Next(3) == 0)
                    {
                        Assert.Equal(model[offset..(offset + length)], await Soon(Read(disk, offset, length)));
                    }
                    else if (random.Next(8) == 0)
                    {
                        await Soon(disk.ZeroAsync(offset, length, ZeroMode.MayPunch, random.Next(10) == 0));
                        model.AsSpan(offset, length).Clear();
                    }
                    else
                    {
                        byte[] data = new byte[length];
                        random.NextBytes(data);
                        if (!disk.TryWrite(offset, data))
                            await Soon(disk.WriteAsync(offset, data, random.Next(30) == 0));
                        data.CopyTo(model, offset);
                    }
                }
            });
        })];
        await disk.CacheAll(seed, 4, CancellationToken.None);
        await Task.WhenAll(running);
        Assert.Equal(0, disk.Statistics.AbsentBlocks);
        Assert.Equal(model, await Soon(Read(disk, 0, Length)));
        Assert.Empty(_notStored);
        await disk.FlushAll();
    }
}
