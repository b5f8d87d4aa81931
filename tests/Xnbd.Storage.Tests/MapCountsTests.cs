using Xnbd.Storage.Maps;

namespace Xnbd.Storage.Tests;

/// <summary>How many blocks of a map are in each state, and the map as a text of cells.</summary>
public sealed class MapCountsTests
{
    private const int Block = BlockRange.BlockSize;
    private const int PageBlocks = MapLayout.BlocksPerPage;

    [Fact]
    public void The_counts_of_any_range_are_those_of_its_blocks()
    {
        const int seed = 7;
        var random = new Random(seed);
        const long blocks = (3 * PageBlocks) + 77;
        BlockMap map = MemoryMap.Create((blocks * Block) - 5);
        for (int round = 0; round < 300; round++)
        {
            var state = (BlockState)random.Next(4);
            long first = random.NextInt64(blocks);
            long count = random.NextInt64(1, Math.Min(blocks - first, random.Next(2) == 0 ? 100 : blocks) + 1);
            map.Set(new BlockRange(first, count), state);
            first = random.NextInt64(blocks);
            var range = new BlockRange(first, random.NextInt64(0, blocks - first + 1));
            var expected = new long[4];
            for (long block = range.First; block < range.End; block++)
                expected[(int)map[block]]++;
            BlockCounts counts = map.CountIn(range);
            Assert.True(
                expected.SequenceEqual([counts.Absent, counts.Fetched, counts.Zero, counts.Written]),
                $"seed {seed}, round {round}: {range} counts {counts}");
        }

        BlockCounts all = map.CountIn(new BlockRange(0, blocks));
        Assert.Equal([all.Absent, all.Fetched, all.Zero, all.Written], map.CountAll());
    }

    [Fact]
    public void Threads_that_change_one_page_do_not_lose_counts()
    {
        BlockMap map = MemoryMap.Create(PageBlocks * (long)Block);
        Parallel.For(0, 4, thread =>
        {
            var random = new Random(thread);
            for (int i = 0; i < 20_000; i++)
                map.Set(new BlockRange((random.Next(PageBlocks / 4) * 4) + thread, 1), (BlockState)random.Next(4));
        });
        long[] expected = new long[4];
        for (int block = 0; block < PageBlocks; block++)
            expected[(int)map[block]]++;
        Assert.Equal(expected, map.CountAll());
    }

    [Fact]
    public void A_map_that_is_loaded_counts_as_before()
    {
        var store = new ByteStore(MapLayout.FileLength(2L * PageBlocks * Block));
        BlockMap map = MemoryMap.Create(2L * PageBlocks * Block, store);
        map.Set(new BlockRange(5, PageBlocks), BlockState.Written);
        map.Set(new BlockRange(100, 10), BlockState.Zero);
        map.SetFetched(new BlockRange(0, 5));
        map.WriteBehind();
        map.Commit();
        foreach (Guid boot in (Guid[])[map.Header.BootId, Guid.NewGuid()]) // the live map, and the durable one
            Assert.Equal([PageBlocks - 5, 5, 10, PageBlocks - 10], BlockMap.Open(store, boot).CountAll());
    }

    [Fact]
    public void Cells_tell_what_most_of_their_local_blocks_are_and_whether_all_are_local()
    {
        BlockMap map = MemoryMap.Create(80L * Block);
        map.Set(new BlockRange(10, 10), BlockState.Fetched);
        map.Set(new BlockRange(20, 1), BlockState.Fetched);
        map.Set(new BlockRange(30, 10), BlockState.Written);
        map.Set(new BlockRange(40, 9), BlockState.Written);
        map.Set(new BlockRange(50, 10), BlockState.Zero);
        map.Set(new BlockRange(60, 5), BlockState.Zero);
        map.Set(new BlockRange(70, 4), BlockState.Fetched);
        map.Set(new BlockRange(74, 5), BlockState.Written);
        Assert.Equal(".FfWwZzw", MapCells.Draw(map, 8, []));
        Assert.Equal(".FfWwZ*w", MapCells.Draw(map, 8, [new BlockRange(65, 5)]));
        Assert.Equal("**********", MapCells.Draw(map, 8, [new BlockRange(9, 62)]) + "**");
        Assert.Equal("w", MapCells.Draw(map, 1, []));
        Assert.Equal(80, MapCells.Draw(map, 4000, []).Length); // never more cells than blocks
        Assert.Equal("", MapCells.Draw(MemoryMap.Create(0), 8, []));
    }

    /// <summary>Also where cells and blocks do not divide, each block stands in one cell, and all cells do.</summary>
    [Theory]
    [InlineData(1, 1)]
    [InlineData(7, 3)]
    [InlineData(100, 64)]
    [InlineData(PageBlocks + 1, 1000)]
    [InlineData((2 * PageBlocks) - 1, MapCells.Max)]
    public void Each_block_stands_in_the_cell_that_is_its_share(int blocks, int cells)
    {
        var random = new Random(blocks);
        for (int round = 0; round < 50; round++)
        {
            BlockMap map = MemoryMap.Create(blocks * (long)Block);
            int block = round == 0 ? 0 : round == 1 ? blocks - 1 : random.Next(blocks);
            map.Set(new BlockRange(block, 1), BlockState.Written);
            string drawn = MapCells.Draw(map, cells, []);
            string fetching = MapCells.Draw(MemoryMap.Create(blocks * (long)Block), cells, [new BlockRange(block, 1)]);
            int at = drawn.IndexOfAny(['w', 'W']);
            Assert.InRange(block, (long)at * blocks / cells, ((long)(at + 1) * blocks / cells) - 1);
            Assert.Equal(at, fetching.IndexOf('*'));
            Assert.Equal((cells, 1), (drawn.Length, drawn.Count(sign => sign is 'w' or 'W')));
        }
    }

    /// <summary>Bytes in memory.</summary>
    private sealed class ByteStore(long length) : IMapStore
    {
        private readonly byte[] _bytes = new byte[length];

        public void Read(long offset, Span<byte> buffer) => _bytes.AsSpan((int)offset, buffer.Length).CopyTo(buffer);

        public void Write(long offset, ReadOnlySpan<byte> data) => data.CopyTo(_bytes.AsSpan((int)offset));

        public void Sync()
        {
        }

        public void Allocate(long offset, long length)
        {
        }

        public (long Start, long End) FindData(long offset, long end) => (offset, end);
    }
}
