using Xnbd.Storage.Cache;

namespace Xnbd.Storage.Tests;

/// <summary>Which reads go on in sequence, and how far is read ahead of them.</summary>
public sealed class ReadAheadTests
{
    private const long Blocks = 100_000;

    private readonly ReadAhead _ahead = new(Blocks);

    private BlockRange Read(long first, long count = 1, bool hasRoom = true)
        => _ahead.Next(new BlockRange(first, count), hasRoom);

    [Fact]
    public void Nothing_is_read_ahead_of_a_random_reader()
    {
        var random = new Random(1);
        for (int i = 0; i < 10_000; i++)
            Assert.Equal(0, Read(random.Next((int)Blocks / 3) * 3).Count);
    }

    [Fact]
    public void Of_the_third_read_in_sequence_on_more_is_read_ahead_each_time_up_to_a_bound()
    {
        Assert.Equal(0, Read(0, 4).Count);
        Assert.Equal(0, Read(4, 4).Count);
        long end = 12, longest = 0;
        Assert.Equal(new BlockRange(end, 32), Read(8, 4));
        long aheadEnd = end + 32;
        for (; end < 20_000; end += 4)
        {
            BlockRange ahead = Read(end, 4);
            if (ahead.Count == 0)
                continue;
            Assert.Equal(aheadEnd, ahead.First); // nothing twice, and nothing left out
            aheadEnd = ahead.End;
            Assert.InRange(aheadEnd - (end + 4), 1, 1024);
            longest = Math.Max(longest, ahead.Count);
        }

        Assert.InRange(longest, 512, 1024);
    }

    [Fact]
    public void Without_room_nothing_is_read_ahead_and_later_the_stream_is_still_known()
    {
        for (int i = 0; i < 10; i++)
            Assert.Equal(0, Read(i, hasRoom: false).Count);
        Assert.Equal(new BlockRange(11, 1024), Read(10));
    }

    [Fact]
    public void Whoever_reads_the_same_blocks_again_is_not_read_ahead_of()
    {
        for (int i = 0; i < 10; i++)
            Assert.Equal(0, Read(50, 4).Count);
    }

    [Fact]
    public void Sixteen_readers_are_told_apart()
    {
        for (int i = 0; i < 2; i++)
        {
            for (int reader = 0; reader < 16; reader++)
                Assert.Equal(0, Read((reader * 5000) + i).Count);
        }

        for (int reader = 0; reader < 16; reader++)
            Assert.Equal((reader * 5000) + 3, Read((reader * 5000) + 2).First);
    }

    [Fact]
    public void The_end_of_the_disk_is_the_end()
    {
        _ = Read(Blocks - 4);
        _ = Read(Blocks - 3);
        Assert.Equal(new BlockRange(Blocks - 1, 1), Read(Blocks - 2));
        Assert.Equal(0, Read(Blocks - 1).Count);
    }

    /// <summary>A reader that finds all there makes no misses; without triggers its stream would run dry.</summary>
    [Fact]
    public void A_reader_that_misses_nothing_comes_to_a_trigger_before_what_was_read_ahead_ends()
    {
        long aheadEnd = 0, at = 0;
        while (aheadEnd == 0 || at < 10)
        {
            aheadEnd = Math.Max(aheadEnd, Read(at).End);
            at++;
        }

        int triggers = 0;
        for (; at < 20_000; at++)
        {
            Assert.True(at < aheadEnd, $"block {at} was not read ahead");
            if (!_ahead.IsTriggered(at * BlockRange.BlockSize))
                continue;
            triggers++;
            Assert.False(_ahead.IsTriggered(at * BlockRange.BlockSize)); // once
            aheadEnd = Math.Max(aheadEnd, Read(at).End);
        }

        Assert.InRange(triggers, 20, 100);
    }

    [Fact]
    public void Pieces_end_at_multiples_of_their_size()
    {
        Assert.Equal(new BlockRange(100, 28), ReadAhead.FirstPiece(new BlockRange(100, 1000), 64));
        Assert.Equal(new BlockRange(128, 64), ReadAhead.FirstPiece(new BlockRange(128, 972), 64));
        Assert.Equal(new BlockRange(1088, 12), ReadAhead.FirstPiece(new BlockRange(1088, 12), 64));
        Assert.Equal(new BlockRange(100, 4), ReadAhead.FirstPiece(new BlockRange(100, 1000), 8));
    }
}
