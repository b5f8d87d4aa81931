using System.Buffers.Binary;
using System.IO.Hashing;
using System.Text;

namespace Xnbd.Storage.Maps;

/// <summary>What the disk under a map was when the map was made: a map says nothing about any other disk.</summary>
/// <param name="Path">Where the disk stands, for people and tools.</param>
/// <param name="Length">Length of the disk in bytes.</param>
/// <param name="Version">
/// A number that differs when the disk was changed: for an image's file the time of its last change, in nanoseconds
/// since 1970; for a layer its <see cref="MapHeader.Generation"/>; for a device a number made of the kernel's counters;
/// 0 for the origin of a cache.
/// </param>
/// <param name="Sample">A hash of sampled blocks, and of a layer's id.</param>
internal sealed record SourceIdentity(string Path, long Length, long Version, UInt128 Sample);

/// <summary>What a map's file says about itself.</summary>
[Flags]
internal enum MapFlags
{
    /// <summary>Nothing special.</summary>
    None = 0,

    /// <summary>The layer is removed when its server ends, and by the next server if that one was killed.</summary>
    Disposable = 1,

    /// <summary>
    /// The layer is being committed into its base, which is therefore neither the old disk nor the new one.
    /// </summary>
    Committing = 2,

    /// <summary>The base is a layer itself, not an image.</summary>
    BaseIsLayer = 4,

    /// <summary>The layer is being emptied: what is left in it means nothing any more.</summary>
    Discarding = 8,

    /// <summary>The map belongs to a cache: it has a file of its own, and the data stands in another file.</summary>
    Cache = 16,

    /// <summary>
    /// Of a cache: blocks that count as fetched may hold what was written here, since the proxy was switched to a
    /// target, or since the machine died while writes were under way.
    /// </summary>
    MayHoldWrites = 32,

    /// <summary>
    /// Of a cache: the proxy was switched to a target. The image is complete, and is the disk without the map. A
    /// proxy that goes on with the cache takes the flag back.
    /// </summary>
    Switched = 64,
}

/// <summary>
/// The header of a map's file (docs/formats.md): one page, of which there are two copies, written in turn, so that a
/// torn write leaves the other copy.
/// </summary>
internal sealed record MapHeader
{
    /// <summary>Length of one copy in bytes.</summary>
    public const int Size = 4096;

    private const uint FormatVersion = 1;

    /// <summary>The length of the longest path, in bytes of UTF-8.</summary>
    private const int MaxPathBytes = 3840;

    private static ReadOnlySpan<byte> Magic => "xNBD-MAP"u8;

    /// <summary>Where the fields stand in a copy, in bytes.</summary>
    private static class At
    {
        public const int Magic = 0;
        public const int FormatVersion = 8;
        public const int Flags = 12;
        public const int Sequence = 16;
        public const int Id = 24;
        public const int BootId = 40;
        public const int DiskLength = 56;
        public const int BlockSize = 64;
        public const int SourceVersion = 72;
        public const int Sample = 80;
        public const int DataStart = 96;
        public const int CommitPosition = 104;
        public const int Generation = 112;
        public const int PathLength = 120;
        public const int Path = 124;
        public const int Checksum = Size - 8;
    }

    /// <summary>Grows with each writing; of two whole copies the one with the greater number counts.</summary>
    public ulong Sequence { get; init; }

    /// <summary>Tells this map from all others.</summary>
    public required Guid Id { get; init; }

    /// <summary>The run of the machine during which the live map is right.</summary>
    public required Guid BootId { get; init; }

    /// <summary>What kind of map this is, and what is being done to it.</summary>
    public required MapFlags Flags { get; init; }

    /// <summary>Where the blocks' data begins in the same file, in bytes.</summary>
    public required long DataStart { get; init; }

    /// <summary>The disk that absent blocks are read from; its length is the map's.</summary>
    public required SourceIdentity Source { get; init; }

    /// <summary>
    /// Grows each time the layer is opened to be written by clients, is written by a commit of a layer above, or is
    /// emptied: what stands on the layer sees another disk then.
    /// </summary>
    public long Generation { get; init; }

    /// <summary>
    /// With <see cref="MapFlags.Committing"/>: up to this offset, in bytes, the base has everything, and it is durable.
    /// </summary>
    public long CommitPosition { get; init; }

    /// <summary>Whether a path is short enough to be recorded.</summary>
    public static bool FitsPath(string path) => Encoding.UTF8.GetByteCount(path) <= MaxPathBytes;

    /// <summary>Whether bytes begin as a copy does.</summary>
    public static bool HasMagic(ReadOnlySpan<byte> copy) => copy.StartsWith(Magic);

    /// <summary>Reads one copy.</summary>
    /// <returns>Null when the copy is torn, or never was one.</returns>
    /// <exception cref="DiskException">
    /// It has a later version or another block size (<see cref="DiskError.NotSupported"/>), or its path is too long
    /// (<see cref="DiskError.Damaged"/>).
    /// </exception>
    public static MapHeader? TryRead(ReadOnlySpan<byte> copy)
    {
        if (!HasMagic(copy))
            return null;
        ulong checksum = BinaryPrimitives.ReadUInt64LittleEndian(copy[At.Checksum..]);
        if (checksum != XxHash3.HashToUInt64(copy[..At.Checksum]))
            return null;
        uint version = BinaryPrimitives.ReadUInt32LittleEndian(copy[At.FormatVersion..]);
        int blockSize = BinaryPrimitives.ReadInt32LittleEndian(copy[At.BlockSize..]);
        int pathLength = BinaryPrimitives.ReadInt32LittleEndian(copy[At.PathLength..]);
        if (version != FormatVersion)
        {
            throw new DiskException(
                DiskError.NotSupported, $"it has format version {version}; this program knows version {FormatVersion}");
        }

        if (blockSize != BlockRange.BlockSize)
        {
            throw new DiskException(
                DiskError.NotSupported,
                $"it has blocks of {blockSize} bytes; this program knows blocks of {BlockRange.BlockSize} bytes");
        }

        if (pathLength is < 0 or > MaxPathBytes)
            throw new DiskException(DiskError.Damaged, $"its header is damaged: its path has {pathLength} bytes");
        return new MapHeader
        {
            Sequence = BinaryPrimitives.ReadUInt64LittleEndian(copy[At.Sequence..]),
            Id = new Guid(copy.Slice(At.Id, 16)),
            BootId = new Guid(copy.Slice(At.BootId, 16)),
            Flags = (MapFlags)BinaryPrimitives.ReadUInt32LittleEndian(copy[At.Flags..]),
            DataStart = BinaryPrimitives.ReadInt64LittleEndian(copy[At.DataStart..]),
            CommitPosition = BinaryPrimitives.ReadInt64LittleEndian(copy[At.CommitPosition..]),
            Generation = BinaryPrimitives.ReadInt64LittleEndian(copy[At.Generation..]),
            Source = new SourceIdentity(
                Encoding.UTF8.GetString(copy.Slice(At.Path, pathLength)),
                BinaryPrimitives.ReadInt64LittleEndian(copy[At.DiskLength..]),
                BinaryPrimitives.ReadInt64LittleEndian(copy[At.SourceVersion..]),
                BinaryPrimitives.ReadUInt128LittleEndian(copy[At.Sample..])),
        };
    }

    /// <summary>Writes one copy.</summary>
    public void Write(Span<byte> copy)
    {
        copy[..Size].Clear();
        Magic.CopyTo(copy[At.Magic..]);
        BinaryPrimitives.WriteUInt32LittleEndian(copy[At.FormatVersion..], FormatVersion);
        BinaryPrimitives.WriteUInt32LittleEndian(copy[At.Flags..], (uint)Flags);
        BinaryPrimitives.WriteUInt64LittleEndian(copy[At.Sequence..], Sequence);
        Id.TryWriteBytes(copy[At.Id..]);
        BootId.TryWriteBytes(copy[At.BootId..]);
        BinaryPrimitives.WriteInt64LittleEndian(copy[At.DiskLength..], Source.Length);
        BinaryPrimitives.WriteInt32LittleEndian(copy[At.BlockSize..], BlockRange.BlockSize);
        BinaryPrimitives.WriteInt64LittleEndian(copy[At.SourceVersion..], Source.Version);
        BinaryPrimitives.WriteUInt128LittleEndian(copy[At.Sample..], Source.Sample);
        BinaryPrimitives.WriteInt64LittleEndian(copy[At.DataStart..], DataStart);
        BinaryPrimitives.WriteInt64LittleEndian(copy[At.CommitPosition..], CommitPosition);
        BinaryPrimitives.WriteInt64LittleEndian(copy[At.Generation..], Generation);
        int pathLength = Encoding.UTF8.GetBytes(Source.Path, copy[At.Path..At.Checksum]);
        BinaryPrimitives.WriteInt32LittleEndian(copy[At.PathLength..], pathLength);
        BinaryPrimitives.WriteUInt64LittleEndian(copy[At.Checksum..], XxHash3.HashToUInt64(copy[..At.Checksum]));
    }
}
