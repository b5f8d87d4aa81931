using Xnbd.Storage.Cache;
using Xnbd.Storage.Maps;

namespace Xnbd.Storage.Tests;

/// <summary>The blocks by which a server of the same disk is recognized.</summary>
public sealed class DiskSamplesTests
{
    private const int Block = BlockRange.BlockSize;

    private static (long Offset, byte[] Data) Sample(int block, byte value)
        => ((long)block * Block, [.. Enumerable.Repeat(value, Block)]);

    private static byte[]?[] DataOf(DiskSamples samples) => [.. samples.Blocks.Select(block => block.Data)];

    [Fact]
    public void Blocks_of_zeroes_are_taken_only_where_there_are_no_others()
    {
        DiskSamples mixed = DiskSamples.Choose([Sample(0, 0), Sample(1, 7), Sample(2, 0), Sample(9, 1)], false);
        Assert.Equal([Block, 9L * Block], mixed.Blocks.Select(block => block.Offset));
        Assert.Equal(2, DiskSamples.Choose([Sample(0, 0), Sample(2, 0)], false).Blocks.Count);
        DiskSamples many = DiskSamples.Choose([.. Enumerable.Range(0, 250).Select(i => Sample(i, 1))], false);
        Assert.Equal(DiskSamples.MaxCount, many.Blocks.Count);
        Assert.InRange(many.Blocks[^1].Offset / Block, 230, 249); // spread over all of them
    }

    [Fact]
    public void One_block_that_differs_shows_another_disk_unless_the_machine_has_died()
    {
        (long, byte[])[] blocks = [.. Enumerable.Range(0, 10).Select(i => Sample(i, (byte)(i + 1)))];
        foreach (bool mayHoldWrites in (bool[])[false, true])
        {
            DiskSamples samples = DiskSamples.Choose(blocks, mayHoldWrites);
            byte[]?[] others = DataOf(samples);
            Assert.Null(samples.FindDifference(others));
            others[0] = null; // a bad sector
            Assert.Null(samples.FindDifference(others));
            others[3] = new byte[Block];
            Assert.Equal(mayHoldWrites ? null : 3L * Block, samples.FindDifference(others));
            for (int i = 4; i < 9; i++)
                others[i] = new byte[Block];
            Assert.Equal(3L * Block, samples.FindDifference(others)); // six of nine
        }

        Assert.Null(DiskSamples.None.FindDifference([]));
    }

    [Fact]
    public void Whole_blocks_that_were_fetched_are_taken_and_no_others()
    {
        const long length = (10_000L * Block) + 100;
        BlockMap map = MemoryMap.Create(length);
        map.Set(new BlockRange(10, 1000), BlockState.Fetched);
        map.Set(new BlockRange(20, 5), BlockState.Written);
        map.Set(new BlockRange(3000, 7001), BlockState.Fetched); // the last one is short
        var read = new List<long>();
        DiskSamples samples = CacheSamples.Take(map, block =>
        {
            Assert.True(map.IsAll(block, BlockState.Fetched));
            Assert.Equal(Block, block.LengthOn(length));
            read.Add(block.First);
            return read.Count % 3 > 0 ? Sample((int)block.First, 1).Data : null; // the others are held
        }, mayHoldWrites: false);
        Assert.InRange(read.Count, 200, DiskSamples.MaxCandidates);
        Assert.Equal(read.Order().Distinct(), read);
        Assert.Equal(DiskSamples.MaxCount, samples.Blocks.Count);
        BlockMap empty = MemoryMap.Create(length);
        Assert.Empty(CacheSamples.Take(empty, _ => throw new InvalidOperationException(), false).Blocks);
    }
}
