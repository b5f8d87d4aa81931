using System.Buffers.Binary;
using System.Globalization;
using System.IO.Hashing;
using Xnbd.Linux;
using Xnbd.Storage.Images;
using Xnbd.Storage.Maps;

namespace Xnbd.Storage.Layers;

/// <summary>
/// Records what the base of a layer is, and validates that it is still the same: over another base, a layer's blocks
/// are nonsense. A base is known by its length, its version (<see cref="SourceIdentity.Version"/>) and a hash of
/// sampled blocks.
/// </summary>
internal static class BaseIdentity
{
    /// <summary>How many blocks of a base are sampled: reading them takes a few milliseconds on a cold disk.</summary>
    private const int SampledBlocks = 64;

    /// <summary>What a disk is now.</summary>
    /// <param name="path">Where it stands.</param>
    /// <param name="disk">The open disk.</param>
    /// <param name="isKept">Something will be bound to it that outlives the machine's run.</param>
    /// <exception cref="DiskException">It cannot be read or synced, or its path is too long.</exception>
    public static SourceIdentity Of(string path, Disk disk, bool isKept = true)
    {
        if (!MapHeader.FitsPath(path))
            throw new DiskException(DiskError.NotSupported, $"the path of '{path}' is too long to be recorded");

        // The version comes first: what is written from now on must make a difference.
        long version = (disk as ImageFile)?.GetVersion(isKept) ?? 0;
        long count = BlockRange.CountOf(disk.Length), samples = Math.Min(count, SampledBlocks);
        var blocks = new List<long>();
        for (long i = 0; i < samples; i++)
            blocks.Add(SampledBlock(i, samples, count));
        UInt128 sample = Sample(disk, blocks);
        if (disk is CowDisk layered)
        {
            MapHeader header = layered.Map.Header;
            UInt128 id = BinaryPrimitives.ReadUInt128LittleEndian(header.Id.ToByteArray());
            return new SourceIdentity(path, disk.Length, header.Generation, sample ^ id);
        }

        return new SourceIdentity(path, disk.Length, version, sample);
    }

    /// <summary>
    /// Samples the blocks of a base that a layer does not hold. A commit leaves these as they are, so by them the base
    /// is known again when the commit is resumed.
    /// </summary>
    public static UInt128 SampleAbsent(BlockMap map, Disk baseDisk)
    {
        long absent = map.Count(BlockState.Absent), next = 0, passed = 0;
        long samples = Math.Min(absent, SampledBlocks);
        var blocks = new List<long>();
        foreach ((BlockRange run, BlockState state) in map.Runs())
        {
            if (state != BlockState.Absent)
                continue;
            for (; next < samples && SampledBlock(next, samples, absent) < passed + run.Count; next++)
                blocks.Add(run.First + SampledBlock(next, samples, absent) - passed);
            passed += run.Count;
        }

        return Sample(baseDisk, blocks);
    }

    /// <summary>Throws unless a layer and a base are disks of one length.</summary>
    /// <exception cref="DiskException">They are not.</exception>
    public static void ValidateLength(string layerPath, long layerLength, string basePath, long baseLength)
    {
        if (layerLength != baseLength)
        {
            throw new DiskException(
                DiskError.Mismatch,
                $"layer '{layerPath}' is of a disk of {layerLength} bytes; '{basePath}' has {baseLength} bytes");
        }
    }

    /// <summary>Throws unless a base is what the layer was made on.</summary>
    /// <param name="layer">The layer.</param>
    /// <param name="actual">What the base is now.</param>
    /// <param name="flags"><see cref="MapFlags.BaseIsLayer"/> if the base is a layer now.</param>
    /// <param name="force">Accept a base that has changed, and call <paramref name="warn"/> instead.</param>
    /// <param name="warn">Receives what has changed.</param>
    /// <exception cref="DiskException">The base has changed, or a commit was interrupted.</exception>
    public static void Validate(LayerFile layer, SourceIdentity actual, MapFlags flags, bool force, Action<string> warn)
    {
        MapHeader header = layer.Map.Header;
        if ((header.Flags & MapFlags.Committing) != 0)
        {
            throw new DiskException(
                DiskError.Permission,
                $"a commit of layer '{layer.Path}' into its base was interrupted",
                Remedy.CompleteCommit,
                layer.Path);
        }

        ValidateLength(layer.Path, header.Source.Length, actual.Path, actual.Length);
        List<string> differences = Compare(header, actual, flags);
        if (differences.Count == 0)
            return;
        string message = $"'{actual.Path}' is not as it was when layer '{layer.Path}' was made on it "
            + $"({string.Join("; ", differences)})";
        if (!force)
            throw new DiskException(DiskError.Mismatch, message, Remedy.BindToChangedBase);
        warn(message);
    }

    /// <summary>Throws unless a base is the one that an interrupted commit has begun with.</summary>
    /// <exception cref="DiskException">It is another one.</exception>
    public static void ValidateResumed(LayerFile layer, string basePath, Disk baseDisk)
    {
        SourceIdentity known = layer.Map.Header.Source;
        if (known.Length != baseDisk.Length || known.Sample != SampleAbsent(layer.Map, baseDisk))
        {
            throw new DiskException(
                DiskError.Mismatch,
                $"the interrupted commit of layer '{layer.Path}' had begun with another base than '{basePath}' is now; "
                    + $"it began with '{known.Path}'");
        }
    }

    private static List<string> Compare(MapHeader header, SourceIdentity actual, MapFlags flags)
    {
        SourceIdentity known = header.Source;
        bool isLayer = (flags & MapFlags.BaseIsLayer) != 0;
        var differences = new List<string>();
        if (((header.Flags ^ flags) & MapFlags.BaseIsLayer) != 0)
            differences.Add(isLayer ? "it is a layer, and was an image" : "it is an image, and was a layer");
        else if (!DeviceVersion.AreEqual(known.Version, actual.Version))
        {
            differences.Add(isLayer ? "a server or a commit has written it since, or it was emptied"
                : IsDevice(actual) && actual.Version < 0 ? DeviceVersion.Describe(known.Version, actual.Version)
                : $"modified {Time(actual.Version)}, was {Time(known.Version)}");
        }

        if (known.Sample != actual.Sample)
            differences.Add("its contents differ");
        return differences;
    }

    /// <summary>The index of a sampled block: the first block, the last one, and others at equal distances.</summary>
    private static long SampledBlock(long sample, long samples, long count)
        => samples == 1 ? 0 : (long)((Int128)sample * (count - 1) / (samples - 1));

    private static UInt128 Sample(Disk disk, List<long> blocks)
    {
        var hash = new XxHash128();
        byte[] block = new byte[BlockRange.BlockSize];
        foreach (long index in blocks)
        {
            int length = (int)new BlockRange(index, 1).LengthOn(disk.Length);
            Memory<byte> part = block.AsMemory(0, length);
            disk.ReadAsync(index * BlockRange.BlockSize, part).AsTask().GetAwaiter().GetResult();
            hash.Append(part.Span);
        }

        return hash.GetCurrentHashAsUInt128();
    }

    private static bool IsDevice(SourceIdentity source)
        => LinuxFile.Status(source.Path, out FileStatus status) == Errno.None && status.Kind == FileKind.BlockDevice;

    private static string Time(long nanoseconds)
    {
        if (nanoseconds <= 0)
            return "at no known time";
        DateTime time = DateTime.UnixEpoch.AddTicks(nanoseconds / 100);
        return time.ToString("yyyy-MM-dd HH:mm:ss.fffffff", CultureInfo.InvariantCulture)
            + (nanoseconds % 100).ToString("00'Z'", CultureInfo.InvariantCulture);
    }
}
