using Xnbd.Storage.Access;
using Xnbd.TestKit;

namespace Xnbd.Storage.Tests;

/// <summary>What clients touch is recorded, and read back as a list.</summary>
public sealed class AccessRecordTests : IDisposable
{
    private const int Block = BlockRange.BlockSize, Length = (64 << 20) + 100;

    private readonly TempFolder _folder = new();
    private readonly List<string> _stops = [];
    private readonly TestClock _clock = new();

    public void Dispose() => _folder.Dispose();

    private string Path => _folder.File("record");

    private AccessRecord Open(int maxRanges = AccessRecord.MaxRanges)
        => new(Path, Length, _stops.Add, _clock, maxRanges);

    private IReadOnlyList<BlockRange> List() => AccessList.Read(Path, Length);

    [Fact]
    public void Each_block_is_recorded_once_in_order_and_what_is_contiguous_is_one_range()
    {
        using (AccessRecord record = Open())
        {
            record.Note(10 * Block, 2 * Block);
            record.Note(12 * Block, 100);
            _clock.Turn(TimeSpan.FromSeconds(2.5));
            record.Note((5 * Block) + 4000, 200); // two blocks
            record.Note(0, 20 * Block); // five of them, and two, and three were touched before
            record.Note(Length - 1, 1);
        }

        Assert.Equal(
            [new(10, 3), new(5, 2), new(0, 5), new(7, 3), new(13, 7), new(Length / Block, 1)], List());
        string[] lines = File.ReadAllLines(Path);
        Assert.StartsWith("#", lines[0], StringComparison.Ordinal);
        Assert.Equal([$"0.000 {10 * Block} {3 * Block}", $"2.500 {5 * Block} {2 * Block}"], lines[1..3]);
        Assert.Empty(_stops);
    }

    [Fact]
    public void Random_ranges_are_recorded_as_block_for_block()
    {
        var random = new Random(7);
        var touched = new HashSet<long>();
        var expected = new List<long>();
        using (AccessRecord record = Open())
        {
            for (int i = 0; i < 500; i++)
            {
                int length = random.Next(1, i % 10 == 0 ? 4 << 20 : 3 * Block);
                long offset = random.NextInt64(Length - length);
                record.Note(offset, length);
                var range = BlockRange.Touching(offset, length);
                for (long block = range.First; block < range.End; block++)
                {
                    if (touched.Add(block))
                        expected.Add(block);
                }
            }
        }

        IReadOnlyList<BlockRange> ranges = List();
        Assert.Equal(
            expected,
            ranges.SelectMany(range => Enumerable.Range(0, (int)range.Count).Select(i => range.First + i)));
        Assert.All(ranges, range => Assert.InRange(range.Count, 1, 256));
        for (int i = 1; i < ranges.Count; i++)
            Assert.True(ranges[i - 1].End != ranges[i].First || ranges[i - 1].Count == 256, $"{i} is joined");
    }

    [Fact]
    public void Long_ranges_are_cut()
    {
        using (AccessRecord record = Open())
            record.Note(0, 3 << 20);
        Assert.Equal([new(0, 256), new(256, 256), new(512, 256)], List());
    }

    [Fact]
    public void A_record_that_exists_is_continued_and_what_was_recorded_is_in_the_file_soon()
    {
        using (AccessRecord record = Open())
            record.Note(0, Block);
        using AccessRecord again = Open();
        Assert.Equal(DiskError.InUse, Assert.Throws<DiskException>(() => Open()).Error);
        again.Note(5 * Block, Block);
        Wait.Until(() => List().Count == 2, "the second one is written without an end of the record");
        Assert.Equal([new(0, 1), new(5, 1)], List());
    }

    [Fact]
    public void A_full_record_ends_and_says_so_once()
    {
        using AccessRecord record = Open(maxRanges: 3);
        for (int i = 0; i < 10; i++)
            record.Note(i * 2 * Block, Block);
        Wait.Until(() => _stops.Count > 0, "it is told");
        record.Note(100 * Block, Block);
        record.Dispose();
        Assert.Equal([new(0, 1), new(2, 1), new(4, 1)], List());
        Assert.Equal(["it has 3 ranges"], _stops);
    }

    [Fact]
    public async Task A_full_disk_ends_the_record_with_a_whole_line_and_nothing_else()
    {
        using TmpfsMount small = await TmpfsMount.Create(_folder, "16k");
        string path = small.File("record");
        using var record = new AccessRecord(path, Length, _stops.Add, _clock);
        for (int i = 0; i < 3000; i++)
            record.Note(i * 2 * Block, Block);
        Wait.Until(() => _stops.Count > 0, "it is told");
        record.Note(Block, Block);
        record.Dispose();
        Assert.Single(_stops);
        AccessList.Read(path, Length);
    }

    [Theory]
    [InlineData("0 0", "line 2: not three numbers")]
    [InlineData("0 -4096 4096", "line 2: not three numbers")]
    [InlineData("x 0 4096", "line 2: not three numbers")]
    [InlineData("0 0 99999999999999999999", "line 2: not three numbers")]
    [InlineData("0 67112960 4096", "line 2: the range is outside of the disk")]
    [InlineData("0 67108864 8192", "line 2: the range is outside of the disk")]
    [InlineData("0 4096 9223372036854775807", "line 2: the range is outside of the disk")]
    public void A_wrong_line_is_named(string line, string reason)
    {
        File.WriteAllText(Path, $"# a comment\n{line}\n");
        Assert.Contains(reason, Assert.Throws<DiskException>(List).Message, StringComparison.Ordinal);
    }

    [Fact]
    public void Blank_lines_comments_and_ranges_within_blocks_are_taken()
    {
        File.WriteAllText(Path, "\n# by hand\n  1.5\t4095  2 \n2 67108864 4096\n3 0 0\n");
        Assert.Equal([new(0, 2), new(16384, 1)], List());
    }

    [Fact]
    public void What_is_no_file_is_refused()
    {
        Assert.Throws<DiskException>(() => AccessList.Read("/dev/zero", Length));
        Assert.Throws<DiskException>(() => AccessList.Read(_folder.File("absent"), Length));
        Assert.Throws<DiskException>(() => AccessList.Read(_folder.Path, Length));
        Assert.Throws<DiskException>(() => new AccessRecord(_folder.Path, Length, _stops.Add));
        Assert.Throws<DiskException>(() => new AccessRecord("/dev/full", Length, _stops.Add));
        Assert.Throws<DiskException>(() => new AccessRecord(_folder.File("no/folder"), Length, _stops.Add));
    }

    [Fact]
    public async Task Reads_are_recorded_and_of_writes_the_blocks_that_are_written_in_part()
    {
        using var memory = new MemoryDisk(Length);
        using (AccessRecord record = Open())
        {
            using var disk = new RecordingDisk(memory, record);
            byte[] buffer = new byte[3 * Block];
            Assert.True(disk.TryRead(0, buffer.AsSpan(0, Block)));
            await disk.ReadAsync(2 * Block, buffer.AsMemory(0, Block));
            Assert.True(disk.TryWrite(10 * Block, buffer)); // whole blocks
            await disk.WriteAsync((20 * Block) + 1, buffer.AsMemory(0, (2 * Block) - 1), durable: false);
            await disk.ZeroAsync(30 * Block, Block + 1, ZeroMode.None, durable: false);
            await disk.WriteAsync(Length - 100, buffer.AsMemory(0, 100), durable: false); // the short last block
            await disk.TrimAsync((40 * Block) + 1, 100, durable: false);
        }

        Assert.Equal([new(0, 1), new(2, 1), new(20, 1), new(31, 1)], List());
    }
}
