using Xnbd.Storage.Cache;
using Xnbd.Storage.Maps;
using Xnbd.Storage.Overlay;
using Xnbd.TestKit;

namespace Xnbd.Storage.Tests;

/// <summary>Filling alone, with an origin that says of its zeroes what a test wants.</summary>
public sealed class CacheFillTests
{
    private const int Block = BlockRange.BlockSize;
    private const int Length = (8 << 20) + 100;

    private readonly BlockMap _map = MemoryMap.Create(Length);
    private readonly FaultDisk _origin = new(new MemoryDisk(Length));
    private readonly MemoryDisk _local = new(Length);
    private readonly BlockLocks _changing = new();
    private readonly List<BlockRange> _fetched = [];
    private readonly CacheFill _fill;
    private int _turn = 256; // blocks

    public CacheFillTests()
    {
        _local.TryWrite(0, [.. Enumerable.Repeat((byte)9, Length)]);
        _fill = new CacheFill(_origin, _local, _map, _changing, _ => Task.FromResult(_turn), Fetch);
    }

    private Task Fetch(BlockRange range)
    {
        lock (_fetched)
            _fetched.Add(range);
        _map.SetFetched(range);
        return Task.CompletedTask;
    }

    private Task Run(int maxBlocks = 256, int parallel = 1, CancellationToken cancel = default)
        => _fill.RunAsync(all: true, maxBlocks, parallel, cancel).WaitAsync(
            TimeSpan.FromSeconds(20), TestContext.Current.CancellationToken);

    [Fact]
    public async Task All_that_is_absent_is_fetched_in_order_and_in_requests_of_the_size_that_was_asked_for()
    {
        _map.Set(new BlockRange(100, 100), BlockState.Written);
        _origin.Extents = (_, length, extents) => extents.Add(length, isHole: false);
        await Run(maxBlocks: 64);
        Assert.All(_fetched, range => Assert.InRange(range.Count, 1, 64));
        long[] expected = [.. Enumerable.Range(0, 100), .. Enumerable.Range(200, (int)_map.BlockCount - 200)];
        Assert.Equal(
            expected, _fetched.SelectMany(r => Enumerable.Range((int)r.First, (int)r.Count)).Select(b => (long)b));
        Assert.Equal(0, _fill.ZeroBytes);
    }

    [Fact]
    public async Task Long_zeroes_are_kept_as_zeroes_and_short_ones_are_fetched()
    {
        _origin.Extents = (offset, length, extents) =>
        {
            Assert.Equal(0, offset);
            extents.Add((1 << 20) + 10, isHole: false);
            extents.Add(2 << 20, isHole: true); // parts of blocks at both ends
            extents.Add(1 << 20, isHole: false);
            extents.Add(32 << 10, isHole: true);
            extents.Add(length - (4 << 20) - 10 - (32 << 10), isHole: false);
        };
        await Run();
        Assert.Equal(0, _map.Count(BlockState.Absent));
        Assert.Equal((2 << 20) - Block, _fill.ZeroBytes);
        byte[] zeroes = new byte[(2 << 20) - Block];
        _local.TryRead((1 << 20) + Block, zeroes);
        Assert.False(zeroes.AsSpan().ContainsAnyExcept((byte)0));
        Assert.DoesNotContain(_fetched, range => range.Overlaps(new BlockRange(257, 511)));
    }

    /// <summary>Zeroes are noticed in whole units when they are stored.</summary>
    [Fact]
    public async Task Pieces_begin_at_multiples_of_their_size_whatever_the_line_is_worth()
    {
        _map.Set(new BlockRange(3, 10), BlockState.Written);
        _turn = 31;
        await Run();
        Assert.Equal([new(0, 3), new(13, 3), new(16, 16), new(32, 16)], _fetched[..4]);
        Assert.All(_fetched[2..^1], piece => Assert.Equal((0, 16), (piece.First % 16, piece.Count)));
    }

    [Fact]
    public async Task What_is_preferred_comes_first_and_each_block_once()
    {
        _map.Set(new BlockRange(1010, 10), BlockState.Written);
        _fill.Prefer([new(1000, 30), new(5, 1), new(1000, 1)]);
        await Run(maxBlocks: 16);
        Assert.Equal([new(1000, 10), new(1020, 10), new(5, 1), new(0, 5)], _fetched[..4]); // 5 is local by now
        Assert.Equal(_map.BlockCount - 10, _fetched.SelectMany(r => Enumerable.Range((int)r.First, (int)r.Count))
            .Distinct().Count());
        Assert.Equal(0, _fill.PreferredBlocks);
    }

    [Fact]
    public async Task Nothing_but_what_is_preferred_can_be_fetched()
    {
        _fill.Prefer([new(1000, 300)]);
        _fill.NoteMiss(3);
        await _fill.RunAsync(all: false, 256, 1, CancellationToken.None);
        Assert.Equal([new(1000, 256), new(1256, 44)], _fetched);
        _fill.Prefer([new(1, 1)]);
        _fill.PreferNothing();
        await _fill.RunAsync(all: false, 256, 1, CancellationToken.None);
        Assert.Equal(2, _fetched.Count);
    }

    [Fact]
    public async Task What_lies_behind_a_miss_comes_next_to_the_end_of_its_unit()
    {
        _fill.Prefer([new(1500, 1)]);
        _fill.NoteMiss(64 + 30); // units have 64 blocks
        await Run(maxBlocks: 20);
        Assert.Equal([new(95, 20), new(115, 13), new(1500, 1), new(0, 20)], _fetched[..4]);
        _fill.NoteMiss(_map.BlockCount - 1); // nothing is behind it
        await Run();
    }

    /// <summary>An answer of a few bytes only, of a part of a block, and of no block at all.</summary>
    [Theory]
    [InlineData(1)]
    [InlineData(Block - 1)]
    [InlineData(Block)]
    [InlineData((64 << 10) + 1)]
    public async Task Answers_that_end_early_are_asked_for_again_from_there(int answered)
    {
        int asked = 0;
        _origin.Extents = (_, length, extents) =>
        {
            asked++;
            extents.Add(Math.Min(length, answered), isHole: true);
        };
        await Run();
        Assert.Equal(0, _map.Count(BlockState.Absent));
        Assert.InRange(asked, 100, _map.BlockCount);
        Assert.Equal(answered > Block, _fill.ZeroBytes > 0);
    }

    /// <summary>Each question takes a round trip, and clients make many pieces of what is absent.</summary>
    [Fact]
    public async Task One_question_is_enough_for_all_that_is_absent_between_local_blocks()
    {
        int asked = 0;
        _origin.Extents = (_, length, extents) =>
        {
            asked++;
            extents.Add(length, isHole: false);
        };
        for (int block = 5; block < _map.BlockCount; block += 10)
            _map.Set(new BlockRange(block, 1), BlockState.Written);
        long absent = _map.Count(BlockState.Absent);
        await Run();
        Assert.Equal((1, absent), (asked, _fetched.Sum(range => range.Count)));
        Assert.All(_fetched, range => Assert.InRange(range.Count, 1, 9)); // local blocks are not charged to the rate
    }

    [Fact]
    public async Task Zeroes_where_somebody_writes_are_waited_for_and_not_kept()
    {
        _origin.Extents = (_, length, extents) => extents.Add(length, isHole: true);
        var held = new BlockRange(10, 1);
        Assert.True(_changing.TryEnter(held));
        Task filling = Run();
        var other = new BlockRange(2000, 1); // among the zeroes; who waits for a range has it as good as taken
        Wait.Until(
            () =>
            {
                if (!_changing.TryEnter(other))
                    return true;
                _changing.Leave(other);
                return false;
            },
            "the zeroes are waited for");
        Assert.False(filling.IsCompleted);
        _map.Set(held, BlockState.Written);
        _changing.Leave(held);
        await filling;
        byte[] data = new byte[Block];
        _local.TryRead(10 * Block, data);
        Assert.Equal((9, BlockState.Written), (data[0], _map[10]));
        Assert.Equal(BlockState.Fetched, _map[11]);
    }

    [Fact]
    public async Task An_answer_from_before_the_origin_changed_is_not_used()
    {
        _origin.Extents = (_, length, extents) =>
        {
            extents.Add(length, isHole: true);
            _fill.Forget();
        };
        await Run();
        Assert.Equal((0, _map.BlockCount), (_fill.ZeroBytes, _map.Count(BlockState.Absent)));
    }

    [Fact]
    public async Task A_failure_and_a_cancellation_end_it()
    {
        _origin.Extents = (_, length, extents) => extents.Add(length, isHole: false);
        using var cancel = new CancellationTokenSource();
        await cancel.CancelAsync();
        await Assert.ThrowsAnyAsync<OperationCanceledException>(() => Run(cancel: cancel.Token));
        var failing = new CacheFill(
            _origin,
            _local,
            _map,
            _changing,
            _ => Task.FromResult(256),
            _ => throw new DiskException(DiskError.NoSpace, "full"));
        await Assert.ThrowsAsync<DiskException>(() => failing.RunAsync(all: true, 256, 4, CancellationToken.None));
    }
}
