using System.Buffers.Binary;
using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;
using Xnbd.Storage.Images;
using Xnbd.Storage.Maps;

namespace Xnbd.Storage.Cache;

/// <summary>What to do with a map that exists already.</summary>
[Flags]
public enum CacheOpening
{
    /// <summary>Go on where it was.</summary>
    GoOn = 0,

    /// <summary>Forget what is cached.</summary>
    Clear = 1,

    /// <summary>Use it although it was made for another remote.</summary>
    Rebind = 2,

    /// <summary>Make a map of a bare bitmap of the original xNBD.</summary>
    ImportBitmap = 4,
}

/// <summary>
/// The two files of a cache: the image, and the map that says which of its blocks are valid (docs/formats.md). The map
/// is bound to the disk's length and to the origin's address. Both files are locked as long as they are open.
/// </summary>
internal static class CacheFiles
{
    /// <summary>Opens both, or makes them.</summary>
    /// <param name="imagePath">Path of the cache image.</param>
    /// <param name="mapPath">Path of its map.</param>
    /// <param name="origin">The origin's address, by which it is recognized.</param>
    /// <param name="length">The origin's length in bytes.</param>
    /// <param name="opening">What to do with a map that exists.</param>
    /// <param name="others">Other addresses of the same disk, any of which the map may have recorded.</param>
    /// <param name="saved">May have loaded the map already.</param>
    /// <exception cref="DiskException">They do not match, are damaged, or in use; nothing was touched.</exception>
    public static (ImageFile Image, BlockMap Map, SafeFileHandle MapFile) Open(
        string imagePath,
        string mapPath,
        string origin,
        long length,
        CacheOpening opening,
        IReadOnlyList<string>? others = null,
        SavedCache? saved = null)
    {
        var source = new SourceIdentity(origin, length, 0, 0);
        if (!MapHeader.FitsPath(origin))
            throw new DiskException(DiskError.NotSupported, "the remote's address is too long to be recorded");
        if (Path.GetFullPath(imagePath) == Path.GetFullPath(mapPath))
            throw OneFile(imagePath);
        (SafeFileHandle File, BlockMap Map)? loaded = saved?.HandOver(mapPath);
        SafeFileHandle? old = loaded?.File ?? OpenMap(mapPath);
        ImageFile? image = null;
        SafeFileHandle? made = null;
        try
        {
            long size = 0;
            BlockMap? map = old is null
                ? null
                : ReadMap(mapPath, old, loaded?.Map, source, others ?? [], opening, out size);
            bool[]? imported = null;
            if (map is null && (opening & CacheOpening.ImportBitmap) != 0)
                imported = size > 0
                    ? ReadBitmap(mapPath, old!, length)
                    : throw new DiskException(DiskError.Permission, $"there is no bitmap '{mapPath}' to be taken over");

            // A map without its image would show zeroes in place of data.
            bool isFresh = imported is null && (map is null || map.Count(BlockState.Absent) == map.BlockCount);
            // And an image without its map belongs to somebody else, or to a map that was lost.
            image = ImageFile.OpenCache(
                imagePath, length, mayGrow: isFresh, mayHoldData: size > 0 || (opening & CacheOpening.Clear) != 0);
            if (LinuxFile.Status(imagePath, out FileStatus one) == Errno.None
                && LinuxFile.Status(mapPath, out FileStatus other) == Errno.None
                && one.IsSameFile(other))
                throw OneFile(imagePath); // by another path
            if (map is not null)
            {
                map.PrepareToWrite();
                // From now on blocks may be zero in the map alone.
                MapFlags flags = map.Header.Flags & ~MapFlags.Switched;
                if (map.Header.Source != source || map.Header.Flags != flags)
                    map.ChangeHeader(header => header with { Source = source, Flags = flags });
                return (image, map, old!);
            }

            made = LockedFile.CreateBeside(Path.GetFullPath(mapPath), out string partial);
            try
            {
                map = Make(partial, made, source);
                for (long block = 0; block < imported?.Length;)
                {
                    long end = block;
                    while (end < imported.Length && imported[end] == imported[block])
                        end++;
                    if (imported[block])
                        // Nobody knows which were written here: perhaps all.
                        map.Set(new BlockRange(block, end - block), BlockState.Written);
                    block = end;
                }

                if (imported is not null)
                    // What the original xNBD wrote may be in memory only.
                    image.FlushAsync().AsTask().GetAwaiter().GetResult();
                map.Commit();
                Errno errno = LinuxFile.Rename(partial, mapPath);
                if (errno != Errno.None)
                    throw LockedFile.Failure(errno, "put in place", mapPath);
            }
            catch
            {
                _ = LinuxFile.Unlink(partial);
                throw;
            }

            LinuxFile.SyncDirectoryOf(mapPath);
            LockedFile.Close(old);
            return (image, map, made);
        }
        catch
        {
            image?.Dispose();
            LockedFile.Close(made);
            LockedFile.Close(old);
            throw;
        }
    }

    /// <summary>A map belongs to another origin than the one that is given.</summary>
    public static DiskException OtherOrigin(string mapPath, string recorded, string given)
        => new(DiskError.Mismatch, $"the map '{mapPath}' is of {recorded}, not of {given}", Remedy.RebindMap);

    private static DiskException OneFile(string path)
        => new(DiskError.Permission, $"'{path}' cannot be both the cache image and its map");

    /// <returns>Null when there is none.</returns>
    private static SafeFileHandle? OpenMap(string path)
    {
        Errno errno = LinuxFile.Open(path, OpenMode.ReadWrite, out SafeFileHandle? file);
        return errno is Errno.None or Errno.ENOENT ? file : throw LockedFile.Failure(errno, "open the map", path);
    }

    /// <returns>Null when a new map is to be made in place of this file.</returns>
    private static BlockMap? ReadMap(
        string path,
        SafeFileHandle file,
        BlockMap? loaded, // and the file is locked, if this is not null
        SourceIdentity source,
        IReadOnlyList<string> others,
        CacheOpening opening,
        out long size)
    {
        _ = LinuxFile.Status(file, out FileStatus status);
        size = status.Length;
        if (status.Kind != FileKind.Regular)
            throw new DiskException(DiskError.Damaged, $"'{path}' is no regular file");
        if (loaded is null && LinuxFile.TryLock(file) == Errno.EAGAIN)
            throw new InUseException($"the map '{path}'", file, UseConflict.NeededAlone);
        if (size == 0)
            return null; // an empty file, such as mktemp makes
        var store = new FileMapStore(path, file);
        MapHeader? header = size < 2 * MapHeader.Size ? null : Named(path, () => MapFile.ReadHeader(store));
        if (header is null)
        {
            if (size != BitmapLength(source.Length))
                throw new DiskException(
                    DiskError.Damaged, $"'{path}' is no map of xNBD, or it is damaged; it was left as it is");
            if ((opening & (CacheOpening.ImportBitmap | CacheOpening.Clear)) != 0)
                return null;
            throw new DiskException(
                DiskError.Damaged, $"'{path}' looks like a bitmap of the original xNBD", Remedy.ImportOrClearMap);
        }

        if ((header.Flags & MapFlags.Cache) == 0)
            throw new DiskException(DiskError.Mismatch, $"'{path}' is a copy-on-write layer, not a cache's map");
        if ((opening & CacheOpening.Clear) != 0)
            return null;
        if (header.Source.Length != source.Length)
        {
            throw new DiskException(
                DiskError.Mismatch,
                $"the map '{path}' is of a disk of {header.Source.Length} bytes; the remote has {source.Length} bytes");
        }

        bool isKnown = header.Source.Path == source.Path || others.Contains(header.Source.Path);
        if (!isKnown && (opening & CacheOpening.Rebind) == 0)
            throw OtherOrigin(path, header.Source.Path, source.Path);

        if (size < MapLayout.FileLength(source.Length))
            throw new DiskException(DiskError.Damaged, $"the map '{path}' is damaged: it is too short");
        return loaded ?? Named(path, () => BlockMap.Open(store, LinuxProcess.BootId));
    }

    /// <summary>Reads from a map; a failure names the file.</summary>
    private static T Named<T>(string path, Func<T> read)
    {
        try
        {
            return read();
        }
        catch (DiskException failure)
        {
            throw new DiskException(failure.Error, $"the map '{path}': {failure.Message}; it was left as it is");
        }
    }

    private static BlockMap Make(string path, SafeFileHandle file, SourceIdentity source)
    {
        Errno errno = LinuxFile.Truncate(file, MapLayout.FileLength(source.Length));
        if (errno != Errno.None)
            throw LockedFile.Failure(errno, "create", path);
        return BlockMap.Create(new FileMapStore(path, file), new MapHeader
        {
            Id = Guid.NewGuid(),
            BootId = LinuxProcess.BootId,
            Flags = MapFlags.Cache,
            DataStart = 0,
            Source = source,
        });
    }

    /// <summary>The length in bytes of the original xNBD's bitmap: an array of 64-bit words.</summary>
    private static long BitmapLength(long diskLength) => (BlockRange.CountOf(diskLength) + 63) / 64 * 8;

    private static bool[] ReadBitmap(string path, SafeFileHandle file, long length)
    {
        byte[] bytes = new byte[BitmapLength(length)];
        new FileMapStore(path, file).Read(0, bytes);
        bool[] blocks = new bool[BlockRange.CountOf(length)];
        for (int i = 0; i < blocks.Length; i++)
            blocks[i] = (BinaryPrimitives.ReadUInt64LittleEndian(bytes.AsSpan(i / 64 * 8)) >> (i % 64) & 1) != 0;
        return blocks;
    }
}
