using System.Buffers.Binary;
using System.Globalization;
using System.IO.Hashing;
using Xnbd.Storage.Maps;

namespace Xnbd.Storage.Tests;

/// <summary>
/// The format of maps on disk stays as it is: the bytes of one map, written down. See docs/formats.md.
/// </summary>
public sealed class MapFormatTests
{
    private const int BlocksPerPage = 16256;
    private const int FileLength = 32768;

    private static readonly Guid s_bootId = new("0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0");

    private static readonly MapHeader s_header = new()
    {
        Id = new Guid("00112233-4455-6677-8899-aabbccddeeff"),
        BootId = s_bootId,
        Flags = MapFlags.Committing | MapFlags.BaseIsLayer,
        DataStart = 1 << 20,
        Source = new SourceIdentity(
            "/images/größe.img",
            ((BlocksPerPage + 10L) * 4096) - 100,
            -5,
            new UInt128(0x0102030405060708, 0x090a0b0c0d0e0f10)),
        Generation = 7,
        CommitPosition = 0x123456789a,
    };

    /// <summary>All bytes of the file that are not zero, in whole words: "offset bytes".</summary>
    private static readonly string[] s_golden =
    [
        // the header: sequence 1
        "4096 784e42442d4d41500100000006000000010000000000000033221100554477668899aabbccddeeff3c2d1e0f5a4b7869"
            + "8796a5b4c3d2e1f09c9ff803000000000010000000000000fbffffffffffffff100f0e0d0c0b0a090807060504030201"
            + "00001000000000009a785634120000000700000000000000130000002f696d616765732f6772c3b6c39f652e696d6700",
        // the header's checksum; the live map of page 0
        "8184 e610ab5e60351ddf2b000000000000000000150000000000",
        // the live map of page 1
        "12256 c0ff0f0000000000",
        // page 0, sequence 1
        "20480 0100000000000000",
        "20496 c040b33b12a06338",
        "20512 2b000000000000000000150000000000",
        // page 1, sequence 1
        "28672 0100000000000000010000000000000066d3f9d0cda1a51f",
        "28704 c0ff0f0000000000",
    ];

    [Theory]
    [InlineData(8, 2, "format version 2")]
    [InlineData(64, 8192, "blocks of 8192 bytes")]
    public void A_header_of_another_version_or_block_size_is_refused(int offset, int value, string reason)
    {
        byte[] copy = new byte[MapHeader.Size];
        s_header.Write(copy);
        Assert.NotNull(MapHeader.TryRead(copy));
        BinaryPrimitives.WriteInt32LittleEndian(copy.AsSpan(offset), value);
        Assert.Null(MapHeader.TryRead(copy)); // the checksum is wrong
        BinaryPrimitives.WriteUInt64LittleEndian(copy.AsSpan()[^8..], XxHash3.HashToUInt64(copy.AsSpan()[..^8]));
        DiskException failure = Assert.Throws<DiskException>(() => MapHeader.TryRead(copy));
        Assert.Equal(DiskError.NotSupported, failure.Error);
        Assert.Contains(reason, failure.Message, StringComparison.Ordinal);
    }

    [Fact]
    public void A_map_has_these_bytes()
    {
        var store = new MemoryStore();
        var map = BlockMap.Create(store, s_header);
        map.Set(new BlockRange(0, 1), BlockState.Written);
        map.Set(new BlockRange(1, 2), BlockState.Zero);
        map.SetFetched(new BlockRange(40, 3));
        map.WriteBehind();
        map.Set(new BlockRange(BlocksPerPage + 3, 7), BlockState.Written);
        map.Commit();
        Assert.Equal(s_golden, Words(store.Bytes));
    }

    [Theory]
    [InlineData(true)]
    [InlineData(false)]
    public void These_bytes_are_read_as_that_map(bool isLive)
    {
        var store = new MemoryStore();
        foreach (string words in s_golden)
        {
            int space = words.IndexOf(' ', StringComparison.Ordinal);
            int offset = int.Parse(words[..space], CultureInfo.InvariantCulture);
            Convert.FromHexString(words[(space + 1)..]).CopyTo(store.Bytes, offset);
        }

        var map = BlockMap.Open(store, isLive ? s_bootId : Guid.NewGuid());
        Assert.Equal(s_header with { Sequence = 1 }, map.Header);
        (BlockRange, BlockState)[] expected =
        [
            (new BlockRange(0, 1), BlockState.Written),
            (new BlockRange(1, 2), BlockState.Zero),
            (new BlockRange(3, 37), BlockState.Absent),
            (new BlockRange(40, 3), BlockState.Fetched),
            (new BlockRange(43, BlocksPerPage + 3 - 43), BlockState.Absent),
            (new BlockRange(BlocksPerPage + 3, 7), BlockState.Written),
        ];
        Assert.Equal(expected, map.Runs());
        Assert.True(map.IsCommitted);
    }

    private static List<string> Words(byte[] bytes)
    {
        var runs = new List<string>();
        for (int at = 0; at < bytes.Length; at += 8)
        {
            int start = at;
            while (at < bytes.Length && bytes.AsSpan(at, 8).ContainsAnyExcept((byte)0))
                at += 8;
            if (at > start)
                runs.Add(string.Create(
                    CultureInfo.InvariantCulture, $"{start} {Convert.ToHexStringLower(bytes[start..at])}"));
        }

        return runs;
    }

    private sealed class MemoryStore : IMapStore
    {
        public byte[] Bytes { get; } = new byte[FileLength];

        public void Read(long offset, Span<byte> buffer) => Bytes.AsSpan((int)offset, buffer.Length).CopyTo(buffer);

        public void Write(long offset, ReadOnlySpan<byte> data) => data.CopyTo(Bytes.AsSpan((int)offset));

        public void Sync()
        {
        }

        public void Allocate(long offset, long length)
        {
        }

        public (long Start, long End) FindData(long offset, long end) => (offset, end);
    }
}
