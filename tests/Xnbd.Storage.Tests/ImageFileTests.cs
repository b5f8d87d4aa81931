using Xnbd.Storage.Images;
using Xnbd.Storage.Threads;
using Xnbd.TestKit;

namespace Xnbd.Storage.Tests;

/// <summary>On the disk's file system, and in memory (where there is no RWF_NOWAIT and no zero range).</summary>
public sealed class ImageFileTests : IDisposable
{
    private readonly TempFolder _disk = new();
    private readonly TempFolder _memory = new("/dev/shm");

    public void Dispose()
    {
        _disk.Dispose();
        _memory.Dispose();
    }

    private TempFolder Folder(bool inMemory) => inMemory ? _memory : _disk;

    [Theory]
    [InlineData(false, 1)]
    [InlineData(false, 2)]
    [InlineData(true, 3)]
    public async Task Random_operations_leave_what_a_byte_array_would_hold(bool inMemory, int seed)
    {
        const int length = (1 << 20) + 777; // with a tail
        var random = new Random(seed);
        byte[] model = new byte[length];
        string path = Folder(inMemory).Sparse("image", length);
        using (ImageFile image = ImageFile.Open(path, readOnly: false))
        {
            for (int i = 0; i < 3000; i++)
                await Step(image, model, random, seed);
        }

        Assert.Equal(model, File.ReadAllBytes(path));
    }

    private static async Task Step(ImageFile image, byte[] model, Random random, int seed)
    {
        int offset = random.Next(model.Length);
        int length = Math.Min(1 << random.Next(18), model.Length - offset);
        if (random.Next(2) == 0)
            offset = offset / 4096 * 4096;
        length = Math.Min(random.Next(length + 1), model.Length - offset);
        bool durable = random.Next(20) == 0;
        switch (random.Next(6))
        {
            case 0:
            case 1:
                byte[] data = new byte[length];
                random.NextBytes(data);
                if (random.Next(2) == 0 || !image.TryWrite(offset, data))
                    await image.WriteAsync(offset, data, durable);
                data.CopyTo(model, offset);
                break;
            case 2:
                ZeroMode mode = random.Next(2) == 0 ? ZeroMode.MayPunch : ZeroMode.None;
                await image.ZeroAsync(offset, length, mode, durable);
                model.AsSpan(offset, length).Clear();
                break;
            case 3:
                await image.TrimAsync(offset, length, durable);
                byte[] after = new byte[length];
                await image.ReadAsync(offset, after); // undefined, but it must not reach beyond the range
                after.CopyTo(model, offset);
                break;
            default:
                byte[] read = new byte[length];
                if (random.Next(2) == 0 || !image.TryRead(offset, read))
                    await image.ReadAsync(offset, read);
                Assert.True(
                    model.AsSpan(offset, length).SequenceEqual(read), $"seed {seed}: read of {length} at {offset}");
                break;
        }
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public async Task Zeroes_punch_unless_they_must_stay_allocated(bool inMemory)
    {
        string path = Folder(inMemory).Random("image", 1 << 20);
        using ImageFile image = ImageFile.Open(path, readOnly: false);
        await image.ZeroAsync(0, 256 * 1024, ZeroMode.MayPunch, durable: true);
        await image.ZeroAsync(512 * 1024, 256 * 1024, ZeroMode.None, durable: true);

        byte[] bytes = File.ReadAllBytes(path);
        Assert.All(bytes[..(256 * 1024)], b => Assert.Equal(0, b));
        Assert.All(bytes[(512 * 1024)..(768 * 1024)], b => Assert.Equal(0, b));
        Assert.Equal((1024 - 256) * 1024 / 512, await AllocatedSectors(path));
    }

    [Fact]
    public async Task Trim_gives_space_back()
    {
        string path = _disk.Random("image", 1 << 20);
        using ImageFile image = ImageFile.Open(path, readOnly: false);
        await image.TrimAsync(0, 1 << 20, durable: true);
        Assert.Equal(0, await AllocatedSectors(path));
        Assert.Equal(1 << 20, new FileInfo(path).Length);
    }

    [Fact]
    public async Task Fast_zeroes_that_would_be_slow_fail_and_change_nothing()
    {
        string path = _memory.Random("image", 65536);
        byte[] before = File.ReadAllBytes(path);
        using ImageFile image = ImageFile.Open(path, readOnly: false);
        // Allocated zeroes are slow in memory: there is no zero range.
        DiskException failure = await Assert.ThrowsAsync<DiskException>(
            async () => await image.ZeroAsync(0, 65536, ZeroMode.FastOnly, durable: false));
        Assert.Equal(DiskError.NotSupported, failure.Error);
        Assert.Equal(before, File.ReadAllBytes(path));
        await image.ZeroAsync(0, 65536, ZeroMode.FastOnly | ZeroMode.MayPunch, durable: false);
        Assert.All(File.ReadAllBytes(path), b => Assert.Equal(0, b));
    }

    [Fact]
    public async Task Extents_tell_data_from_holes()
    {
        string path = _disk.Sparse("image", 1 << 20);
        using ImageFile image = ImageFile.Open(path, readOnly: false);
        await image.WriteAsync(256 * 1024, new byte[65536], durable: true);
        var extents = new ExtentList(10);
        await image.GetExtentsAsync(1000, (1 << 20) - 1000, extents);
        Assert.Equal(
            [new((256 * 1024) - 1000, true, 1), new(65536, false, 1), new((1 << 20) - (320 * 1024), true, 1)],
            extents.Extents);

        var few = new ExtentList(2);
        await image.GetExtentsAsync(0, 1 << 20, few);
        Assert.Equal(2, few.Extents.Count);
        Assert.Equal(320 * 1024, few.Length);
    }

    [Theory]
    [InlineData(false, ImageUse.Base)]
    [InlineData(true, ImageUse.Base)]
    [InlineData(false, ImageUse.Shared)]
    public void Located_ranges_are_where_they_say(bool inMemory, ImageUse use)
    {
        string path = Folder(inMemory).Sparse("image", 1 << 20);
        byte[] data = new byte[128 * 1024];
        new Random(1).NextBytes(data);
        using (ImageFile written = ImageFile.Open(path, readOnly: false))
        {
            Assert.True(written.TryWrite(512 * 1024, data));
            // its pages may change in place
            Assert.Equal(FileRange.None, written.TryLocate(0, 1 << 20, findHoles: true));
            using ImageFile read = ImageFile.Open(path, readOnly: true);
            Assert.Equal(FileRange.None, read.TryLocate(0, 1 << 20, findHoles: true)); // the same pages
        }

        using ImageFile image = ImageFile.Open(path, readOnly: true, use);
        FileRange hole = image.TryLocate(0, 1 << 20, findHoles: true);
        Assert.True(hole.IsHole);
        Assert.Equal(512 * 1024, hole.Length);
        FileRange range = image.TryLocate(512 * 1024, 512 * 1024, findHoles: true);
        Assert.Equal(128 * 1024, range.Length);
        byte[] bytes = new byte[range.Length];
        Assert.Equal(range.Length, RandomAccess.Read(range.File!, bytes, range.FileOffset));
        Assert.Equal(data, bytes);
    }

    [Fact]
    public async Task Data_that_is_not_in_memory_is_neither_read_nor_located_at_once()
    {
        string path = _disk.Random("image", 1 << 20);
        await Tool.Succeed("sync", path);
        await Tool.Succeed("dd", $"of={path}", "oflag=nocache", "conv=notrunc,fdatasync", "count=0");
        using ImageFile image = ImageFile.Open(path, readOnly: false);
        byte[] buffer = new byte[4096];
        Assert.SkipUnless(!image.TryRead(65536, buffer), "this file system does not drop its cache on request");
        Assert.Equal(FileRange.None, image.TryLocate(0, 1 << 20, findHoles: true));
        Assert.False(image.TryWrite(128 * 1024 + 7, new byte[100])); // a part of a page must be read first

        await image.ReadAsync(65536, buffer);
        Assert.True(image.TryRead(65536, buffer));
    }

    [Fact]
    public async Task An_image_that_became_shorter_is_an_error_of_the_request()
    {
        string path = _disk.Random("image", 65536);
        using ImageFile image = ImageFile.Open(path, readOnly: true);
        using (FileStream file = File.Open(path, FileMode.Open, FileAccess.Write, FileShare.ReadWrite))
            file.SetLength(4096);
        byte[] buffer = new byte[8192];
        Assert.False(image.TryRead(0, buffer));
        DiskException failure = await Assert.ThrowsAsync<DiskException>(async () => await image.ReadAsync(0, buffer));
        Assert.Equal(DiskError.Io, failure.Error);
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public async Task What_stood_behind_the_end_of_a_shorter_image_is_lost_and_not_a_hole(bool inMemory)
    {
        string path = Folder(inMemory).Random("image", 1 << 20);
        using ImageFile image = ImageFile.Open(path, readOnly: false);
        using ImageFile layerBase = ImageFile.Open(path, readOnly: true);
        await image.GetExtentsAsync(0, 1 << 20, new ExtentList(10)); // what it remembers of this must not count
        await image.FlushAsync();
        using (FileStream file = File.Open(path, FileMode.Open, FileAccess.Write, FileShare.ReadWrite))
            file.SetLength(256 * 1024);

        var extents = new ExtentList(10);
        await image.GetExtentsAsync(0, 1 << 20, extents);
        Assert.Equal([new Extent(256 * 1024, false, 1)], extents.Extents); // and no more is said
        foreach (long offset in (long[])[256 * 1024, 512 * 1024, (1 << 20) - 1])
        {
            DiskException lost = await Assert.ThrowsAsync<DiskException>(
                async () => await image.GetExtentsAsync(offset, 1, new ExtentList(10)));
            Assert.Equal(DiskError.Io, lost.Error);
            Assert.Contains("has become shorter", lost.Message, StringComparison.Ordinal);
        }

        Assert.Throws<DiskException>(() => Locate(layerBase, 256 * 1024));
        Assert.Contains(
            "has become shorter",
            Assert.Throws<DiskException>(
                () => image.TakeSnapshot(DateTimeOffset.UtcNow, () => { }, _ => { }, CancellationToken.None)).Message,
            StringComparison.Ordinal);
        Assert.DoesNotContain(
            Directory.GetFiles(Folder(inMemory).Path), file => file.Contains("snapshot", StringComparison.Ordinal));
        // nobody is told that all is well
        await Assert.ThrowsAsync<DiskException>(async () => await image.FlushAsync());

        static void Locate(ImageFile image, long offset)
        {
            if (image.TryLocate(offset, 65536, findHoles: true) == FileRange.None
                && !image.TryRead(offset, new byte[65536]))
                image.ReadAsync(offset, new byte[65536]).AsTask().GetAwaiter().GetResult();
        }
    }

    /// <summary>
    /// In memory the kernel goes through all pages of the data to find its end; on a disk, through its extents.
    /// </summary>
    [Fact]
    public async Task A_question_about_a_part_of_a_large_image_takes_no_longer_than_of_a_small_one()
    {
        const int length = 1 << 30;
        string path = _memory.Sparse("image", length);
        await Tool.Succeed("dd", "if=/dev/zero", $"of={path}", "bs=1M", "count=1024", "conv=notrunc");
        using ImageFile image = ImageFile.Open(path, readOnly: false);
        var times = new List<double>();
        for (int i = 0; i < 101; i++)
        {
            long start = System.Diagnostics.Stopwatch.GetTimestamp();
            await image.GetExtentsAsync(i * 9_000_000L, 4096, new ExtentList(1));
            times.Add(System.Diagnostics.Stopwatch.GetElapsedTime(start).TotalMilliseconds);
        }

        times.Sort();
        Assert.InRange(times[50], 0, 2); // the kernel alone needs about 15 to find the end

        // The whole image takes several questions, each of which goes on where the last one ended.
        long offset = 0;
        while (offset < length)
        {
            var extents = new ExtentList(10);
            await image.GetExtentsAsync(offset, length - offset, extents);
            Assert.All(extents.Extents, extent => Assert.False(extent.IsHole));
            Assert.InRange(extents.Length, 1, length - offset);
            offset += extents.Length;
        }
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public async Task Holes_show_where_they_are_also_when_a_run_is_remembered(bool inMemory)
    {
        using ImageFile image = ImageFile.Open(Folder(inMemory).Random("image", 4 << 20), readOnly: false);
        Assert.Equal([new Extent(4 << 20, false, 1)], await Ask());
        await image.ZeroAsync((1 << 20) + 4096, 400_000 / 4096 * 4096, ZeroMode.MayPunch, durable: false);
        const int hole = 400_000 / 4096 * 4096;
        Assert.Equal(
            [
                new Extent((1 << 20) + 4096, false, 1),
                new Extent(hole, true, 1),
                new Extent((3 << 20) - 4096 - hole, false, 1),
            ],
            await Ask());
        await image.WriteAsync(1 << 20, new byte[1 << 20].Select(_ => (byte)1).ToArray(), durable: false);
        Assert.Equal([new Extent(4 << 20, false, 1)], await Ask());

        async Task<IReadOnlyList<Extent>> Ask()
        {
            var extents = new ExtentList(10);
            await image.GetExtentsAsync(0, 4 << 20, extents);
            return extents.Extents;
        }
    }

    /// <summary>Parts of blocks are written, whole ones are given back; and nothing else changes.</summary>
    [Theory]
    [InlineData("xfs", "-bsize=4096")]
    [InlineData("xfs", "-bsize=16384")]
    [InlineData("ext4", "-b1024")]
    [InlineData("btrfs", "")]
    public async Task Only_whole_blocks_of_the_file_system_are_punched(string kind, string option)
    {
        using LoopMount mount = await LoopMount.Create(_disk, kind, 512 << 20, option.Length > 0 ? [option] : []);
        int block = option.EndsWith("16384", StringComparison.Ordinal) ? 16384 : 4096;
        string path = Path.Combine(mount.Path, "image");
        byte[] model = File.ReadAllBytes(_disk.Random("bytes", 1 << 20));
        File.WriteAllBytes(path, model);
        using ImageFile image = ImageFile.Open(path, readOnly: false);
        await image.TrimAsync(block - 512, (4 * block) + 1024, durable: true);
        model.AsSpan(block, 4 * block).Clear(); // the edges stay
        await image.ZeroAsync((8 * block) - 512, (4 * block) + 1024, ZeroMode.MayPunch, durable: false);
        model.AsSpan((8 * block) - 512, (4 * block) + 1024).Clear();
        await image.ZeroAsync((16 * block) + 512, 512, ZeroMode.None, durable: false);
        model.AsSpan((16 * block) + 512, 512).Clear();
        await image.ZeroAsync((20 * block) + 512, 6 * block, ZeroMode.MayPunch | ZeroMode.FastOnly, durable: false);
        model.AsSpan((20 * block) + 512, 6 * block).Clear();

        byte[] seen = new byte[model.Length];
        await image.ReadAsync(0, seen);
        Assert.Equal(model, seen);
        foreach (int hole in (int[])[1, 8, 21])
            Assert.True(await IsHole(hole * block, (hole == 21 ? 5 : 4) * block), $"no hole at block {hole}");

        async Task<bool> IsHole(long offset, long length)
        {
            var extents = new ExtentList(1);
            await image.GetExtentsAsync(offset, length, extents);
            return extents.Extents[0] is { IsHole: true } first && first.Length == length;
        }
    }

    [Fact]
    public void What_cannot_be_served_is_refused_with_a_reason()
    {
        Assert.Contains("No such file", Refusal(_disk.File("absent")), StringComparison.Ordinal);
        Assert.Contains("Is a directory", Refusal(_disk.Path), StringComparison.Ordinal);
        Assert.Contains("neither", Refusal("/dev/null"), StringComparison.Ordinal);
        Assert.Contains(
            "Is a directory",
            Assert.Throws<DiskException>(() => ImageFile.Open(_disk.Path, readOnly: true)).Message,
            StringComparison.Ordinal);
    }

    private static string Refusal(string path)
        => Assert.Throws<DiskException>(() => ImageFile.Open(path, readOnly: false)).Message;

    [Fact]
    public async Task A_full_file_system_is_an_error_of_the_write_alone()
    {
        using TmpfsMount mount = await TmpfsMount.Create(_disk, "1m");
        string path = mount.File("image");
        using (FileStream file = File.Create(path))
            file.SetLength(8 << 20);
        using ImageFile image = ImageFile.Open(path, readOnly: false);
        byte[] data = new byte[65536];
        data.AsSpan().Fill(7);
        Assert.True(image.TryWrite(0, data));
        DiskError error = default;
        for (int i = 1; i < 100 && error == default; i++)
        {
            try
            {
                await image.WriteAsync(i * 65536, data, durable: false);
            }
            catch (DiskException failure)
            {
                error = failure.Error;
            }
        }

        Assert.Equal(DiskError.NoSpace, error);
        byte[] read = new byte[65536];
        Assert.True(image.TryRead(0, read));
        Assert.Equal(data, read);
        await image.TrimAsync(0, 1 << 20, durable: false);
        await image.WriteAsync(0, data, durable: true); // the image serves on
    }

    [Fact]
    public async Task Block_devices_are_served_with_ranges_of_any_alignment()
    {
        string backing = _disk.Sparse("backing", 4 << 20);
        ToolResult loop = await Tool.Run("losetup", "--find", "--show", backing);
        Assert.SkipUnless(loop.ExitCode == 0, $"no loop device: {loop.Errors}");
        string device = loop.Output.Trim();
        try
        {
            using ImageFile image = ImageFile.Open(device, readOnly: false);
            Assert.Equal(4 << 20, image.Length);
            byte[] model = new byte[4 << 20];
            var random = new Random(5);
            for (int i = 0; i < 300; i++)
            {
                int offset = random.Next(model.Length - 70000), length = random.Next(70000);
                byte[] data = new byte[length];
                random.NextBytes(data);
                await image.WriteAsync(offset, data, durable: false);
                data.CopyTo(model, offset);
                offset = random.Next(model.Length - 20000);
                length = random.Next(20000);
                await image.ZeroAsync(
                    offset, length, random.Next(2) == 0 ? ZeroMode.MayPunch : ZeroMode.None, durable: false);
                model.AsSpan(offset, length).Clear();
            }

            byte[] all = new byte[4 << 20];
            await image.ReadAsync(0, all);
            Assert.Equal(model, all);

            await Assert.ThrowsAsync<DiskException>(
                async () => await image.ZeroAsync(100, 8192, ZeroMode.MayPunch | ZeroMode.FastOnly, false));
            await image.TrimAsync(100, 1 << 20, durable: true);
        }
        finally
        {
            await Tool.Succeed("losetup", "-d", device);
        }
    }

    [Fact]
    public async Task After_a_sync_that_failed_nothing_is_called_durable()
    {
        // A loop device whose file has no room: writes go to the page cache, and are lost at the write-back.
        using TmpfsMount mount = await TmpfsMount.Create(_disk, "1m");
        string backing = mount.File("backing");
        using (FileStream file = File.Create(backing))
            file.SetLength(8 << 20);
        ToolResult loop = await Tool.Run("losetup", "--find", "--show", backing);
        Assert.SkipUnless(loop.ExitCode == 0, $"no loop device: {loop.Errors}");
        try
        {
            using ImageFile image = ImageFile.Open(loop.Output.Trim(), readOnly: false);
            await image.FlushAsync();
            byte[] data = new byte[4 << 20];
            new Random(1).NextBytes(data);
            await image.WriteAsync(0, data, durable: false);
            await Assert.ThrowsAsync<DiskException>(async () => await image.FlushAsync());

            // The kernel reports a failure once; this image does not forget it.
            await Assert.ThrowsAsync<DiskException>(async () => await image.FlushAsync());
            await Assert.ThrowsAsync<DiskException>(
                async () => await image.WriteAsync(0, new byte[4096], durable: true));
            await Assert.ThrowsAsync<DiskException>(
                async () => await image.ZeroAsync(0, 4096, ZeroMode.None, durable: true));
            await image.WriteAsync(0, new byte[4096], durable: false);
            await image.ReadAsync(0, new byte[4096]);
        }
        finally
        {
            await Tool.Succeed("losetup", "-d", loop.Output.Trim());
        }
    }

    /// <summary>Work that keeps a thread until it is let go.</summary>
    private sealed class Held(CountdownEvent ended, ManualResetEventSlim until) : IDiskWork
    {
        public void Run()
        {
            until.Wait();
            ended.Signal();
        }
    }

    [Fact]
    public async Task Sixteen_reads_wait_for_the_disk_at_once_and_more_queue_up()
    {
        string path = _disk.Random("image", 1 << 20);
        using ImageFile image = ImageFile.Open(path, readOnly: true);
        var reads = new List<Task>();
        for (int i = 0; i < 500; i++)
        {
            byte[] buffer = new byte[4096];
            reads.Add(image.ReadAsync(i % 256 * 4096, buffer).AsTask());
        }

        await Task.WhenAll(reads).WaitAsync(TimeSpan.FromSeconds(30));
        Assert.InRange(image.Readers.Count, 1, 16);
    }

    private static async Task<long> AllocatedSectors(string path)
        => long.Parse(await Tool.Succeed("stat", "-c", "%b", path), System.Globalization.CultureInfo.InvariantCulture);

    /// <summary>
    /// Layers know their base by the time of its last change. Old file systems keep that to the second: what happens
    /// within the second in which a layer was bound must be noticed, too.
    /// </summary>
    [Theory]
    [InlineData("-I128")]
    [InlineData("-I256")]
    public async Task A_change_right_after_the_version_was_taken_makes_another_one(string inode)
    {
        using var folder = new TempFolder();
        using LoopMount mount = await LoopMount.Create(folder, "ext4", 16 << 20, inode);
        string path = Path.Combine(mount.Path, "image");
        while (DateTime.UtcNow.Millisecond > 100)
            Thread.Sleep(5); // a second has begun
        File.WriteAllBytes(path, new byte[4096]);
        using ImageFile image = ImageFile.Open(path, readOnly: false);
        long version = image.GetVersion(isKept: true);
        await image.WriteAsync(0, new byte[] { 1 }, durable: true);
        Assert.NotEqual(version, image.GetVersion(isKept: true));
    }
}
