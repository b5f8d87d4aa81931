using System.Buffers.Binary;
using System.Globalization;
using System.IO.Hashing;
using Xnbd.Linux;
using Xnbd.Storage.Images;
using Xnbd.Storage.Maps;

namespace Xnbd.Storage.Layers;

/// <summary>
/// Composes copy-on-write disks: a base image, and layers over it, from the bottom up. Each layer knows what it stands
/// on (<see cref="SourceIdentity"/>), and is refused on anything else: over another base, its blocks are nonsense.
/// </summary>
public static class LayerStack
{
    /// <summary>How many blocks of a base are looked at to tell whether it has changed: a few milliseconds of a cold disk's time.</summary>
    private const int SampledBlocks = 64;

    private const string DisposableInfix = ".cow";
    private const string DisposableSuffix = ".layer1";

    /// <summary>A disk over a base, whose changes go when it is closed.</summary>
    /// <param name="basePath">The base image.</param>
    /// <param name="directory">Where the layer goes; null for the base's directory.</param>
    /// <param name="readOnly">It is not to be written.</param>
    /// <param name="removed">Told of each layer that a killed server had left behind, and that was removed.</param>
    /// <exception cref="DiskException">The base cannot be opened, or the layer cannot be made.</exception>
    public static Disk OpenDisposable(string basePath, string? directory, bool readOnly, Action<string> removed)
    {
        if (directory is null && LinuxFile.Status(basePath, out FileStatus status) == Errno.None && status.Kind == FileKind.BlockDevice)
        {
            throw new DiskException(
                DiskError.NotSupported,
                $"'{basePath}' is a device: a layer cannot be made beside it",
                Remedy.NameLayerDirectory);
        }

        ImageFile baseImage = ImageFile.Open(basePath, readOnly: true, ImageUse.Base);
        try
        {
            string prefix = Path.GetFullPath(basePath);
            if (directory is not null)
                prefix = Path.Combine(Path.GetFullPath(directory), Path.GetFileName(prefix));
            prefix += DisposableInfix;
            foreach (string path in LockedFile.RemoveAbandoned(prefix, DisposableSuffix, LayerFile.IsDisposable))
                removed(path);

            SourceIdentity source = Identify(Path.GetFullPath(basePath), baseImage, isKept: false);
            LayerFile? layer = null;
            for (int number = 0; layer is null; number++)
                layer = LayerFile.TryCreateDisposable(prefix + number.ToString(CultureInfo.InvariantCulture) + DisposableSuffix, source);
            return new CowDisk(baseImage, layer, readOnly);
        }
        catch
        {
            baseImage.Dispose();
            throw;
        }
    }

    /// <summary>A disk over a base and layers that are kept. Only the topmost is written; it is made if it is absent.</summary>
    /// <param name="basePath">The base image.</param>
    /// <param name="layerPaths">At least one, from the bottom up.</param>
    /// <param name="readOnly">It is not to be written; then all layers must be there.</param>
    /// <param name="force">Take layers over a base that has changed since they were made.</param>
    /// <param name="warn">Told what <paramref name="force"/> had to overlook.</param>
    /// <exception cref="DiskException">A file cannot be opened, or a base has changed.</exception>
    public static Disk OpenKept(string basePath, IReadOnlyList<string> layerPaths, bool readOnly, bool force, Action<string> warn)
    {
        Disk disk = ImageFile.Open(basePath, readOnly: true, ImageUse.Base);
        string below = Path.GetFullPath(basePath);
        try
        {
            for (int i = 0; i < layerPaths.Count; i++)
            {
                string path = Path.GetFullPath(layerPaths[i]);
                bool isTop = i == layerPaths.Count - 1, isWritten = isTop && !readOnly;
                SourceIdentity source = Identify(below, disk, isKept: !readOnly);
                MapFlags flags = i == 0 ? MapFlags.None : MapFlags.BaseIsLayer;
                if (isTop && LinuxFile.Status(path, out _) == Errno.ENOENT)
                {
                    if (readOnly)
                    {
                        throw new DiskException(
                            DiskError.Permission,
                            $"there is no layer '{path}'; none is made for a disk that is only read");
                    }

                    disk = new CowDisk(disk, LayerFile.Create(path, source, flags), readOnly: false);
                    return disk;
                }

                LayerFile layer = OpenSettled(path, isWritten, isStackWritten: !readOnly);
                try
                {
                    CheckBase(layer, source, flags, force, warn);
                    if (isWritten)
                        StartWriting(layer, source, flags);
                    disk = Compose(disk, layer, readOnly: !isWritten);
                }
                catch
                {
                    layer.Dispose();
                    throw;
                }

                below = path;
            }

            return disk;
        }
        catch
        {
            disk.Dispose();
            throw;
        }
    }

    /// <summary>The image at the bottom of a disk; null if it stands on no image.</summary>
    public static ImageFile? ImageOf(Disk disk)
    {
        while (disk is CowDisk layered)
            disk = layered.Base;
        return disk as ImageFile;
    }

    /// <summary>Removes a disposable layer while operations may still be under way, for a process that ends at once.</summary>
    public static void Abandon(Disk disk) => (disk as CowDisk)?.File.RemoveIfDisposable();

    /// <summary>A layer and all that it stands on, as its header names it.</summary>
    /// <param name="path">The layer.</param>
    /// <param name="basePath">Where its base stands now; null for where the header says.</param>
    /// <param name="readOnly">It is only read.</param>
    /// <param name="writableBase">Its base is to be written, too: then nobody else may be using it.</param>
    /// <param name="resumes">A commit that was interrupted is to be resumed; otherwise such a layer is refused.</param>
    /// <param name="isStackWritten">Something that stands on it is written; of course so if it is not only read
    /// itself.</param>
    internal static CowDisk OpenByHeader(
        string path, string? basePath = null, bool readOnly = true, bool writableBase = false, bool resumes = false,
        bool isStackWritten = false)
    {
        isStackWritten |= !readOnly;
        LayerFile layer = OpenSettled(path, isWritten: !readOnly, isStackWritten);
        Disk? disk = null;
        try
        {
            MapHeader header = layer.Map.Header;
            string below = Path.GetFullPath(basePath ?? header.Source.Path);
            disk = OpenBase(below, (header.Flags & MapFlags.BaseIsLayer) != 0, isStackWritten, writableBase);
            if (resumes && (header.Flags & MapFlags.Committing) != 0)
                CheckCommitted(layer, below, disk);
            else
            {
                SourceIdentity source = Identify(below, disk, isKept: isStackWritten);
                CheckBase(layer, source, header.Flags & MapFlags.BaseIsLayer, force: false, _ => { });
            }

            if (!readOnly)
                layer.Map.PrepareToWrite();
            return Compose(disk, layer, readOnly);
        }
        catch
        {
            disk?.Dispose();
            layer.Dispose();
            throw;
        }
    }

    /// <summary>What a layer stands on: an image, or a layer on a base of its own.</summary>
    /// <param name="path">Where it stands.</param>
    /// <param name="isLayer">It is a layer.</param>
    /// <param name="isStackWritten">Something that stands on it is written.</param>
    /// <param name="writable">It is to be written itself.</param>
    internal static Disk OpenBase(string path, bool isLayer, bool isStackWritten, bool writable = false)
        => isLayer
            ? OpenByHeader(path, readOnly: !writable, isStackWritten: isStackWritten)
            : ImageFile.Open(path, readOnly: !writable, writable ? ImageUse.Alone : ImageUse.Base);

    /// <summary>
    /// Samples the blocks of a base that a layer does not hold: those that a commit leaves as they are, by which the base is
    /// known again when the commit is resumed.
    /// </summary>
    internal static UInt128 SampleAbsent(BlockMap map, Disk baseDisk)
    {
        long absent = map.Count(BlockState.Absent), next = 0, passed = 0;
        long samples = Math.Min(absent, SampledBlocks);
        var blocks = new List<long>();
        foreach ((BlockRange run, BlockState state) in map.Runs())
        {
            if (state != BlockState.Absent)
                continue;
            for (; next < samples && Ordinal(next, samples, absent) < passed + run.Count; next++)
                blocks.Add(run.First + Ordinal(next, samples, absent) - passed);
            passed += run.Count;
        }

        return Sample(baseDisk, blocks);
    }

    private static CowDisk Compose(Disk below, LayerFile layer, bool readOnly)
    {
        var disk = new CowDisk(below, layer, readOnly);
        disk.SettleAsync().AsTask().GetAwaiter().GetResult();
        return disk;
    }

    /// <summary>
    /// Opens a layer. One that will only be read must be durable as it is found: what stands on it is bound to it, and a flush
    /// of what stands on it covers it. If a server of it was killed, it is settled first, which needs it alone for a moment.
    /// </summary>
    /// <remarks>
    /// On a read-only file system it cannot be settled. If nothing that stands on it is written, it is taken as its map
    /// says: nobody's flush relies on it, and nothing will be bound to it. The map is right: in the run of the machine
    /// in which the server was killed, the live one, since a file system becomes read-only by writing all back that was
    /// in memory; and later the durable one. Nobody changes it meanwhile: it is locked, and not even another mount of
    /// the file system, which may be writable, lets this program past the lock.
    /// </remarks>
    private static LayerFile OpenSettled(string path, bool isWritten, bool isStackWritten)
    {
        LayerFile layer = LayerFile.Open(path, readOnly: !isWritten);
        try
        {
            MapFlags flags = layer.Map.Header.Flags;
            if (isWritten && (flags & MapFlags.Disposable) != 0)
                throw new DiskException(DiskError.Permission, $"layer '{path}' was made to be thrown away; it can only be exported or compared");
            if ((flags & MapFlags.Discarding) != 0)
            {
                throw new DiskException(
                    DiskError.Permission, $"layer '{path}' was being emptied", Remedy.CompleteDiscard, path);
            }

            if (isWritten || (flags & MapFlags.Disposable) != 0)
                return layer;
            if (!layer.Map.IsCommitted)
            {
                if (!isStackWritten && layer.IsOnReadOnlyFileSystem)
                    return layer;
                layer.Dispose();
                layer = LayerFile.Open(path, readOnly: false);
                layer.Map.PrepareToWrite();
                layer.Data.SyncContents();
                layer.Map.Commit();
                layer.Dispose();
                layer = LayerFile.Open(path, readOnly: true);
            }

            layer.Data.SyncContents();
            return layer;
        }
        catch
        {
            layer.Dispose();
            throw;
        }
    }

    private static void StartWriting(LayerFile layer, SourceIdentity source, MapFlags flags)
    {
        layer.Map.PrepareToWrite();
        layer.Map.ChangeHeader(header => header with
        {
            Source = source,
            Flags = (header.Flags & ~MapFlags.BaseIsLayer) | flags,
            Generation = header.Generation + 1,
        });
    }

    /// <summary>What a disk is, so that it is known again, and known to be unchanged.</summary>
    /// <param name="path">Where it stands.</param>
    /// <param name="disk">The open disk.</param>
    /// <param name="isKept">Something will be bound to it that outlives the machine.</param>
    internal static SourceIdentity Identify(string path, Disk disk, bool isKept = true)
    {
        if (!MapHeader.FitsPath(path))
            throw new DiskException(DiskError.NotSupported, $"the path of '{path}' is too long to be recorded");

        // First the version: what is written from now on must make a difference.
        long version = (disk as ImageFile)?.GetVersion(isKept) ?? 0;
        long count = BlockRange.CountOf(disk.Length), samples = Math.Min(count, SampledBlocks);
        var blocks = new List<long>();
        for (long i = 0; i < samples; i++)
            blocks.Add(Ordinal(i, samples, count));
        UInt128 sample = Sample(disk, blocks);
        if (disk is CowDisk layered)
            return new SourceIdentity(path, disk.Length, layered.Map.Header.Generation, sample ^ BinaryPrimitives.ReadUInt128LittleEndian(layered.Map.Header.Id.ToByteArray()));
        return new SourceIdentity(path, disk.Length, version, sample);
    }

    /// <summary>The number of a sample's block: the first, the last, and others at equal distances.</summary>
    private static long Ordinal(long index, long samples, long count) => samples == 1 ? 0 : (long)((Int128)index * (count - 1) / (samples - 1));

    private static UInt128 Sample(Disk disk, List<long> blocks)
    {
        var hash = new XxHash128();
        byte[] block = new byte[BlockRange.BlockSize];
        foreach (long index in blocks)
        {
            int length = (int)new BlockRange(index, 1).LengthOn(disk.Length);
            disk.ReadAsync(index * BlockRange.BlockSize, block.AsMemory(0, length)).AsTask().GetAwaiter().GetResult();
            hash.Append(block.AsSpan(0, length));
        }

        return hash.GetCurrentHashAsUInt128();
    }

    /// <exception cref="DiskException">The base is not the one that the commit has begun with.</exception>
    private static void CheckCommitted(LayerFile layer, string below, Disk disk)
    {
        SourceIdentity known = layer.Map.Header.Source;
        if (known.Length != disk.Length || known.Sample != SampleAbsent(layer.Map, disk))
        {
            throw new DiskException(
                DiskError.Mismatch,
                $"the commit of layer '{layer.Path}' that was interrupted had begun with another base than '{below}' is now; it began with '{known.Path}'");
        }
    }

    /// <exception cref="DiskException">The base is not what the layer was made on.</exception>
    private static void CheckBase(LayerFile layer, SourceIdentity actual, MapFlags flags, bool force, Action<string> warn)
    {
        MapHeader header = layer.Map.Header;
        SourceIdentity known = header.Source;
        if ((header.Flags & MapFlags.Committing) != 0)
        {
            throw new DiskException(
                DiskError.Permission,
                $"a commit of layer '{layer.Path}' into its base was interrupted",
                Remedy.CompleteCommit,
                layer.Path);
        }

        if (known.Length != actual.Length)
        {
            throw new DiskException(
                DiskError.Mismatch,
                $"layer '{layer.Path}' is of a disk of {known.Length} bytes; '{actual.Path}' has {actual.Length} bytes");
        }

        var differences = new List<string>();
        if (((header.Flags ^ flags) & MapFlags.BaseIsLayer) != 0)
            differences.Add((flags & MapFlags.BaseIsLayer) != 0 ? "it is a layer, and was an image" : "it is an image, and was a layer");
        else if (!DeviceVersion.AreEqual(known.Version, actual.Version))
        {
            differences.Add((flags & MapFlags.BaseIsLayer) != 0 ? "it has been served to be written, or emptied, since"
                : IsDevice(actual) && actual.Version < 0 ? DeviceVersion.Describe(known.Version, actual.Version)
                : $"modified {Time(actual.Version)}, was {Time(known.Version)}");
        }

        if (known.Sample != actual.Sample)
            differences.Add("its contents differ");
        if (differences.Count == 0)
            return;

        string message = $"'{actual.Path}' is not as it was when layer '{layer.Path}' was made on it ({string.Join("; ", differences)})";
        if (!force)
            throw new DiskException(DiskError.Mismatch, message, Remedy.BindToChangedBase);
        warn(message);
    }

    private static bool IsDevice(SourceIdentity source)
        => LinuxFile.Status(source.Path, out FileStatus status) == Errno.None && status.Kind == FileKind.BlockDevice;

    private static string Time(long nanoseconds)
        => nanoseconds <= 0
            ? "at no known time"
            : DateTime.UnixEpoch.AddTicks(nanoseconds / 100).ToString("yyyy-MM-dd HH:mm:ss.fffffff", CultureInfo.InvariantCulture)
                + (nanoseconds % 100).ToString("00'Z'", CultureInfo.InvariantCulture);
}
