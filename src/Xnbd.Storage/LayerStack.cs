using System.Globalization;
using System.IO.Hashing;
using Xnbd.Linux;

namespace Xnbd.Storage;

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
        long modified = ModifiedNanoseconds(basePath);
        ImageFile baseImage = ImageFile.Open(basePath, readOnly: true);
        try
        {
            string prefix = Path.GetFullPath(basePath);
            if (directory is not null)
                prefix = Path.Combine(Path.GetFullPath(directory), Path.GetFileName(prefix));
            prefix += DisposableInfix;
            foreach (string path in LockedFile.RemoveAbandoned(prefix, DisposableSuffix, LayerFile.IsDisposable))
                removed(path);

            SourceIdentity source = Identify(Path.GetFullPath(basePath), baseImage, modified);
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
        Disk disk = ImageFile.Open(basePath, readOnly: true);
        string below = Path.GetFullPath(basePath);
        try
        {
            for (int i = 0; i < layerPaths.Count; i++)
            {
                string path = Path.GetFullPath(layerPaths[i]);
                bool isWritten = i == layerPaths.Count - 1 && !readOnly;
                SourceIdentity source = Identify(below, disk, ModifiedNanoseconds(below));
                MapFlags flags = i == 0 ? MapFlags.None : MapFlags.BaseIsLayer;
                LayerFile layer = isWritten && LinuxFile.Status(path, out _) == Errno.ENOENT
                    ? LayerFile.Create(path, source, flags)
                    : OpenOver(path, source, flags, readOnly: !isWritten, force, warn);
                disk = Compose(disk, layer, readOnly: !isWritten);
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

    /// <summary>Removes a disposable layer while operations may still be under way, for a process that ends at once.</summary>
    public static void Abandon(Disk disk) => (disk as CowDisk)?.File.Dispose();

    /// <summary>A layer and all that it stands on, as its header names it.</summary>
    /// <param name="path">The layer.</param>
    /// <param name="basePath">Where its base stands now; null for where the header says.</param>
    /// <param name="readOnly">It is only read.</param>
    /// <param name="writableBase">Its base is to be written, too: then nobody else may be using it.</param>
    /// <param name="resumes">A commit that was interrupted is to be resumed; otherwise such a layer is refused.</param>
    internal static CowDisk OpenByHeader(
        string path, string? basePath = null, bool readOnly = true, bool writableBase = false, bool resumes = false)
    {
        LayerFile layer = LayerFile.Open(path, readOnly);
        Disk? disk = null;
        try
        {
            MapHeader header = layer.Map.Header;
            string below = basePath ?? header.Source.Path;
            long modified = ModifiedNanoseconds(below);
            disk = OpenBase(below, (header.Flags & MapFlags.BaseIsLayer) != 0, writableBase);
            if (!resumes || (header.Flags & MapFlags.Committing) == 0)
                CheckBase(layer, Identify(below, disk, modified), header.Flags & MapFlags.BaseIsLayer, force: false, _ => { });
            return Compose(disk, layer, readOnly);
        }
        catch
        {
            disk?.Dispose();
            layer.Data.Dispose();
            throw;
        }
    }

    /// <summary>What a layer stands on: an image, or a layer on a base of its own.</summary>
    internal static Disk OpenBase(string path, bool isLayer, bool writable = false)
        => isLayer ? OpenByHeader(path, readOnly: !writable) : ImageFile.Open(path, readOnly: !writable, exclusive: writable);

    private static CowDisk Compose(Disk below, LayerFile layer, bool readOnly)
    {
        var disk = new CowDisk(below, layer, readOnly);
        disk.SettleAsync().AsTask().GetAwaiter().GetResult();
        return disk;
    }

    /// <summary>What a disk is, so that it is known again, and known to be unchanged.</summary>
    /// <param name="path">Where it stands.</param>
    /// <param name="disk">The open disk.</param>
    /// <param name="modified">When its file was last changed: asked before the disk was opened, which may change it.</param>
    internal static SourceIdentity Identify(string path, Disk disk, long modified)
    {
        if (!MapHeader.FitsPath(path))
            throw new DiskException(DiskError.NotSupported, $"the path of '{path}' is too long to be recorded");
        var hash = new XxHash128();
        byte[] block = new byte[BlockRange.BlockSize];
        long count = BlockRange.CountOf(disk.Length);
        long samples = Math.Min(count, SampledBlocks);
        for (long i = 0; i < samples; i++)
        {
            long index = samples == 1 ? 0 : (long)((Int128)i * (count - 1) / (samples - 1));
            int length = (int)new BlockRange(index, 1).LengthOn(disk.Length);
            disk.ReadAsync(index * BlockRange.BlockSize, block.AsMemory(0, length)).AsTask().GetAwaiter().GetResult();
            hash.Append(block.AsSpan(0, length));
        }

        return new SourceIdentity(path, disk.Length, modified, hash.GetCurrentHashAsUInt128());
    }

    /// <returns>0 for what is no regular file: a device's time says nothing.</returns>
    internal static long ModifiedNanoseconds(string path)
        => LinuxFile.Status(path, out FileStatus status) == Errno.None && status.Kind == FileKind.Regular ? status.ModifiedNanoseconds : 0;

    private static LayerFile OpenOver(
        string path, SourceIdentity source, MapFlags flags, bool readOnly, bool force, Action<string> warn)
    {
        LayerFile layer = LayerFile.Open(path, readOnly);
        try
        {
            CheckBase(layer, source, flags, force, warn);
            if (!readOnly && layer.Map.Header.Source != source)
                layer.Map.WriteHeader(layer.Map.Header with { Source = source });
            return layer;
        }
        catch
        {
            layer.Data.Dispose();
            throw;
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
                $"a commit of layer '{layer.Path}' into its base was interrupted; complete it with: xnbd-layer commit {layer.Path}");
        }

        if (known.Length != actual.Length)
        {
            throw new DiskException(
                DiskError.Permission,
                $"layer '{layer.Path}' is of a disk of {known.Length} bytes; '{actual.Path}' has {actual.Length} bytes");
        }

        var differences = new List<string>();
        if (((header.Flags ^ flags) & MapFlags.BaseIsLayer) != 0)
            differences.Add((flags & MapFlags.BaseIsLayer) != 0 ? "it is a layer, and was an image" : "it is an image, and was a layer");
        if (known.ModifiedNanoseconds != actual.ModifiedNanoseconds)
            differences.Add($"modified {Time(actual.ModifiedNanoseconds)}, was {Time(known.ModifiedNanoseconds)}");
        if (known.Sample != actual.Sample)
            differences.Add("its contents differ");
        if (differences.Count == 0)
            return;

        string message = $"'{actual.Path}' is not as it was when layer '{layer.Path}' was made on it ({string.Join("; ", differences)})";
        if (!force)
            throw new DiskException(DiskError.Permission, message + "; to use the layer all the same: --force");
        warn(message);
    }

    private static string Time(long nanoseconds)
        => nanoseconds == 0
            ? "at no known time"
            : DateTime.UnixEpoch.AddTicks(nanoseconds / 100).ToString("yyyy-MM-dd HH:mm:ss.fffffff'Z'", CultureInfo.InvariantCulture);
}
