using System.Globalization;
using Xnbd.Linux;
using Xnbd.Storage.Images;
using Xnbd.Storage.Maps;

namespace Xnbd.Storage.Layers;

/// <summary>
/// Composes copy-on-write disks: a base image, and layers over it, from the bottom up. Each layer knows what it stands
/// on, and is refused on anything else (<see cref="BaseIdentity"/>). The disk that is returned owns all its files.
/// </summary>
public static class LayerStack
{
    private const string DisposableInfix = ".cow";
    private const string DisposableSuffix = ".layer1";

    /// <summary>Opens a disk over a base, whose changes are removed when it is closed.</summary>
    /// <param name="basePath">The base image.</param>
    /// <param name="directory">Where the layer is made; null for the base's directory.</param>
    /// <param name="readOnly">The disk will not be written.</param>
    /// <param name="removed">
    /// Receives the path of each layer that a killed server had left behind, and that was removed.
    /// </param>
    /// <exception cref="DiskException">The base cannot be opened, or the layer cannot be made.</exception>
    public static Disk OpenDisposable(string basePath, string? directory, bool readOnly, Action<string> removed)
    {
        bool isDevice = LinuxFile.Status(basePath, out FileStatus status) == Errno.None
            && status.Kind == FileKind.BlockDevice;
        if (directory is null && isDevice)
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

            SourceIdentity source = BaseIdentity.Of(Path.GetFullPath(basePath), baseImage, isKept: false);
            LayerFile? layer = null;
            for (int number = 0; layer is null; number++)
            {
                string path = prefix + number.ToString(CultureInfo.InvariantCulture) + DisposableSuffix;
                layer = LayerFile.TryCreateDisposable(path, source);
            }

            return new CowDisk(baseImage, layer, readOnly);
        }
        catch
        {
            baseImage.Dispose();
            throw;
        }
    }

    /// <summary>
    /// Opens a disk over a base and layers that are kept. Only the topmost layer is written; it is made if it is
    /// absent.
    /// </summary>
    /// <param name="basePath">The base image.</param>
    /// <param name="layerPaths">At least one layer, from the bottom up.</param>
    /// <param name="readOnly">The disk will not be written; then all layers must exist.</param>
    /// <param name="force">Accept layers over a base that has changed since they were made.</param>
    /// <param name="warn">Receives what <paramref name="force"/> had to overlook.</param>
    /// <exception cref="DiskException">A file cannot be opened, or a base has changed.</exception>
    public static Disk OpenKept(
        string basePath, IReadOnlyList<string> layerPaths, bool readOnly, bool force, Action<string> warn)
    {
        Disk disk = ImageFile.Open(basePath, readOnly: true, ImageUse.Base);
        string below = Path.GetFullPath(basePath);
        try
        {
            for (int i = 0; i < layerPaths.Count; i++)
            {
                string path = Path.GetFullPath(layerPaths[i]);
                bool isTop = i == layerPaths.Count - 1, isWritten = isTop && !readOnly;
                SourceIdentity source = BaseIdentity.Of(below, disk, isKept: !readOnly);
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
                    BaseIdentity.Validate(layer, source, flags, force, warn);
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

    /// <summary>Opens a layer's disk, base and changes together, for reading only.</summary>
    /// <param name="path">The layer.</param>
    /// <param name="basePath">Where its base stands now; null for where the layer's header says.</param>
    /// <exception cref="DiskException">A file cannot be opened, or the base has changed.</exception>
    public static Disk OpenMerged(string path, string? basePath) => OpenByHeader(path, basePath);

    /// <summary>The image at the bottom of a disk; null if there is none.</summary>
    public static ImageFile? ImageOf(Disk disk)
    {
        while (disk is CowDisk layered)
            disk = layered.Base;
        return disk as ImageFile;
    }

    /// <summary>
    /// Removes a disposable layer while operations may still be under way. This is for a process that ends at once.
    /// </summary>
    public static void Abandon(Disk disk) => (disk as CowDisk)?.File.RemoveIfDisposable();

    /// <summary>Opens a layer and all that it stands on, as its header says.</summary>
    /// <param name="path">The layer.</param>
    /// <param name="basePath">Where its base stands now; null for where the header says.</param>
    /// <param name="readOnly">The layer is only read.</param>
    /// <param name="writableBase">The base is to be written, too: then nobody else may be using it.</param>
    /// <param name="resumes">An interrupted commit is to be resumed; otherwise such a layer is refused.</param>
    /// <param name="isStackWritten">
    /// Something that stands on the layer is written; always so if the layer itself is written.
    /// </param>
    /// <exception cref="DiskException">A file cannot be opened, or the base has changed.</exception>
    internal static CowDisk OpenByHeader(
        string path,
        string? basePath = null,
        bool readOnly = true,
        bool writableBase = false,
        bool resumes = false,
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
                BaseIdentity.ValidateResumed(layer, below, disk);
            else
            {
                SourceIdentity source = BaseIdentity.Of(below, disk, isKept: isStackWritten);
                BaseIdentity.Validate(layer, source, header.Flags & MapFlags.BaseIsLayer, force: false, _ => { });
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

    /// <summary>Opens what a layer stands on: an image, or a layer on a base of its own.</summary>
    /// <param name="path">Where the base stands.</param>
    /// <param name="isLayer">The base is a layer.</param>
    /// <param name="isStackWritten">Something that stands on the base is written.</param>
    /// <param name="writable">The base itself is to be written.</param>
    internal static Disk OpenBase(string path, bool isLayer, bool isStackWritten, bool writable = false)
        => isLayer
            ? OpenByHeader(path, readOnly: !writable, isStackWritten: isStackWritten)
            : ImageFile.Open(path, readOnly: !writable, writable ? ImageUse.Alone : ImageUse.Base);

    private static CowDisk Compose(Disk below, LayerFile layer, bool readOnly)
    {
        var disk = new CowDisk(below, layer, readOnly);
        disk.SettleAsync().AsTask().GetAwaiter().GetResult();
        return disk;
    }

    /// <summary>
    /// Opens a layer. A layer that will only be read must be durable as it is found: what stands on it is bound to it,
    /// and a flush of what stands on it covers it. If a server of the layer was killed, the layer is settled first,
    /// which needs it alone for a moment.
    /// </summary>
    /// <remarks>
    /// On a read-only file system a layer cannot be settled. If nothing that stands on it is written, the layer is
    /// taken as its map says: no flush relies on it, and nothing will be bound to it. The map is right. In the run of
    /// the machine in which the server was killed, the live map is right, because a file system becomes read-only by
    /// writing back all that was in memory; later the durable map is. Nobody changes the layer meanwhile: it is locked,
    /// and not even another mount of the file system, which may be writable, lets this program past the lock.
    /// </remarks>
    private static LayerFile OpenSettled(string path, bool isWritten, bool isStackWritten)
    {
        LayerFile layer = LayerFile.Open(path, readOnly: !isWritten);
        try
        {
            MapFlags flags = layer.Map.Header.Flags;
            if (isWritten && (flags & MapFlags.Disposable) != 0)
            {
                throw new DiskException(
                    DiskError.Permission,
                    $"layer '{path}' was made to be thrown away; it can only be exported or compared");
            }

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
}
