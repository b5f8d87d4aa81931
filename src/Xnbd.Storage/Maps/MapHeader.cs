using System.Buffers.Binary;
using System.IO.Hashing;
using System.Text;

namespace Xnbd.Storage.Maps;

/// <summary>What a disk under a map was when the map was made: a map says nothing about any other disk.</summary>
/// <param name="Path">Where it stands, for people and tools.</param>
/// <param name="Length">In bytes.</param>
/// <param name="Version">
/// Differs when it was changed: of an image's file the time of its last change, in nanoseconds since 1970, and 0 for what has
/// no such time; of a layer its <see cref="MapHeader.Generation"/>.
/// </param>
/// <param name="Sample">A hash of sampled blocks, and of a layer's id.</param>
internal sealed record SourceIdentity(string Path, long Length, long Version, UInt128 Sample);

/// <summary>What a map's file says about itself.</summary>
[Flags]
public enum MapFlags
{
    /// <summary>Nothing special.</summary>
    None = 0,

    /// <summary>The layer is removed when its server ends, and by the next server if that was killed.</summary>
    Disposable = 1,

    /// <summary>The layer is being committed into its base, which is therefore neither the old nor the new one.</summary>
    Committing = 2,

    /// <summary>The base is a layer itself, not an image.</summary>
    BaseIsLayer = 4,

    /// <summary>The layer is being emptied: what is left in it means nothing any more.</summary>
    Discarding = 8,

    /// <summary>It is a cache's map, in a file of its own; the data stand in another one.</summary>
    Cache = 16,

    /// <summary>Of a cache: blocks that count as fetched may hold what was written here, since it was switched to, or the machine has died amid writes.</summary>
    MayHoldWrites = 32,

    /// <summary>
    /// Of a cache: it was switched to. The image is complete, and is the disk without the map. A proxy that goes on
    /// with it takes the flag back.
    /// </summary>
    Switched = 64,
}

/// <summary>
/// The header of a map's file: one page, of which there are two copies, written in turn, so that a torn write leaves the
/// other one (docs/formats.md).
/// </summary>
internal sealed record MapHeader
{
    /// <summary>Of one copy, in bytes.</summary>
    public const int Size = 4096;

    private const uint Version = 1;
    private const int PathLengthAt = 120;
    private const int PathAt = 124;
    private const int HashAt = Size - 8;

    /// <summary>The longest path, in bytes of UTF-8.</summary>
    private const int MaxPathBytes = 3840;

    private static ReadOnlySpan<byte> Magic => "xNBD-MAP"u8;

    /// <summary>Grows with each writing; the copy with the greater one counts.</summary>
    public ulong Sequence { get; init; }

    /// <summary>Tells this map from all others.</summary>
    public required Guid Id { get; init; }

    /// <summary>The boot during which the live map is right.</summary>
    public required Guid BootId { get; init; }

    public required MapFlags Flags { get; init; }

    /// <summary>Where the blocks' data begins in the same file, in bytes.</summary>
    public required long DataStart { get; init; }

    /// <summary>The disk that the blocks come from; its length is the map's.</summary>
    public required SourceIdentity Source { get; init; }

    /// <summary>Grows each time when the layer is opened to be written by clients, or is emptied: who stands on it sees another disk then.</summary>
    public long Generation { get; init; }

    /// <summary>With <see cref="MapFlags.Committing"/>: up to here, in bytes, the base has everything, and it is durable.</summary>
    public long CommitPosition { get; init; }

    /// <summary>A path that fits.</summary>
    public static bool FitsPath(string path) => Encoding.UTF8.GetByteCount(path) <= MaxPathBytes;

    public static bool HasMagic(ReadOnlySpan<byte> copy) => copy.StartsWith(Magic);

    /// <summary>Reads one copy.</summary>
    /// <returns>Null when it is torn, or never was one.</returns>
    /// <exception cref="DiskException">It is of a later version.</exception>
    public static MapHeader? TryRead(ReadOnlySpan<byte> copy)
    {
        if (!HasMagic(copy) || BinaryPrimitives.ReadUInt64LittleEndian(copy[HashAt..]) != XxHash3.HashToUInt64(copy[..HashAt]))
            return null;
        uint version = BinaryPrimitives.ReadUInt32LittleEndian(copy[8..]);
        int pathLength = BinaryPrimitives.ReadInt32LittleEndian(copy[PathLengthAt..]);
        if (version != Version || pathLength is < 0 or > MaxPathBytes)
            throw new DiskException(DiskError.Damaged, $"it has format version {version}; this program knows version {Version}");
        return new MapHeader
        {
            Sequence = BinaryPrimitives.ReadUInt64LittleEndian(copy[16..]),
            Id = new Guid(copy.Slice(24, 16)),
            BootId = new Guid(copy.Slice(40, 16)),
            Flags = (MapFlags)BinaryPrimitives.ReadUInt32LittleEndian(copy[12..]),
            DataStart = BinaryPrimitives.ReadInt64LittleEndian(copy[96..]),
            CommitPosition = BinaryPrimitives.ReadInt64LittleEndian(copy[104..]),
            Generation = BinaryPrimitives.ReadInt64LittleEndian(copy[112..]),
            Source = new SourceIdentity(
                Encoding.UTF8.GetString(copy.Slice(PathAt, pathLength)),
                BinaryPrimitives.ReadInt64LittleEndian(copy[56..]),
                BinaryPrimitives.ReadInt64LittleEndian(copy[72..]),
                BinaryPrimitives.ReadUInt128LittleEndian(copy[80..])),
        };
    }

    /// <summary>Writes one copy.</summary>
    public void Write(Span<byte> copy)
    {
        copy[..Size].Clear();
        Magic.CopyTo(copy);
        BinaryPrimitives.WriteUInt32LittleEndian(copy[8..], Version);
        BinaryPrimitives.WriteUInt32LittleEndian(copy[12..], (uint)Flags);
        BinaryPrimitives.WriteUInt64LittleEndian(copy[16..], Sequence);
        Id.TryWriteBytes(copy[24..]);
        BootId.TryWriteBytes(copy[40..]);
        BinaryPrimitives.WriteInt64LittleEndian(copy[56..], Source.Length);
        BinaryPrimitives.WriteInt32LittleEndian(copy[64..], BlockRange.BlockSize);
        BinaryPrimitives.WriteInt64LittleEndian(copy[72..], Source.Version);
        BinaryPrimitives.WriteUInt128LittleEndian(copy[80..], Source.Sample);
        BinaryPrimitives.WriteInt64LittleEndian(copy[96..], DataStart);
        BinaryPrimitives.WriteInt64LittleEndian(copy[104..], CommitPosition);
        BinaryPrimitives.WriteInt64LittleEndian(copy[112..], Generation);
        int pathLength = Encoding.UTF8.GetBytes(Source.Path, copy[PathAt..HashAt]);
        BinaryPrimitives.WriteInt32LittleEndian(copy[PathLengthAt..], pathLength);
        BinaryPrimitives.WriteUInt64LittleEndian(copy[HashAt..], XxHash3.HashToUInt64(copy[..HashAt]));
    }
}
