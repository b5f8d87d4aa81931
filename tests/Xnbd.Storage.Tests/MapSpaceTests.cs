using Xnbd.Linux;
using Xnbd.Storage.Cache;
using Xnbd.Storage.Images;
using Xnbd.Storage.Layers;
using Xnbd.Storage.Maps;
using Xnbd.TestKit;

namespace Xnbd.Storage.Tests;

/// <summary>
/// A page of the map gets its space before its first change. A change for which there is no space fails, and changes
/// nothing.
/// </summary>
public sealed class MapSpaceTests : IDisposable
{
    private const int Block = BlockRange.BlockSize;
    private const long PageBytes = (long)MapLayout.BlocksPerPage * Block; // what a page describes
    private const long Length = 3 * PageBytes;

    private readonly TempFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    /// <summary>A store that has no space for new pages while it is full; pages that have theirs are written.</summary>
    private sealed class FullStore : IMapStore
    {
        private readonly LossyStore _inner = new(new LossyFile(new Random(1)));

        public bool IsFull { get; set; }

        /// <summary>Ranges that were given space.</summary>
        public List<(long Offset, long Length)> Allocated { get; } = [];

        public void Read(long offset, Span<byte> buffer) => _inner.Read(offset, buffer);

        public void Write(long offset, ReadOnlySpan<byte> data)
        {
            lock (Allocated)
            {
                long end = offset + data.Length;
                Assert.Contains(Allocated, space => space.Offset <= offset && end <= space.Offset + space.Length);
            }

            _inner.Write(offset, data);
        }

        public void Sync() => _inner.Sync();

        public void Allocate(long offset, long length)
        {
            if (IsFull)
                throw new DiskException("allocation", "map", offset, length, Errno.ENOSPC);
            lock (Allocated)
                Allocated.Add((offset, length));
        }

        public (long Start, long End) FindData(long offset, long end) => _inner.FindData(offset, end);
    }

    private static async Task FailsForSpace(Func<ValueTask> operation)
        => Assert.Equal(
            DiskError.NoSpace, (await Assert.ThrowsAsync<DiskException>(async () => await operation())).Error);

    private ImageFile Image(string name) => ImageFile.Open(_folder.Sparse(name, Length), readOnly: false);

    private ImageFile RandomImage(string name)
    {
        ImageFile disk = Image(name);
        byte[] data = new byte[Block];
        for (long page = 0; page < 3; page++)
        {
            for (int i = 0; i < 16; i++)
            {
                new Random((int)page).NextBytes(data);
                Assert.True(disk.TryWrite((page * PageBytes) + (i * Block), data));
            }
        }

        return disk;
    }

    private static async Task<byte[]> Read(Disk disk, long offset, int length)
    {
        byte[] data = new byte[length];
        await disk.ReadAsync(offset, data);
        return data;
    }

    [Fact]
    public async Task A_layer_without_space_for_a_page_refuses_its_first_change_and_stays_as_it_is()
    {
        var store = new FullStore();
        BlockMap map = MemoryMap.Create(Length, store);
        Disk source = RandomImage("base");
        using var disk = new CowDisk(source, Image("local"), map, readOnly: false);
        await disk.WriteAsync(0, new byte[Block], durable: true); // the first page has its space
        byte[] before = await Read(disk, PageBytes, 16 * Block), data = new byte[4 * Block];
        new Random(9).NextBytes(data);
        store.IsFull = true;
        Func<ValueTask>[] changes =
        [
            () =>
            {
                Assert.True(disk.TryWrite(PageBytes, data));
                return ValueTask.CompletedTask;
            },
            () => disk.WriteAsync(PageBytes, data, durable: true),
            () => disk.WriteAsync(PageBytes + 5, data.AsMemory(0, 700), durable: false), // merged with the base
            () => disk.ZeroAsync(PageBytes, 8 * Block, ZeroMode.MayPunch, durable: false),
            () => disk.ZeroAsync(PageBytes, 8 * Block, ZeroMode.None, durable: false),
            () => disk.ZeroAsync(PageBytes + 7, 90, ZeroMode.MayPunch, durable: false),
            () => disk.TrimAsync(PageBytes, 16 * Block, durable: false),
        ];
        foreach (Func<ValueTask> change in changes)
        {
            await FailsForSpace(change);
            Assert.Equal(before, await Read(disk, PageBytes, 16 * Block));
            Assert.Equal([map.BlockCount - 1, 0, 0, 1], map.CountAll());
            Assert.True(map.IsCommitted);
        }

        // A change of two pages: blocks of the page that has its space may have changed, and no others.
        await FailsForSpace(() => disk.TrimAsync(PageBytes - (4 * Block), 8 * Block, durable: false));
        Assert.Equal([map.BlockCount - 5, 0, 4, 1], map.CountAll());
        await disk.WriteAsync(Block, data, durable: true); // the first page is changed and committed as before
        Assert.True(map.IsCommitted);

        store.IsFull = false;
        foreach (Func<ValueTask> change in changes)
            await change();
        Assert.Equal(new byte[16 * Block], await Read(disk, PageBytes, 16 * Block));
        await disk.FlushAsync();
        Assert.Equal(map.Runs(), BlockMap.Open(store, Guid.NewGuid()).Runs());
    }

    /// <summary>
    /// What is fetched and cannot be recorded reaches the client all the same, and is fetched again later.
    /// </summary>
    [Fact]
    public async Task A_cache_without_space_for_a_page_serves_what_it_fetches_and_refuses_writes()
    {
        var store = new FullStore();
        BlockMap map = MemoryMap.Create(Length, store);
        var failures = new List<DiskException>();
        using var disk = new CachingDisk(
            RandomImage("origin"),
            Image("image"),
            map,
            readOnly: false,
            new CacheLimits(64, 32 << 20),
            failure =>
            {
                lock (failures)
                    failures.Add(failure);
            });
        using Disk expected = RandomImage("expected");
        store.IsFull = true;
        for (int round = 0; round < 2; round++)
        {
            for (long page = 0; page < 3; page++)
            {
                byte[] data = await Read(disk, page * PageBytes, 16 * Block);
                Assert.Equal(await Read(expected, page * PageBytes, 16 * Block), data);
            }
        }

        await FailsForSpace(() => disk.PrefetchAsync(PageBytes, 16 * Block));
        await FailsForSpace(() => disk.WriteAsync(PageBytes, new byte[Block], durable: false));
        await FailsForSpace(() => disk.WriteAsync(PageBytes + 9, new byte[9], durable: false));
        await FailsForSpace(() => disk.ZeroAsync(PageBytes, 2 * Block, ZeroMode.MayPunch, durable: false));
        await FailsForSpace(() => disk.TrimAsync(PageBytes, 2 * Block, durable: false));
        Assert.Equal(await Read(expected, PageBytes, 16 * Block), await Read(disk, PageBytes, 16 * Block));
        Assert.Equal([map.BlockCount, 0, 0, 0], map.CountAll());
        Wait.Until(
            () =>
            {
                lock (failures)
                    return failures.Count > 0 && failures.All(failure => failure.Error == DiskError.NoSpace);
            },
            "it is told that there is no space");

        store.IsFull = false;
        await disk.PrefetchAsync(PageBytes, 16 * Block);
        Assert.Equal(16, map.Count(BlockState.Fetched));
        Assert.Equal(await Read(expected, PageBytes, 16 * Block), await Read(disk, PageBytes, 16 * Block));
        await disk.WriteAsync(PageBytes, new byte[Block], durable: true);
        Assert.Equal(1, map.Count(BlockState.Written));
    }

    /// <summary>
    /// A map that was copied may have holes in place of zeroes. Its pages get their space once more in each life.
    /// </summary>
    [Fact]
    public void A_page_gets_its_space_again_after_the_map_was_opened()
    {
        var store = new FullStore();
        BlockMap map = MemoryMap.Create(Length, store);
        map.Set(new BlockRange(0, 1), BlockState.Written);
        map.Set(new BlockRange(5, 1), BlockState.Written);
        map.Commit();
        int created = store.Allocated.Count;
        Assert.Equal(3, created); // the headers, and of one page the live map and the slots
        map = BlockMap.Open(store, map.Header.BootId);
        map.PrepareToWrite();
        map.Set(new BlockRange(0, 1), BlockState.Written); // no change
        Assert.Equal(created, store.Allocated.Count);
        store.IsFull = true;
        Assert.Throws<DiskException>(() => map.Set(new BlockRange(1, 1), BlockState.Written));
        Assert.Equal([map.BlockCount - 2, 0, 0, 2], map.CountAll());
        store.IsFull = false;
        map.Set(new BlockRange(1, 1), BlockState.Written);
        map.Set(new BlockRange(2, 1), BlockState.Written);
        Assert.Equal(store.Allocated[1..3], store.Allocated[3..]);
    }

    [Theory]
    [InlineData("xfs", "-bsize=4096")]
    [InlineData("ext4", "-b4096")]
    [InlineData("tmpfs", "32m")]
    public async Task On_a_full_disk_a_change_that_has_no_room_fails_and_all_others_are_made_durable(
        string kind, string option)
    {
        using IDisposable mount = kind == "tmpfs"
            ? await TmpfsMount.Create(_folder, option)
            : await LoopMount.Create(_folder, kind, 512 << 20, option);
        string folder = (mount as LoopMount)?.Path ?? ((TmpfsMount)mount).Path, path = Path.Combine(folder, "layer");
        string image = _folder.Sparse("base", 1L << 40);
        using Disk disk = LayerStack.OpenKept(image, [path], readOnly: false, force: false, _ => { });
        BlockMap map = ((CowDisk)disk).Map;
        byte[] data = new byte[8192];
        data.AsSpan().Fill(7);
        long[] offsets = [0, 1L << 38, 1L << 39];
        foreach (long offset in offsets)
            await disk.WriteAsync(offset, data, durable: false);
        FillUp(folder);

        // A page of the map that was never used.
        const long unused = 3L << 38;
        var failure = await Assert.ThrowsAsync<DiskException>(
            async () => await disk.TrimAsync(unused, 4096, durable: false));
        Assert.Equal(DiskError.NoSpace, failure.Error);
        Assert.Equal(BlockState.Absent, map[unused / 4096]);

        // Pages that are used: each of their slots has its space.
        for (int i = 1; i <= 4; i++)
        {
            foreach (long offset in offsets)
                await disk.TrimAsync(offset + (i * 1L << 20), 4096, durable: false);
            await disk.FlushAsync();
            Assert.True(map.IsCommitted);
        }

        await disk.TrimAsync(0, 4096, durable: true);
        map.ChangeHeader(header => header);
        map.ChangeHeader(header => header);
        File.Delete(Path.Combine(folder, "filler"));
        await disk.TrimAsync(unused, 4096, durable: true);
        Assert.Equal(BlockState.Zero, map[unused / 4096]);
        Assert.Equal(14, map.Count(BlockState.Zero));
        Assert.Equal(5, map.Count(BlockState.Written));
    }

    private static void FillUp(string folder)
    {
        using FileStream filler = File.Create(Path.Combine(folder, "filler"), bufferSize: 0);
        for (int length = 1 << 20; length > 0; length /= 2)
        {
            try
            {
                byte[] piece = new byte[length];
                while (true)
                    filler.Write(piece);
            }
            catch (IOException)
            {
                // It is full for pieces of this length.
            }
        }

        filler.Flush(flushToDisk: true);
    }

    [Fact]
    public void A_disposable_layer_takes_only_what_is_written()
    {
        string image = _folder.Sparse("base", 1L << 40);
        using Disk disk = LayerStack.OpenDisposable(image, null, readOnly: false, _ => { });
        Assert.True(disk.TryWrite(1L << 39, new byte[4096]));
        Assert.Equal(Errno.None, LinuxFile.Status(_folder.File("base.cow0.layer1"), out FileStatus status));
        Assert.InRange(status.AllocatedBytes, 1, 32 << 10);
    }
}
