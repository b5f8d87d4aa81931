using Xnbd.Storage.Cache;
using Xnbd.Storage.Maps;
using Xnbd.Storage.Overlay;
using Xnbd.TestKit;

namespace Xnbd.Storage.Tests;

/// <summary>The comparison with the origin, whose blocks change and whose answers are of no use.</summary>
public sealed class CacheVerifyTests
{
    private const int Block = BlockRange.BlockSize, Length = (4 << 20) + 100;

    private readonly byte[] _bytes = new byte[Length];
    private readonly MemoryDisk _originBytes = new(Length);
    private readonly FaultDisk _origin;
    private readonly MemoryDisk _local = new(Length);
    private readonly BlockMap _map;
    private readonly BlockLocks _changing = new();
    private readonly CacheVerification _result = new();
    private int _turns;

    public CacheVerifyTests()
    {
        new Random(3).NextBytes(_bytes);
        _bytes.AsSpan(1 << 20, 1 << 20).Clear();
        _originBytes.TryWrite(0, _bytes);
        _local.TryWrite(0, _bytes);
        _origin = new FaultDisk(_originBytes) { Slow = true };
        _map = MemoryMap.Create(Length);
        _map.Set(new BlockRange(0, _map.BlockCount), BlockState.Fetched);
    }

    private Task Verify(CancellationToken cancel = default)
        => new CacheVerify(
            _origin,
            _local,
            _map,
            _changing,
            _ => Task.FromResult(1 + (_turns++ % 70)), // pieces of any size
            (range, buffer) => _origin.ReadAsync(range.Offset, buffer).AsTask())
            .RunAsync(_result, cancel);

    /// <summary>Says of the second MiB that it is zero.</summary>
    private static void ReportZeroes(long offset, long length, ExtentList list)
    {
        foreach ((long start, long end, bool isHole) in ((long, long, bool)[])
            [(0, 1 << 20, false), (1 << 20, 2 << 20, true), (2 << 20, Length, false)])
        {
            long part = Math.Min(end, offset + length) - Math.Max(start, offset);
            if (part > 0)
                _ = list.Add(part, isHole);
        }
    }

    private void Differ(long offset) => _local.TryWrite(offset, [(byte)(_bytes[offset] ^ 1)]);

    [Theory]
    [InlineData("as it is")]
    [InlineData("all data")]
    [InlineData("useless")]
    [InlineData("pieces")]
    public async Task Each_fetched_block_is_compared_once_whatever_the_origin_says_of_zeroes(string extents)
    {
        _origin.Extents = extents switch
        {
            "all data" => (_, length, list) => list.Add(length, isHole: false),
            "useless" => (_, _, list) => list.Add(100, isHole: false),
            "pieces" => (_, length, list) => list.Add(Math.Min(length, 100_000), isHole: false),
            _ => (offset, length, list) => ReportZeroes(offset, length, list),
        };
        await Verify();
        Assert.Equal(
            (_map.BlockCount, _map.BlockCount, 0, 0),
            (_result.Blocks, _result.DoneBlocks, _result.WrittenBlocks, _result.DifferentBlocks));
        Assert.Equal(Length - (extents == "as it is" ? 1 << 20 : 0), _result.ReadBytes);
        Assert.Empty(_result.Differences(Length));
    }

    /// <summary>Each question takes a round trip, and clients make many pieces of what was fetched.</summary>
    [Fact]
    public async Task One_question_is_enough_for_all_that_was_fetched_between_written_blocks()
    {
        int asked = 0;
        _origin.Extents = (offset, length, list) =>
        {
            asked++;
            ReportZeroes(offset, length, list);
        };
        for (int block = 5; block < _map.BlockCount; block += 10)
            _map.Set(new BlockRange(block, 1), BlockState.Written);
        long fetched = _map.Count(BlockState.Fetched);
        await Verify();
        Assert.Equal((1, fetched, fetched, 0), (asked, _result.Blocks, _result.DoneBlocks, _result.WrittenBlocks));
    }

    [Fact]
    public async Task Only_what_counts_as_fetched_is_compared()
    {
        BlockState[] others = [BlockState.Absent, BlockState.Zero, BlockState.Written];
        for (int i = 0; i < others.Length; i++)
        {
            _map.Set(new BlockRange(i * 10, 3), others[i]);
            Differ(i * 10 * Block);
        }

        foreach (long offset in (long[])[5 * Block, 6 * Block, (1 << 20) + 5000, Length - 1])
            Differ(offset);
        await Verify();
        Assert.Equal(_map.BlockCount - 9, _result.DoneBlocks);
        Assert.Equal((4, false), (_result.DifferentBlocks, _result.MayHoldWrites));
        Assert.Equal(
            [(5 * Block, 2 * Block), ((1 << 20) + Block, Block), (Length - 100, 100)], _result.Differences(Length));
    }

    [Fact]
    public async Task A_block_that_is_written_meanwhile_is_no_difference()
    {
        var written = new BlockRange(600, 1); // behind the zeroes
        _origin.After = async (operation, offset, length) =>
        {
            if (operation != "read" || !BlockRange.Touching(offset, length).Overlaps(written))
                return;
            await _changing.EnterAsync(written);
            Differ(written.Offset); // as a writer does it: first the data, then the state
            _ = Task.Run(async () =>
            {
                Wait.Until(() => _result.DoneBlocks >= _map.BlockCount - 64, "all other pieces are done");
                _map.Set(written, BlockState.Written);
                _changing.Leave(written);
            });
        };
        await Verify();
        Assert.Equal((0, 1), (_result.DifferentBlocks, _result.WrittenBlocks));
    }

    [Fact]
    public async Task A_switch_that_overtakes_it_fails_it()
    {
        _map.Seal(); // from now on clients write to the image, and the map does not know
        Differ(0);
        DiskException failure = await Assert.ThrowsAsync<DiskException>(() => Verify());
        Assert.Contains("was switched before", failure.Message, StringComparison.Ordinal);
        Assert.Equal(0, _result.DifferentBlocks);
    }

    [Fact]
    public async Task A_silent_origin_does_not_keep_it_from_being_cancelled()
    {
        _origin.Before = (operation, _, _)
            => operation == "read" ? new TaskCompletionSource().Task : Task.CompletedTask;
        using var cancel = new CancellationTokenSource();
        Task verifying = Verify(cancel.Token);
        cancel.CancelAfter(50);
        await Assert.ThrowsAnyAsync<OperationCanceledException>(() => verifying.WaitAsync(TimeSpan.FromSeconds(20)));
    }

    [Fact]
    public async Task An_origin_that_fails_a_read_fails_it()
    {
        _origin.Before = (operation, offset, _) => operation == "read" && offset > 2 << 20
            ? throw new DiskException(DiskError.Io, "a bad sector")
            : Task.CompletedTask;
        Assert.Equal("a bad sector", (await Assert.ThrowsAsync<DiskException>(() => Verify())).Message);
    }

    /// <summary>Then a difference may be a write that was never flushed.</summary>
    [Fact]
    public async Task It_is_told_if_the_machine_has_died_since_blocks_were_fetched()
    {
        _map.ChangeHeader(header => header with { Flags = header.Flags | MapFlags.MayHoldWrites });
        Differ(0);
        await Verify();
        Assert.Equal((1, true), (_result.DifferentBlocks, _result.MayHoldWrites));
    }
}
