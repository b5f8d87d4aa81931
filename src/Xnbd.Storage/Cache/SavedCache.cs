using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;
using Xnbd.Storage.Images;
using Xnbd.Storage.Maps;

namespace Xnbd.Storage.Cache;

/// <summary>
/// What the map of a cache says before the cache is opened: whether the origin is needed at all. Nothing is changed,
/// and nothing is locked before <see cref="TakeSamples"/>. That loads the map, and keeps its file locked until the
/// cache is opened (<see cref="HandOver"/>), so that a large map is loaded once. One thread uses this.
/// </summary>
public sealed class SavedCache : IDisposable
{
    private readonly string _mapPath;
    private readonly MapHeader _header;
    private (SafeFileHandle File, BlockMap Map)? _loaded; // the file is locked

    private SavedCache(string mapPath, MapHeader header) => (_mapPath, _header) = (mapPath, header);

    /// <summary>The origin's address, as it was last recorded.</summary>
    public string OriginName => _header.Source.Path;

    /// <summary>Length of the disk in bytes.</summary>
    public long Length => _header.Source.Length;

    /// <summary>The cache was switched: its image is the disk, without origin and map.</summary>
    public bool WasSwitched => (_header.Flags & MapFlags.Switched) != 0;

    /// <summary>Looks at the map of a cache.</summary>
    /// <param name="mapPath">Path of the map.</param>
    /// <returns>Null if there is no such map, or if it cannot be read.</returns>
    public static SavedCache? Find(string mapPath)
    {
        try
        {
            using SafeFileHandle? file = OpenMap(mapPath, OpenMode.ReadOnly);
            return file is not null
                && MapFile.ReadHeader(new FileMapStore(mapPath, file)) is { } header
                && (header.Flags & MapFlags.Cache) != 0
                && header.Source.Length >= 0
                && LinuxFile.Status(file, out FileStatus status) == Errno.None
                && status.Length >= MapLayout.FileLength(header.Source.Length)
                ? new SavedCache(mapPath, header)
                : null;
        }
        catch (DiskException)
        {
            return null;
        }
    }

    /// <summary>Whether no block is missing. This may read the whole map.</summary>
    /// <returns>False also when the map cannot be read.</returns>
    public bool IsComplete()
    {
        if (_loaded is { } loaded)
            return loaded.Map.Count(BlockState.Absent) == 0;
        try
        {
            using SafeFileHandle? file = OpenMap(_mapPath, OpenMode.ReadOnly);
            return file is not null && Load(file).Count(BlockState.Absent) == 0;
        }
        catch (DiskException)
        {
            return false;
        }
    }

    /// <summary>Takes blocks of the cache that are as the origin has them.</summary>
    /// <param name="imagePath">Path of the cache image.</param>
    /// <returns>Nothing if the files cannot be read, or are in use: whoever opens the cache finds out why.</returns>
    public DiskSamples TakeSamples(string imagePath)
    {
        try
        {
            _loaded ??= LockAndLoad();
            if (_loaded is not { Map: var map })
                return DiskSamples.None;
            using ImageFile image = ImageFile.Open(imagePath, readOnly: true);
            // The machine may have died since; this is noted only when the map is opened to be changed.
            bool mayHoldWrites = (map.Header.Flags & MapFlags.MayHoldWrites) != 0
                || map.Header.BootId != LinuxProcess.BootId;
            return CacheSamples.Take(
                map,
                range =>
                {
                    byte[] data = new byte[range.LengthOn(Length)];
                    image.ReadAsync(range.Offset, data).AsTask().GetAwaiter().GetResult();
                    return data;
                },
                mayHoldWrites);
        }
        catch (DiskException)
        {
            return DiskSamples.None;
        }
    }

    /// <summary>Opens a cache that was switched: its image is the disk, and nothing is asked of the origin.</summary>
    /// <param name="originNames">The addresses that the user gives.</param>
    /// <param name="imagePath">Path of the cache image.</param>
    /// <param name="opening">Whether another address than the recorded one is accepted.</param>
    /// <param name="readOnly">Clients may not write.</param>
    /// <exception cref="DiskException">The files do not match, or are in use; they are untouched.</exception>
    public OriginCache OpenSwitched(
        IReadOnlyList<string> originNames, string imagePath, CacheOpening opening, bool readOnly)
    {
        ImageFile? image = null;
        SafeFileHandle? file = null;
        try
        {
            if (!originNames.Contains(OriginName) && (opening & CacheOpening.Rebind) == 0)
                throw CacheFiles.OtherOrigin(_mapPath, OriginName, originNames[0]);
            image = ImageFile.OpenSwitched(imagePath, Length, readOnly, out long excess);
            file = OpenMap(_mapPath, OpenMode.ReadOnly);
            BlockMap? map = file is null ? null : Load(file);
            if (map is null || map.Header.Id != _header.Id || (map.Header.Flags & MapFlags.Switched) == 0)
                throw new DiskException(DiskError.InUse, $"the map '{_mapPath}' has changed meanwhile");
            // Nothing is missing, so that no origin is ever read: the image stands in for it.
            var cache = new CachingDisk(image, image, map, readOnly, new CacheLimits(1, Fetch.MaxBytes), _ => { });
            return new OriginCache(cache, image, file!, image, isSwitched: true) { ExcessBytes = excess };
        }
        catch
        {
            image?.Dispose();
            file?.Dispose();
            throw;
        }
    }

    /// <summary>Gives away the map that <see cref="TakeSamples"/> has loaded, and its locked file.</summary>
    /// <param name="mapPath">The path at which the file must still be.</param>
    /// <returns>Null if there is none; then the one who asks opens the file.</returns>
    internal (SafeFileHandle File, BlockMap Map)? HandOver(string mapPath)
    {
        if (_loaded is not { } loaded || !LockedFile.IsAt(mapPath, loaded.File))
            return null;
        _loaded = null;
        return loaded;
    }

    /// <inheritdoc/>
    public void Dispose() => LockedFile.Close(_loaded?.File);

    /// <returns>Null if the file is gone, or in use.</returns>
    private (SafeFileHandle File, BlockMap Map)? LockAndLoad()
    {
        SafeFileHandle? file = OpenMap(_mapPath, OpenMode.ReadWrite);
        try
        {
            if (file is null || LinuxFile.TryLock(file) == Errno.EAGAIN)
            {
                file?.Dispose();
                return null;
            }

            return (file, Load(file));
        }
        catch
        {
            LockedFile.Close(file);
            throw;
        }
    }

    private BlockMap Load(SafeFileHandle file)
        => BlockMap.Open(new FileMapStore(_mapPath, file), LinuxProcess.BootId);

    private static SafeFileHandle? OpenMap(string path, OpenMode mode)
        => LinuxFile.Status(path, out FileStatus status) == Errno.None
            && status.Kind == FileKind.Regular
            && status.Length >= 2 * MapHeader.Size
            && LinuxFile.Open(path, mode, out SafeFileHandle? file) == Errno.None
            ? file
            : null;
}
