using Xnbd.Storage.Images;
using Xnbd.Storage.Layers;
using Xnbd.Storage.Maps;
using Xnbd.TestKit;

namespace Xnbd.Storage.Tests;

/// <summary>The copy-on-write disk on real files: against a model, concurrently, and with failing parts.</summary>
public sealed class CowDiskTests : IDisposable
{
    private const int Length = (3 << 20) + 1234;

    private readonly TempFolder _folder = new();
    private readonly string _basePath;
    private readonly byte[] _baseBytes = new byte[Length];

    public CowDiskTests()
    {
        new Random(1).NextBytes(_baseBytes);
        _baseBytes.AsSpan(1 << 20, 1 << 19).Clear();
        _basePath = _folder.Sparse("base", Length);
        using (FileStream file = File.OpenWrite(_basePath))
        {
            file.Write(_baseBytes, 0, 1 << 20);
            file.Position = 3 << 19;
            file.Write(_baseBytes, 3 << 19, Length - (3 << 19));
        }
    }

    public void Dispose() => _folder.Dispose();

    [Theory]
    [InlineData(1, false)]
    [InlineData(2, true)]
    public async Task Every_operation_equals_the_model(int seed, bool slow)
    {
        byte[] model = [.. _baseBytes];
        var random = new Random(seed);
        using (LayerFile layer = MakeLayer())
        {
            var below = new FaultDisk(OpenBase()) { Slow = slow };
            using var disk = new CowDisk(below, new FaultDisk(layer.Data) { Slow = slow }, layer.Map, false);
            for (int i = 0; i < 3000; i++)
                await Operate(disk, random, model, Length);
            Assert.Equal(model, await ReadAll(disk));
        }

        Assert.Equal(_baseBytes, await File.ReadAllBytesAsync(_basePath));
        using Disk again = LayerStack.OpenKept(_basePath, [LayerPath], readOnly: true, force: false, _ => { });
        Assert.Equal(model, await ReadAll(again));
    }

    [Fact]
    public async Task Three_layers_equal_the_model_and_only_the_top_changes()
    {
        byte[] model = [.. _baseBytes];
        var random = new Random(3);
        string[] paths = [_folder.File("l1"), _folder.File("l2"), _folder.File("l3")];
        for (int depth = 1; depth <= 3; depth++)
        {
            byte[][] below = [.. paths.Take(depth - 1).Select(File.ReadAllBytes)];
            using (Disk disk = LayerStack.OpenKept(_basePath, paths[..depth], readOnly: false, force: false, _ => { }))
            {
                for (int i = 0; i < 300; i++)
                    await Operate(disk, random, model, Length);
                Assert.Equal(model, await ReadAll(disk));
                await disk.FlushAsync();
            }

            Assert.Equal(below, paths.Take(depth - 1).Select(File.ReadAllBytes));
        }
    }

    [Fact]
    public async Task Concurrent_writers_to_parts_of_one_absent_block_lose_nothing()
    {
        const int count = 8;
        using LayerFile layer = MakeLayer();
        int started = 0;
        var slowBase = new FaultDisk(OpenBase())
        {
            Slow = true,
            Before = async (_, _, _) =>
            {
                while (Volatile.Read(ref started) < count)
                    await Task.Yield(); // so that all find the block absent
            },
        };
        using var disk = new CowDisk(slowBase, layer.Data, layer.Map, false);
        byte[] model = [.. _baseBytes];
        for (int block = 0; block < 60; block++)
        {
            int start = block * 4096;
            Volatile.Write(ref started, 0);
            Task[] writers = [.. Enumerable.Range(0, count).Select(part => Task.Run(async () =>
            {
                Interlocked.Increment(ref started);
                byte[] data = [.. Enumerable.Repeat((byte)(part + 1), 500)];
                data.CopyTo(model, start + (part * 512) + 3);
                if (!disk.TryWrite(start + (part * 512) + 3, data))
                    await disk.WriteAsync(start + (part * 512) + 3, data, durable: false);
            }))];
            await Task.WhenAll(writers);
        }

        Assert.Equal(model, await ReadAll(disk));
    }

    [Fact]
    public async Task Concurrent_writers_and_zeroers_of_neighbouring_ranges_lose_nothing()
    {
        using LayerFile layer = MakeLayer();
        using var disk = new CowDisk(OpenBase(), layer.Data, layer.Map, false);
        byte[] model = [.. _baseBytes];
        const int share = 5000; // of each task: never whole blocks, so that neighbours share one
        await Task.WhenAll(Enumerable.Range(0, 8).Select(i => Task.Run(async () =>
        {
            var random = new Random(i);
            var own = new byte[share];
            Array.Copy(model, i * share, own, 0, share);
            for (int round = 0; round < 400; round++)
            {
                int at = random.Next(share), length = 1 + random.Next(share - at);
                if (random.Next(3) == 0)
                {
                    await disk.ZeroAsync(
                        (i * share) + at,
                        length,
                        random.Next(2) == 0 ? ZeroMode.MayPunch : ZeroMode.None,
                        durable: false);
                    own.AsSpan(at, length).Clear();
                }
                else
                {
                    random.NextBytes(own.AsSpan(at, length));
                    if (!disk.TryWrite((i * share) + at, own.AsSpan(at, length)))
                        await disk.WriteAsync((i * share) + at, own.AsMemory(at, length), durable: false);
                }

                byte[] seen = new byte[share];
                await disk.ReadAsync(i * share, seen);
                Assert.Equal(own, seen);
            }

            lock (model)
                own.CopyTo(model, i * share);
        })));
        Assert.Equal(model, await ReadAll(disk));
    }

    [Fact]
    public async Task A_partial_first_write_reads_the_rest_of_its_block_once()
    {
        using LayerFile layer = MakeLayer();
        long bytesRead = 0;
        var counted = new FaultDisk(OpenBase())
        {
            Before = (operation, _, length) =>
            {
                Assert.Equal("read", operation);
                bytesRead += length;
                return Task.CompletedTask;
            },
        };
        using var disk = new CowDisk(counted, layer.Data, layer.Map, false);
        await disk.WriteAsync(4096 + 10, new byte[20], durable: false);
        Assert.Equal(4096, bytesRead);
        await disk.WriteAsync(4096 + 50, new byte[20], durable: false);
        Assert.True(disk.TryRead(4096, new byte[4096]));
        await disk.WriteAsync(8192, new byte[65536], durable: false);
        Assert.Equal(4096, bytesRead);
        await disk.WriteAsync(80_000, new byte[20_000], durable: false); // two partial blocks, at its ends
        Assert.Equal(3 * 4096, bytesRead);
    }

    [Fact]
    public async Task A_base_that_cannot_be_read_fails_a_partial_write_and_nothing_else()
    {
        using LayerFile layer = MakeLayer();
        bool fails = true;
        var bad = new FaultDisk(OpenBase())
        {
            Before = (_, _, _) => fails ? throw new DiskException(DiskError.Io, "bad sector") : Task.CompletedTask,
        };
        using var disk = new CowDisk(bad, layer.Data, layer.Map, false);
        await Assert.ThrowsAsync<DiskException>(async () => await disk.WriteAsync(10, new byte[20], durable: false));
        Assert.Equal(BlockState.Absent, layer.Map[0]);
        await disk.WriteAsync(4096, new byte[4096], durable: false); // a whole block needs no base
        fails = false;
        byte[] block = new byte[4096];
        await disk.ReadAsync(0, block);
        Assert.Equal(_baseBytes[..4096], block);
        await disk.WriteAsync(10, new byte[20], durable: false); // and nothing is still locked
    }

    [Fact]
    public async Task A_layer_that_is_full_fails_the_write_and_keeps_the_rest()
    {
        using TmpfsMount small = await TmpfsMount.Create(_folder, "8m");
        string path = small.File("layer");
        string big = _folder.Sparse("big", 64 << 20);
        using Disk disk = LayerStack.OpenKept(big, [path], readOnly: false, force: false, _ => { });
        byte[] block = [.. Enumerable.Repeat((byte)7, 4096)];
        int written = 0;
        DiskException? failure = null;
        for (; written < 16384 && failure is null; written++)
        {
            try
            {
                if (!disk.TryWrite(written * 4096L, block))
                    await disk.WriteAsync(written * 4096L, block, durable: false);
            }
            catch (DiskException caught)
            {
                failure = caught;
            }
        }

        Assert.Equal(DiskError.NoSpace, failure!.Error);
        await disk.FlushAsync();
        byte[] seen = new byte[4096];
        for (int i = 0; i < written - 1; i++)
        {
            Assert.True(disk.TryRead(i * 4096L, seen));
            Assert.Equal(block, seen);
        }

        Assert.True(disk.TryRead((written - 1) * 4096L, seen));
        Assert.DoesNotContain(seen, b => b != 0); // the one that failed is not there

        await disk.ZeroAsync(0, 1 << 20, ZeroMode.MayPunch, durable: true); // gives space back, and needs none
        await disk.WriteAsync((written - 1) * 4096L, block, durable: true);
    }

    [Fact]
    public async Task Zeroes_and_trim_cost_no_space_and_show_as_holes_of_this_layer()
    {
        using Disk disk = LayerStack.OpenKept(_basePath, [LayerPath], readOnly: false, force: false, _ => { });
        await disk.WriteAsync(0, new byte[1 << 20].Select((_, i) => (byte)(i | 1)).ToArray(), durable: true);
        long full = AllocatedBytes(LayerPath);
        await disk.ZeroAsync(4096, (1 << 20) - 8192, ZeroMode.MayPunch, durable: true);
        Assert.InRange(AllocatedBytes(LayerPath), 0, full - (900 << 10));
        await disk.TrimAsync(0, 4096, durable: false);
        await disk.ZeroAsync(2 << 20, 1 << 20, ZeroMode.MayPunch | ZeroMode.FastOnly, durable: false);

        var extents = new ExtentList(100);
        await disk.GetExtentsAsync(0, Length, extents);
        Assert.Equal(
            [
                new((1 << 20) - 4096, true, 1), new(4096, false, 1), new(1 << 19, true, 2), new(1 << 19, false, 2),
                new(1 << 20, true, 1), new(1234, false, 2),
            ],
            extents.Extents);

        var two = new ExtentList(2);
        await disk.GetExtentsAsync(100, Length - 100, two);
        Assert.Equal(1 << 20, two.Length + 100);
        Assert.True(disk.TryLocate(0, 65536, findHoles: true).IsHole);
        Assert.Equal(FileRange.None, disk.TryLocate((1 << 20) - 4096, 65536, findHoles: true)); // the layer may change
        // The base may not change.
        Assert.Equal((1 << 19) - 100, disk.TryLocate((3 << 19) + 100, 1 << 19, findHoles: true).Length);
    }

    [Fact]
    public async Task Allocated_zeroes_take_space()
    {
        using Disk disk = LayerStack.OpenKept(_basePath, [LayerPath], readOnly: false, force: false, _ => { });
        await disk.ZeroAsync(0, 1 << 20, ZeroMode.None, durable: true);
        Assert.InRange(AllocatedBytes(LayerPath), 1 << 20, long.MaxValue);
        byte[] seen = new byte[1 << 20];
        await disk.ReadAsync(0, seen);
        Assert.DoesNotContain(seen, b => b != 0);
    }

    [Fact]
    public async Task Nothing_is_called_durable_after_a_sync_has_failed()
    {
        using LayerFile layer = MakeLayer();
        bool fails = true;
        var bad = new FaultDisk(layer.Data)
        {
            Before = (operation, _, _)
                => fails && operation == "flush" ? throw new DiskException(DiskError.Io, "gone") : Task.CompletedTask,
        };
        using var disk = new CowDisk(OpenBase(), bad, layer.Map, false);
        await disk.WriteAsync(0, new byte[4096], durable: false);
        await Assert.ThrowsAsync<DiskException>(async () => await disk.FlushAsync());
        fails = false;
        await Assert.ThrowsAsync<DiskException>(async () => await disk.FlushAsync());
        await Assert.ThrowsAsync<DiskException>(async () => await disk.WriteAsync(0, new byte[4096], durable: true));
    }

    [Fact]
    public async Task Writers_that_wait_for_a_commit_share_it()
    {
        using LayerFile layer = MakeLayer();
        int syncs = 0;
        var slow = new FaultDisk(layer.Data)
        {
            Before = async (operation, _, _) =>
            {
                if (operation != "flush")
                    return;
                Interlocked.Increment(ref syncs);
                await Task.Delay(50);
            },
        };
        using var disk = new CowDisk(OpenBase(), slow, layer.Map, false);
        await Task.WhenAll(
            Enumerable.Range(0, 100).Select(i => disk.WriteAsync(i * 4096, new byte[4096], durable: true).AsTask()));
        Assert.InRange(syncs, 1, 20);
        Assert.True(layer.Map.IsCommitted);
    }

    private string LayerPath => _folder.File("layer");

    private ImageFile OpenBase() => ImageFile.Open(_basePath, readOnly: true, ImageUse.Base);

    private LayerFile MakeLayer()
    {
        using ImageFile baseImage = OpenBase();
        return LayerFile.Create(
            LayerPath, BaseIdentity.Of(_basePath, baseImage), MapFlags.None);
    }

    private static async Task Operate(Disk disk, Random random, byte[] model, int size)
    {
        int offset = random.Next(size), length = 1 + random.Next(1 << random.Next(17));
        if (random.Next(3) == 0)
            (offset, length) = (offset / 4096 * 4096, (length + 4095) / 4096 * 4096);
        if (random.Next(8) == 0)
            offset = Math.Max(0, size - length); // across the tail
        length = Math.Min(length, size - offset);
        switch (random.Next(10))
        {
            case < 4:
                byte[] data = new byte[length];
                random.NextBytes(data);
                data.CopyTo(model, offset);
                bool isDurable = random.Next(50) == 0;
                if (isDurable || !disk.TryWrite(offset, data))
                    await disk.WriteAsync(offset, data, isDurable);
                break;
            case < 6:
                model.AsSpan(offset, length).Clear();
                await disk.ZeroAsync(offset, length, (ZeroMode)random.Next(2), durable: false);
                break;
            case 6:
                await disk.TrimAsync(offset, length, durable: false);
                await disk.ReadAsync(offset, model.AsMemory(offset, length)); // what was trimmed may be anything
                break;
            case 7:
                var extents = new ExtentList(1 + random.Next(20));
                await disk.GetExtentsAsync(offset, length, extents);
                Assert.InRange(extents.Length, 1, length);
                int at = offset;
                foreach (Extent extent in extents.Extents)
                {
                    Assert.True(!extent.IsHole || !model.AsSpan(at, (int)extent.Length).ContainsAnyExcept((byte)0));
                    at += (int)extent.Length;
                }

                break;
            default:
                byte[] seen = new byte[length];
                FileRange range = disk.TryLocate(offset, length, findHoles: true);
                if (range.Length > 0 && !range.IsHole)
                    Xnbd.Linux.LinuxFile.Read(range.File!, seen.AsSpan(0, range.Length), range.FileOffset);
                Assert.True(model.AsSpan(offset, range.Length).SequenceEqual(seen.AsSpan(0, range.Length)));
                if (!disk.TryRead(offset, seen))
                    await disk.ReadAsync(offset, seen);
                Assert.True(model.AsSpan(offset, length).SequenceEqual(seen));
                break;
        }
    }

    private static async Task<byte[]> ReadAll(Disk disk)
    {
        byte[] all = new byte[disk.Length];
        await disk.ReadAsync(0, all);
        return all;
    }

    private static long AllocatedBytes(string path)
    {
        _ = Xnbd.Linux.LinuxFile.Status(path, out Xnbd.Linux.FileStatus status);
        return status.AllocatedBytes;
    }
}
