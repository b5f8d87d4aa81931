using Xnbd.Storage.Cache;
using Xnbd.TestKit;

namespace Xnbd.Storage.Tests;

/// <summary>A cache that keeps nothing yet, since its origin still changes.</summary>
public sealed class IncomingTests : IDisposable
{
    private const int Block = BlockRange.BlockSize, Length = 1 << 20;

    private readonly TempFolder _folder = new();
    private readonly byte[] _bytes = new byte[Length];
    private readonly MemoryDisk _memory = new(Length);
    private readonly FaultDisk _origin;
    private int _begun;

    public IncomingTests()
    {
        new Random(1).NextBytes(_bytes);
        _memory.TryWrite(0, _bytes);
        _origin = new FaultDisk(_memory) { Slow = true };
    }

    public void Dispose() => _folder.Dispose();

    private OriginCache Open()
    {
        OriginCache cache = OriginCache.Open(
            _origin,
            ["origin"],
            _folder.File("image"),
            _folder.File("map"),
            CacheOpening.GoOn,
            readOnly: false,
            new CacheLimits(64, 32 << 20),
            _ => { });
        cache.Begun = () => Interlocked.Increment(ref _begun);
        return cache;
    }

    private static async Task<byte[]> Read(OriginCache cache, long offset, int length)
    {
        byte[] buffer = new byte[length];
        if (!cache.Disk.TryRead(offset, buffer))
            await cache.Disk.ReadAsync(offset, buffer).AsTask().WaitAsync(TimeSpan.FromSeconds(20));
        await Task.Yield();
        return buffer;
    }

    /// <summary>The machine writes where it still runs.</summary>
    private void Change(long offset, byte value)
    {
        _memory.TryWrite(offset, [value]);
        _bytes[offset] = value;
    }

    [Fact]
    public async Task What_has_passed_through_tells_the_disk_from_another_one()
    {
        using OriginCache cache = Open();
        Assert.True(cache.TryPassThrough());
        Assert.Empty(cache.TakeSamples().Blocks);
        for (int block = 0; block < 200; block++)
            await Read(cache, (block * Block) + 10, 3 * Block); // two blocks as a whole
        await Read(cache, 5 * Block, 100); // no block as a whole
        DiskSamples samples = cache.TakeSamples();
        Assert.Equal(DiskSamples.MaxCount, samples.Blocks.Count);
        Assert.All(samples.Blocks, block => Assert.InRange(block.Offset, 138 * Block, 202 * Block)); // the last ones
        Assert.Null(samples.FindDifference(Others(offset => _bytes.AsSpan((int)offset, Block).ToArray())));
        Assert.NotNull(samples.FindDifference(Others(_ => new byte[Block])));

        // The machine goes on writing: some blocks have changed.
        Assert.Null(samples.FindDifference(
            Others(offset => offset / Block % 4 == 0 ? new byte[Block] : _bytes.AsSpan((int)offset, Block).ToArray())));
        Assert.True(cache.Begin());
        await Read(cache, 0, Block);
        Assert.Equal(DiskSamples.MaxCount, cache.TakeSamples().Blocks.Count); // one that is kept says less

        List<byte[]?> Others(Func<long, byte[]> read)
            => [.. samples.Blocks.Select(block => (byte[]?)read(block.Offset))];
    }

    [Fact]
    public async Task A_read_sees_the_origin_as_it_is_although_an_older_read_is_under_way()
    {
        using OriginCache cache = Open();
        Assert.True(cache.TryPassThrough());
        var hold = new TaskCompletionSource();
        int reads = 0;
        _origin.After = (_, _, _) => Interlocked.Increment(ref reads) == 1 ? hold.Task : Task.CompletedTask;
        byte[] before = [.. _bytes[..Block]];
        Task<byte[]> old = Read(cache, 0, Block);
        Wait.Until(() => Volatile.Read(ref reads) == 1, "the origin has read");
        Change(7, 77);
        Assert.Equal(_bytes[..Block], await Read(cache, 0, Block));
        hold.SetResult();
        Assert.Equal(before, await old);
        await cache.Disk.PrefetchAsync(0, Length);
        Assert.Equal(0, cache.Statistics.FetchedBlocks);
        Assert.Equal(_bytes, await Read(cache, 0, Length));
    }

    public static TheoryData<string> Writes => ["write", "fast write", "zero", "trim"];

    [Theory]
    [MemberData(nameof(Writes))]
    public async Task The_first_write_of_any_kind_begins(string kind)
    {
        using OriginCache cache = Open();
        Assert.True(cache.TryPassThrough());
        Assert.Equal(Remedy.BeginKeeping, Assert.Throws<DiskException>(() => cache.Switch(force: true)).Remedy);
        await Assert.ThrowsAsync<DiskException>(() => cache.CacheAll(256, CancellationToken.None));
        await Read(cache, 0, Block);
        Change(2 * Block, 9);
        await (kind switch
        {
            "write" => cache.Disk.WriteAsync((2 * Block) + 1, new byte[] { 1 }, durable: false),
            "fast write"
                => cache.Disk.TryWrite(2 * Block, new byte[Block]) ? default : throw new InvalidOperationException(),
            "zero" => cache.Disk.ZeroAsync(2 * Block, Block, ZeroMode.MayPunch, durable: false),
            _ => cache.Disk.TrimAsync(2 * Block, Block, durable: false),
        });
        if (kind == "write")
            _bytes[(2 * Block) + 1] = 1; // the rest of the block is as the origin has it now
        else
            _bytes.AsSpan(2 * Block, Block).Clear();
        Assert.False(cache.IsIncoming);
        Assert.Equal(_bytes, await Read(cache, 0, Length));
        await cache.CacheAll(256, CancellationToken.None);
        Assert.Equal((0, 1), (cache.Statistics.AbsentBlocks, Volatile.Read(ref _begun)));
        Assert.False(cache.Begin());
        cache.Switch(force: false);
        Assert.Equal(_bytes, File.ReadAllBytes(_folder.File("image")));
    }

    [Fact]
    public async Task What_has_begun_does_not_pass_through_any_more_when_it_is_opened_again()
    {
        using (OriginCache cache = Open())
        {
            Assert.True(cache.TryPassThrough());
            Assert.True(cache.Begin());
            await Read(cache, 0, Block);
            Wait.Until(() => cache.Statistics.FetchedBlocks > 0, "it is kept");
            await cache.FlushAll();
        }

        using OriginCache again = Open();
        Assert.False(again.TryPassThrough());
        Assert.Equal(_bytes[..Block], await Read(again, 0, Block));
    }
}
