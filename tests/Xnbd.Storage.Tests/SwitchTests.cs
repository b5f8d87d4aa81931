using Microsoft.Win32.SafeHandles;
using Xnbd.Storage.Cache;
using Xnbd.Storage.Images;
using Xnbd.Storage.Maps;
using Xnbd.TestKit;

namespace Xnbd.Storage.Tests;

/// <summary>A cache becomes the image alone, while clients use it and the origin does its worst.</summary>
public sealed class SwitchTests : IDisposable
{
    private const int Block = BlockRange.BlockSize;
    private const int Length = (16 << 20) + 1234;

    private readonly TempFolder _folder = new();
    private readonly byte[] _bytes = new byte[Length];
    private readonly FaultDisk _origin;
    private readonly TaskCompletionSource _silence = new(); // ends when the origin is closed
    private FaultDisk? _image; // what the cache writes to

    public SwitchTests()
    {
        new Random(1).NextBytes(_bytes);
        var memory = new MemoryDisk(Length);
        memory.TryWrite(0, _bytes);
        _origin = new FaultDisk(memory) { Slow = true };
    }

    public void Dispose()
    {
        _silence.TrySetResult();
        _folder.Dispose();
    }

    private OriginCache Open()
    {
        (ImageFile image, BlockMap map, SafeFileHandle mapFile) = CacheFiles.Open(
            _folder.File("image"), _folder.File("map"), "origin", Length, CacheOpening.GoOn);
        _image = new FaultDisk(image);
        var cache = new CachingDisk(_origin, _image, map, readOnly: false, new CacheLimits(64, 32 << 20), _ => { });
        return new OriginCache(cache, image, mapFile, _origin);
    }

    /// <summary>From now on the origin answers nothing.</summary>
    private void BeSilent() => _origin.Before = (_, _, _) => _silence.Task;

    private static Task Switch(OriginCache cache, bool force) => Task.Run(() => cache.Switch(force));

    private static async Task<byte[]> Read(OriginCache cache, long offset, int length)
    {
        byte[] buffer = new byte[length];
        if (!cache.Disk.TryRead(offset, buffer))
            await cache.Disk.ReadAsync(offset, buffer);
        await Task.Yield(); // a test may block; the thread that completed it must not
        return buffer;
    }

    private static async Task Write(OriginCache cache, long offset, byte[] data, bool durable = false)
    {
        if (durable || !cache.Disk.TryWrite(offset, data))
            await cache.Disk.WriteAsync(offset, data, durable);
        await Task.Yield();
    }

    /// <summary>
    /// The thread that makes connections takes samples, and records the server. A command that waits for a connection
    /// must not keep it from that.
    /// </summary>
    [Fact]
    public async Task Samples_and_the_remotes_address_wait_for_no_command_that_waits_for_the_remote()
    {
        using OriginCache cache = Open();
        await Read(cache, 0, 3 * 4096);
        Wait.Until(() => cache.Statistics.FetchedBlocks >= 3, "it is stored");
        BeSilent();
        Task invalidating = Task.Run(cache.Invalidate);
        Wait.Until(() => cache.Statistics.FetchedBlocks >= 3 && invalidating.Status == TaskStatus.Running, "it runs");
        Assert.NotEmpty((await Soon(Task.Run(cache.TakeSamples))).Blocks);
        await Soon(Task.Run(() => cache.Rebind("another name")));
        _silence.TrySetResult();
        await Soon(invalidating);
    }

    private static Task Soon(Task task) => Soon(task.ContinueWith(
        t => { t.GetAwaiter().GetResult(); return true; },
        CancellationToken.None,
        TaskContinuationOptions.ExecuteSynchronously,
        TaskScheduler.Default));

    /// <exception cref="TimeoutException">Says whether threads were to be had.</exception>
    private static async Task<T> Soon<T>(Task<T> task)
    {
        try
        {
            return await task.WaitAsync(TimeSpan.FromSeconds(20), TestContext.Current.CancellationToken);
        }
        catch (TimeoutException) when (!task.IsCompleted)
        {
            long before = ThreadPool.CompletedWorkItemCount;
            await Task.Delay(1000, TestContext.Current.CancellationToken);
            throw new TimeoutException(
                $"20 s: {ThreadPool.ThreadCount} threads, {ThreadPool.PendingWorkItemCount} items wait, " +
                $"{ThreadPool.CompletedWorkItemCount - before} done in the last second; ended now: {task.IsCompleted}");
        }
    }

    private static byte[] Filled(int length, byte value) => [.. Enumerable.Repeat(value, length)];

    /// <summary>
    /// The origin never answers what was prefetched. Nobody notices, not even the client that prefetches.
    /// </summary>
    [Fact]
    public async Task Neither_a_long_prefetch_nor_the_switch_holds_anybody_up()
    {
        using OriginCache cache = Open();
        await Write(cache, 0, Filled(Block, 1));
        BeSilent();
        Task prefetch = cache.Disk.PrefetchAsync(0, Length).AsTask();
        Assert.Contains(
            "not cached yet",
            (await Assert.ThrowsAsync<DiskException>(() => Soon(Switch(cache, force: false)))).Message,
            StringComparison.Ordinal);
        Task switching = Switch(cache, force: true);
        do
        {
            Assert.Equal(Filled(Block, 1), await Soon(Read(cache, 0, Block)));
            await Soon(Write(cache, 0, Filled(Block, 1), durable: true));
        }
        while (!switching.IsCompleted);
        await Soon(switching);
        await Soon(prefetch);
        Assert.Equal(new byte[Block], await Soon(Read(cache, 40 * Block, Block)));
    }

    /// <summary>After that, what counts is the header and the durable map.</summary>
    [Fact]
    public async Task A_cache_that_was_switched_is_a_target_also_after_the_machine_has_died()
    {
        string mapPath = _folder.File("map");
        using (OriginCache cache = Open())
        {
            await cache.CacheAll(256, CancellationToken.None);
            await Soon(cache.Disk.ZeroAsync(0, 8 * Block, ZeroMode.MayPunch, durable: false).AsTask());
            _bytes.AsSpan(0, 8 * Block).Clear();
            Assert.False(SavedCache.Find(mapPath)!.WasSwitched);
            cache.Switch(force: false);
        }

        byte[] map = File.ReadAllBytes(mapPath);
        new Random(7).NextBytes(map.AsSpan((int)MapLayout.LiveOffset(0), 256)); // nobody has written it back
        File.WriteAllBytes(mapPath, map);
        using (SafeFileHandle file = File.OpenHandle(mapPath, access: FileAccess.ReadWrite))
        {
            MapFile.Open(new FileMapStore(mapPath, file)).ChangeHeader(
                header => header with { BootId = Guid.NewGuid() });
        }

        map = File.ReadAllBytes(mapPath);
        SavedCache saved = SavedCache.Find(mapPath)!;
        Assert.Equal((true, true, "origin"), (saved.WasSwitched, saved.IsComplete(), saved.OriginName));
        using (OriginCache target = saved.OpenSwitched(
            ["other", "origin"], _folder.File("image"), CacheOpening.GoOn, readOnly: false))
        {
            Assert.NotNull(target.Image);
            Assert.Equal(_bytes, await Read(target, 0, Length));
            await Write(target, 100, [1, 2, 3], durable: true);
            ((byte[])[1, 2, 3]).CopyTo(_bytes, 100);
            target.Switch(force: false);
            await target.CacheAll(256, CancellationToken.None);
            await target.FlushAll();
            Assert.Equal(0, target.Statistics.AbsentBlocks);
        }

        Assert.Equal(map, File.ReadAllBytes(mapPath));
        Assert.Equal(_bytes, File.ReadAllBytes(_folder.File("image")));
        Assert.Equal(
            Remedy.RebindMap,
            Assert.Throws<DiskException>(
                () => saved.OpenSwitched(["other"], _folder.File("image"), CacheOpening.GoOn, false)).Remedy);
    }

    [Fact]
    public async Task A_read_that_is_never_answered_delays_no_switch_and_sees_what_was_written_meanwhile()
    {
        using OriginCache cache = Open();
        var isAsked = new TaskCompletionSource();
        _origin.Before = (_, offset, _) =>
        {
            if (offset != 80 * Block)
                return Task.CompletedTask;
            isAsked.TrySetResult();
            return _silence.Task;
        };
        Task<byte[]> read = Read(cache, 80 * Block, Block);
        await Soon(isAsked.Task);
        await Write(cache, 80 * Block, Filled(Block, 8));
        await Soon(cache.CacheAll(256, CancellationToken.None));
        await Soon(Switch(cache, force: false));
        Assert.Equal(Filled(Block, 8), await Soon(read));
    }

    /// <summary>
    /// A part of a block is written; the rest of it never comes, and is zero in the end. It holds the blocks of others
    /// meanwhile.
    /// </summary>
    [Fact]
    public async Task Writes_that_wait_for_a_silent_origin_are_carried_over()
    {
        using OriginCache cache = Open();
        BeSilent();
        Task first = Write(cache, (10 * Block) + 100, Filled(200, 1));
        Task second = Write(cache, (10 * Block) + 1000, Filled(2 * Block, 2), durable: true);
        Task zeroing = cache.Disk.ZeroAsync((20 * Block) + 5, Block, ZeroMode.None, durable: false).AsTask();
        Task<byte[]> read = Read(cache, 30 * Block, Block);
        Task flush = cache.Disk.FlushAsync().AsTask();
        await Soon(flush); // waits for nobody
        Assert.DoesNotContain([first, second, zeroing, read], task => task.IsCompleted);
        await Soon(Switch(cache, force: true));
        await Soon(Task.WhenAll(first, second, zeroing, read));
        byte[] expected = new byte[4 * Block];
        Filled(200, 1).CopyTo(expected, 100);
        Filled(2 * Block, 2).CopyTo(expected, 1000);
        Assert.Equal(expected, await Soon(Read(cache, 10 * Block, 4 * Block)));
        Assert.Equal(new byte[Length - (14 * Block)], await Soon(Read(cache, 14 * Block, Length - (14 * Block))));
        Assert.Equal(new byte[Block], await read);
    }

    /// <summary>It fails at the last possible moment: when the origin has been detached.</summary>
    [Fact]
    public async Task A_switch_that_fails_changes_nothing_and_can_be_tried_again()
    {
        using OriginCache cache = Open();
        await cache.Disk.ZeroAsync(0, Block, ZeroMode.MayPunch, durable: false);
        BeSilent();
        Task<byte[]> read = Read(cache, 80 * Block, Block);
        // Holds its block, so that zeroes are written in the second pass only.
        Task write = Write(cache, (90 * Block) + 1, Filled(10, 3));
        int zeroings = 0;
        _image!.Before = (operation, _, _) => operation == "zero" && Interlocked.Increment(ref zeroings) == 2
            ? throw new DiskException(DiskError.NoSpace, "full")
            : Task.CompletedTask;
        Assert.Contains(
            "full",
            (await Assert.ThrowsAsync<DiskException>(() => Soon(Switch(cache, force: true)))).Message,
            StringComparison.Ordinal);
        Assert.Null(cache.Image);
        Assert.False(read.IsCompleted);
        _silence.SetResult();
        Assert.Equal(_bytes[(80 * Block)..(81 * Block)], await Soon(read));
        await Soon(write);
        _bytes.AsSpan(0, Block).Clear();
        Filled(10, 3).CopyTo(_bytes, (90 * Block) + 1);
        Assert.Equal(_bytes, await Soon(Read(cache, 0, Length)));
        await cache.Disk.ZeroAsync(5 * Block, 2 * Block, ZeroMode.MayPunch, durable: false);
        _bytes.AsSpan(5 * Block, 2 * Block).Clear();
        await Soon(cache.CacheAll(256, CancellationToken.None));
        await Soon(Switch(cache, force: false));
        Assert.Equal(_bytes, File.ReadAllBytes(_folder.File("image")));
    }

    /// <summary>Zeroes that are under way when the switch begins, in each order with it.</summary>
    [Theory]
    [InlineData("trim")]
    [InlineData("zero")]
    public async Task Zeroes_that_are_made_during_the_switch_are_in_the_image(string held)
    {
        using OriginCache cache = Open();
        await Soon(cache.CacheAll(256, CancellationToken.None));
        if (held == "zero")
            // The switch has to make these zeroes real.
            await cache.Disk.ZeroAsync(100 * Block, Block, ZeroMode.MayPunch, durable: true);
        using var isHeld = new ManualResetEventSlim();
        using var hold = new ManualResetEventSlim();
        _image!.Before = (operation, offset, _) =>
        {
            if (operation == held && offset == (held == "trim" ? 20 : 100) * Block)
            {
                isHeld.Set();
                hold.Wait(TimeSpan.FromSeconds(20));
            }

            return Task.CompletedTask;
        };
        Task zeroing = Task.CompletedTask, switching;
        if (held == "trim")
        {
            zeroing = cache.Disk.ZeroAsync(20 * Block, 4 * Block, ZeroMode.MayPunch, durable: false).AsTask();
            Assert.True(isHeld.Wait(TimeSpan.FromSeconds(20), TestContext.Current.CancellationToken));
            switching = Switch(cache, force: false);
            await Soon(switching); // waits for nobody
        }
        else
        {
            switching = Switch(cache, force: false);
            Assert.True(isHeld.Wait(TimeSpan.FromSeconds(20), TestContext.Current.CancellationToken));
            await Soon(cache.Disk.ZeroAsync(20 * Block, 4 * Block, ZeroMode.MayPunch, durable: false).AsTask());
        }

        hold.Set();
        await Soon(switching);
        await Soon(zeroing);
        _bytes.AsSpan(20 * Block, 4 * Block).Clear();
        if (held == "zero")
            _bytes.AsSpan(100 * Block, Block).Clear();
        Assert.Equal(_bytes, File.ReadAllBytes(_folder.File("image")));
        Assert.Equal(_bytes, await Soon(Read(cache, 0, Length)));
        AssertAllIsLocalDurably();
    }

    /// <summary>Opens the map as after a death of the machine.</summary>
    private void AssertAllIsLocalDurably()
    {
        Linux.LinuxFile.Open(_folder.File("map"), Linux.OpenMode.ReadOnly, out SafeFileHandle? file);
        using (file)
        {
            var map = BlockMap.Open(new FileMapStore("map", file!), Guid.NewGuid());
            Assert.Equal(MapFlags.Switched, map.Header.Flags & MapFlags.Switched);
            Assert.Equal((0, 0), (map.Count(BlockState.Absent), map.Count(BlockState.Zero)));
        }
    }

    /// <summary>
    /// Four clients, each in places of its own, but not in blocks of its own, before, during and after the switch.
    /// After a death of the machine, the
    /// map must call every block local.
    /// </summary>
    [Theory]
    [InlineData(1, false)]
    [InlineData(2, true)]
    [InlineData(3, false)]
    public async Task Concurrent_clients_equal_the_model_over_a_switch(int seed, bool isSlowFile)
    {
        const int clients = 4, stripe = 1000;
        byte[] model = [.. _bytes];
        using (OriginCache cache = Open())
        {
            _image!.Slow = isSlowFile;
            using var hasSwitched = new CancellationTokenSource();
            var seeds = new Random(seed);
            Task[] running = [.. Enumerable.Range(0, clients).Select(client =>
            {
                var random = new Random(seeds.Next());
                return Task.Run(async () =>
                {
                    for (int left = 300; left > 0; left -= hasSwitched.IsCancellationRequested ? 1 : 0)
                    {
                        int index = (random.Next(((Length - (5 * Block)) / stripe / clients) - 1) * clients) + client;
                        int offset = index * stripe, length = random.Next(1, stripe);
                        switch (random.Next(8))
                        {
                            case < 3:
                                Assert.Equal(model[offset..(offset + length)], await Soon(Read(cache, offset, length)));
                                break;
                            case < 5:
                                await Soon(
                                    cache.Disk.ZeroAsync(
                                        offset, length, (ZeroMode)random.Next(2), random.Next(30) == 0).AsTask());
                                await Task.Yield(); // as after a read and a write: cache-all needs a thread, too
                                model.AsSpan(offset, length).Clear();
                                break;
                            default:
                                byte[] data = new byte[length];
                                random.NextBytes(data);
                                await Soon(Write(cache, offset, data, random.Next(30) == 0));
                                data.CopyTo(model, offset);
                                break;
                        }
                    }
                });
            })];
            Task zeroing = Task.Run(async () =>
            {
                for (int last = 0; last < 10; last += hasSwitched.IsCancellationRequested ? 1 : 0)
                {
                    // Whole blocks, again and again.
                    await Soon(
                        cache.Disk.ZeroAsync(
                            Length - (4 * Block), 4 * Block, ZeroMode.MayPunch, durable: false).AsTask());
                    await Task.Yield();
                }
            });
            await Soon(cache.CacheAll(64, CancellationToken.None));
            await Soon(Switch(cache, force: false));
            await hasSwitched.CancelAsync();
            await Task.WhenAll([.. running, zeroing]);
            model.AsSpan(Length - (4 * Block)).Clear();
            Assert.Equal(model, await Soon(Read(cache, 0, Length)));
            Assert.Equal(model, File.ReadAllBytes(_folder.File("image")));
        }

        AssertAllIsLocalDurably();
        BeSilent();
        using OriginCache again = Open(); // a proxy may keep zeroes in its map alone
        Assert.Equal(model, await Soon(Read(again, 0, Length)));
        Linux.LinuxFile.Open(_folder.File("map"), Linux.OpenMode.ReadOnly, out SafeFileHandle? file);
        using (file)
        {
            MapFlags flags = MapFile.ReadHeader(new FileMapStore("map", file!))!.Flags;
            Assert.Equal(MapFlags.MayHoldWrites, flags & (MapFlags.Switched | MapFlags.MayHoldWrites));
        }
    }

    /// <summary>Like SIGTERM amid a switch.</summary>
    [Fact]
    public async Task The_end_waits_for_a_switch_that_is_under_way_and_lets_none_begin()
    {
        OriginCache cache = Open();
        await Soon(cache.CacheAll(256, CancellationToken.None));
        await cache.FlushAll();
        using var isHeld = new ManualResetEventSlim();
        using var hold = new ManualResetEventSlim();
        _image!.Before = (operation, _, _) =>
        {
            if (operation == "flush")
            {
                isHeld.Set();
                hold.Wait(TimeSpan.FromSeconds(20));
            }

            return Task.CompletedTask;
        };
        Task switching = Switch(cache, force: false);
        Assert.True(isHeld.Wait(TimeSpan.FromSeconds(20), TestContext.Current.CancellationToken));
        var ending = new Thread(cache.Dispose);
        ending.Start();
        Wait.UntilBlocked(ending, "it waits for the switch");
        hold.Set();
        Assert.True(ending.Join(20_000));
        Assert.Contains(
            "ending",
            (await Assert.ThrowsAsync<DiskException>(() => Soon(switching))).Message,
            StringComparison.Ordinal);
        Assert.Throws<DiskException>(() => cache.Switch(force: true));
        Assert.Throws<DiskException>(() => cache.Rebind("another"));
        _image.Before = null;
        using OriginCache again = Open();
        Assert.Equal(0, again.Statistics.AbsentBlocks);
        again.Switch(force: false);
    }
}
