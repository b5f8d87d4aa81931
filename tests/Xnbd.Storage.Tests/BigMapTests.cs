using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;
using Xnbd.Storage.Maps;
using Xnbd.TestKit;

namespace Xnbd.Storage.Tests;

/// <summary>
/// Maps of big disks, in real files: memory and the time of a start grow with what is used, not with the disk.
/// </summary>
public sealed class BigMapTests : IDisposable
{
    private const long Length = 15L << 40; // the longest file of ext4 has less than 16 TiB
    private const long Blocks = Length / BlockRange.BlockSize;
    private const int PageBytes = MapLayout.PageBytes;

    private readonly TempFolder _folder = new();
    private readonly Guid _boot = Guid.NewGuid();

    public void Dispose() => _folder.Dispose();

    private static MapHeader Header(Guid boot, MapFlags flags = MapFlags.Cache, long length = Length) => new()
    {
        Id = Guid.NewGuid(),
        BootId = boot,
        Flags = flags,
        DataStart = 0,
        Source = new SourceIdentity("x", length, 5, 6),
    };

    private static SafeFileHandle Make(string path, long length = Length)
    {
        Assert.Equal(
            Errno.None, LinuxFile.Open(path, OpenMode.ReadWrite | OpenMode.CreateNew, out SafeFileHandle? file));
        Assert.Equal(Errno.None, LinuxFile.Truncate(file!, MapLayout.FileLength(length)));
        return file!;
    }

    private static long AllocatedBytes(SafeFileHandle file)
    {
        Assert.Equal(Errno.None, LinuxFile.Status(file, out FileStatus status));
        return status.AllocatedBytes;
    }

    [Theory]
    [InlineData("xfs", "-bsize=4096", false)]
    [InlineData("xfs", "-bsize=16384", false)]
    [InlineData("xfs", "-bsize=16384", true)]
    [InlineData("ext4", "-b1024", false)]
    [InlineData("ext4", "-b4096", true)]
    [InlineData("btrfs", "-q", false)]
    [InlineData("tmpfs", "32m", false)]
    public async Task A_map_is_found_again_without_a_look_at_what_was_never_used(
        string kind, string option, bool isDropped)
    {
        using IDisposable mount = kind == "tmpfs"
            ? await TmpfsMount.Create(_folder, option)
            : await LoopMount.Create(_folder, kind, 512 << 20, option);
        string path = Path.Combine((mount as LoopMount)?.Path ?? ((TmpfsMount)mount).Path, "map");
        using SafeFileHandle file = Make(path);
        var store = new CountingStore(new FileMapStore(path, file));
        var map = BlockMap.Create(store, Header(_boot));
        var random = new Random(3);
        var durable = new Dictionary<long, BlockState>();
        Change(durable);
        Change(durable, new BlockRange(0, 1));
        Change(durable, new BlockRange(Blocks - 1, 1));
        map.Commit();
        var live = new Dictionary<long, BlockState>(durable);
        Change(live);
        map.SetFetched(new BlockRange(Blocks / 2, 5));
        map.WriteBehind();
        for (long block = Blocks / 2; block < (Blocks / 2) + 5; block++)
            live[block] = BlockState.Fetched;
        Check(map, live);
        if (isDropped) // what is asked of the file system is on its disk, too
        {
            map.ChangeHeader(header => header);
            await Tool.Succeed("sync", "-f", path);
            await Tool.Run("sh", "-c", "echo 1 > /proc/sys/vm/drop_caches");
        }

        store.Reads = 0;
        Check(BlockMap.Open(store, _boot), live);
        Check(BlockMap.Open(store, Guid.NewGuid()), durable);
        Assert.InRange(store.Reads, 1, 50_000); // about a thousand pages are used, of 250,000

        Guid boot = Guid.NewGuid();
        map = BlockMap.Open(store, boot);
        store.Writes = 0;
        map.PrepareToWrite();
        Assert.InRange(store.Writes, 1, 5000);
        Assert.InRange(AllocatedBytes(file), 1, 32 << 20);
        Check(BlockMap.Open(store, boot), durable); // the live map is that of this run of the machine now
        map.Commit();
        Check(BlockMap.Open(store, Guid.NewGuid()), durable);

        void Change(Dictionary<long, BlockState> model, BlockRange? only = null)
        {
            for (int i = 0; i < (only is null ? 200 : 1); i++)
            {
                BlockRange range = only ?? new BlockRange(random.NextInt64(Blocks - 8), random.Next(1, 8));
                var state = (BlockState)random.Next(4);
                map.Set(range, state);
                for (long block = range.First; block < range.End; block++)
                    model[block] = state;
            }
        }
    }

    private static void Check(BlockMap map, Dictionary<long, BlockState> model)
    {
        long[] counts = new long[4];
        var seen = new Dictionary<long, BlockState>();
        long next = 0;
        foreach ((BlockRange run, BlockState state) in map.Runs())
        {
            Assert.Equal(next, run.First);
            next = run.End;
            counts[(int)state] += run.Count;
            for (long block = run.First; state != BlockState.Absent && block < run.End; block++)
                seen.Add(block, state);
        }

        Assert.Equal(Blocks, next);
        Assert.Equal(model.Where(b => b.Value != BlockState.Absent).OrderBy(b => b.Key), seen);
        foreach (BlockState state in Enum.GetValues<BlockState>())
            Assert.Equal(counts[(int)state], map.Count(state));
    }

    /// <summary>Earlier versions gave the whole map its space when it was made.</summary>
    [Theory]
    [InlineData("xfs", "-bsize=16384")]
    [InlineData("ext4", "-b4096")]
    [InlineData("btrfs", "-q")]
    [InlineData("tmpfs", "64m")]
    public async Task A_map_that_has_all_its_space_is_found_again(string kind, string option)
    {
        const long length = 200L << 30;
        using IDisposable mount = kind == "tmpfs"
            ? await TmpfsMount.Create(_folder, option)
            : await LoopMount.Create(_folder, kind, 512 << 20, option);
        string path = Path.Combine((mount as LoopMount)?.Path ?? ((TmpfsMount)mount).Path, "map");
        using SafeFileHandle file = Make(path, length);
        Assert.Equal(
            Errno.None, LinuxFile.Allocate(file, AllocateMode.KeepSize, 0, MapLayout.FileLength(length)));
        var store = new FileMapStore(path, file);
        var map = BlockMap.Create(store, Header(_boot, length: length));
        map.Set(new BlockRange(7, 20_000), BlockState.Written);
        map.Commit();
        map.Set(new BlockRange(30_000_000, 20_000), BlockState.Zero);
        for (int i = 0; i < 2; i++) // the second time all of it is in memory
        {
            BlockMap live = BlockMap.Open(store, _boot), durable = BlockMap.Open(store, Guid.NewGuid());
            Assert.Equal(map.Runs(), live.Runs());
            Assert.Equal(20_000, live.Count(BlockState.Zero));
            Assert.Equal(0, durable.Count(BlockState.Zero));
            Assert.True(durable.IsAll(new BlockRange(7, 20_000), BlockState.Written));
            _ = File.ReadAllBytes(path);
        }
    }

    /// <summary>A copy has holes in other places than the file.</summary>
    [Theory]
    [InlineData("always")] // also in place of zeroes inside of pages that are used
    [InlineData("never")]
    public async Task A_map_that_was_copied_is_found_and_goes_on(string sparse)
    {
        const long length = 200L << 30;
        string path = _folder.File("map"), copy = _folder.File("copy");
        using SafeFileHandle file = Make(path, length);
        var map = BlockMap.Create(new FileMapStore(path, file), Header(_boot, length: length));
        map.Set(new BlockRange(7, 20_000), BlockState.Written);
        map.Set(new BlockRange(40_000_000, 1), BlockState.Written);
        map.Commit();
        map.Set(new BlockRange(30_000_000, 20_000), BlockState.Zero);
        map.Set(new BlockRange(40_000_000, 1), BlockState.Absent);
        await Tool.Succeed("cp", "--sparse=" + sparse, path, copy);
        using SafeFileHandle copied = File.OpenHandle(copy, access: FileAccess.ReadWrite);
        var store = new FileMapStore(copy, copied);
        BlockMap opened = BlockMap.Open(store, _boot);
        Assert.Equal(map.Runs(), opened.Runs());
        opened.PrepareToWrite();
        foreach (BlockMap both in (BlockMap[])[map, opened])
        {
            both.Set(new BlockRange(40_000_000, 3), BlockState.Written);
            both.Set(new BlockRange(10_000_000, 1), BlockState.Written);
            both.Commit();
        }

        Assert.Equal(map.Runs(), BlockMap.Open(store, _boot).Runs());
        Assert.Equal(map.Runs(), BlockMap.Open(store, Guid.NewGuid()).Runs());
    }

    [Theory]
    [InlineData(true)]
    [InlineData(false)]
    public void Damage_is_found_wherever_it_is(bool isLive)
    {
        string path = _folder.File("map");
        using SafeFileHandle file = Make(path);
        var store = new FileMapStore(path, file);
        var map = BlockMap.Create(store, Header(_boot));
        map.Set(new BlockRange(1, 1), BlockState.Written);
        map.Commit();
        const int page = 100_000; // never used
        byte[] torn = new byte[PageBytes];
        torn[1000] = 1;
        store.Write(MapLayout.SlotOffset(Length, page, 1), torn);
        map = Open(); // one copy is torn, and the other one is a page that was never written
        Assert.Equal(1, map.Count(BlockState.Written));
        store.Write(MapLayout.SlotOffset(Length, page, 0), torn);
        var failure = Assert.Throws<DiskException>(Open);
        Assert.Equal(DiskError.Damaged, failure.Error);
        Assert.Contains($"both copies of page {page}", failure.Message, StringComparison.Ordinal);
        Assert.Equal(Errno.None, LinuxFile.Truncate(file, MapLayout.FileLength(Length) - 1));
        Assert.Equal(
            Errno.None,
            LinuxFile.Allocate(
                file,
                AllocateMode.KeepSize | AllocateMode.PunchHole,
                MapLayout.SlotOffset(Length, page, 0),
                2 * PageBytes));
        failure = Assert.Throws<DiskException>(Open);
        Assert.Contains("too short", failure.Message, StringComparison.Ordinal);

        BlockMap Open() => BlockMap.Open(store, isLive ? _boot : Guid.NewGuid());
    }

    /// <summary>
    /// The machine was started anew: what the live map says is of the run before, also in pages that the durable map
    /// does not have.
    /// </summary>
    [Fact]
    public void A_live_map_of_an_earlier_run_is_overwritten_wherever_it_says_something()
    {
        string path = _folder.File("map");
        using SafeFileHandle file = Make(path);
        var store = new FileMapStore(path, file);
        var map = BlockMap.Create(store, Header(_boot));
        long[] blocks = [5, 1_000_000_000, Blocks - 1];
        foreach (long block in blocks)
            map.Set(new BlockRange(block, 1), BlockState.Written); // and it was never committed
        Guid boot = Guid.NewGuid();
        map = BlockMap.Open(store, boot);
        Assert.Equal(0, map.Count(BlockState.Written));
        map.PrepareToWrite();
        Assert.Equal(Blocks, BlockMap.Open(store, boot).Count(BlockState.Absent));
    }

    /// <summary>Threads change blocks of the same pages, and pages that are used for the first time.</summary>
    [Fact]
    public void The_counts_are_right_after_threads_have_changed_blocks_together()
    {
        const int threads = 4, pages = 500;
        BlockMap map = MemoryMap.Create((long)pages * MapLayout.BlocksPerPage * BlockRange.BlockSize);
        Parallel.For(0, threads, new ParallelOptions { MaxDegreeOfParallelism = threads }, thread =>
        {
            var random = new Random(thread);
            for (int i = 0; i < 20_000; i++)
            {
                long first = random.NextInt64(map.BlockCount - 100);
                map.Set(new BlockRange(first, random.Next(1, 100)), (BlockState)random.Next(4));
                foreach (BlockState state in Enum.GetValues<BlockState>())
                    Assert.InRange(map.Count(state), 0, map.BlockCount);
            }
        });
        long[] counts = new long[4];
        foreach ((BlockRange run, BlockState state) in map.Runs())
            counts[(int)state] += run.Count;
        foreach (BlockState state in Enum.GetValues<BlockState>())
            Assert.Equal(counts[(int)state], map.Count(state));
    }

    /// <summary>
    /// A switch is refused as long as a block is absent. A block that is only written again must not seem absent.
    /// </summary>
    [Fact]
    public void A_block_that_stays_present_never_counts_as_absent()
    {
        BlockMap map = MemoryMap.Create(1 << 20);
        map.Set(new BlockRange(0, map.BlockCount), BlockState.Fetched);
        bool isOver = false;
        var changing = new Thread(() =>
        {
            for (int i = 0; i < 300_000; i++)
                map.Set(new BlockRange(i % map.BlockCount, 1), (BlockState)(1 + (i % 3)));
            Volatile.Write(ref isOver, true);
        });
        changing.Start();
        while (!Volatile.Read(ref isOver))
            Assert.Equal(0, map.Count(BlockState.Absent));
        changing.Join();
    }

    private sealed class CountingStore(IMapStore inner) : IMapStore
    {
        public int Reads { get; set; }

        public int Writes { get; set; }

        public void Read(long offset, Span<byte> buffer)
        {
            Reads++;
            inner.Read(offset, buffer);
        }

        public void Write(long offset, ReadOnlySpan<byte> data)
        {
            Writes++;
            inner.Write(offset, data);
        }

        public void Sync() => inner.Sync();

        public void Allocate(long offset, long length) => inner.Allocate(offset, length);

        public (long Start, long End) FindData(long offset, long end)
        {
            Reads++;
            (long dataStart, long dataEnd) = inner.FindData(offset, end);
            Assert.InRange(dataStart, offset, end);
            Assert.InRange(dataEnd, dataStart == end ? end : dataStart + 1, end);
            return (dataStart, dataEnd);
        }
    }
}
