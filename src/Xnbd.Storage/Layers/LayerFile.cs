using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;
using Xnbd.Storage.Images;
using Xnbd.Storage.Maps;

namespace Xnbd.Storage.Layers;

/// <summary>
/// A copy-on-write layer: one file, which holds a <see cref="BlockMap"/> and, behind it, the blocks' data, sparse, as
/// long as the disk (docs/formats.md). The file is locked while it is open: a program that writes the layer has it
/// alone, those that only read it share it.
/// <para>
/// A layer is made under a temporary name and renamed when it is complete. A disposable layer has its name at once: the
/// name must be taken before another server takes it, and what a killed server leaves of it is removed by the next
/// server.
/// </para>
/// <para>
/// Owner: this object owns the file, its lock, the data and the map. Whoever opens a layer closes it once, with
/// <see cref="Dispose"/>.
/// </para>
/// </summary>
internal sealed class LayerFile : IDisposable
{
    /// <summary>The data begins at a multiple of this, in bytes. It suits the extents of every file system.</summary>
    private const long DataAlignment = 1 << 20;

    /// <summary>Length of the longest disk in bytes. Its map has 2 million pages.</summary>
    private const long MaxDiskLength = 1L << 47;

    private readonly bool _isRemovedAtEnd;
    private bool _isRemoved; // never remove a name twice: somebody else may have it by now

    private LayerFile(string path, ImageFile data, BlockMap map, bool isRemovedAtEnd = false)
    {
        Path = path;
        Data = data;
        Map = map;
        _isRemovedAtEnd = isRemovedAtEnd;
    }

    /// <summary>Where the file stands.</summary>
    public string Path { get; }

    /// <summary>The data of the blocks that the layer holds, each block at its place. The layer closes it.</summary>
    public ImageFile Data { get; }

    /// <summary>Which blocks the layer holds.</summary>
    public BlockMap Map { get; }

    /// <summary>Makes an empty layer that is kept.</summary>
    /// <exception cref="DiskException">The layer cannot be made; nothing is left behind.</exception>
    public static LayerFile Create(string path, SourceIdentity source, MapFlags flags)
    {
        SafeFileHandle file = LockedFile.CreateBeside(path, out string partial);
        LayerFile? layer = null;
        try
        {
            layer = Fill(path, file, source, flags);
            Errno errno = LinuxFile.RenameNoReplace(partial, path);
            if (errno != Errno.None)
                throw LockedFile.Failure(errno, "create", path);
            LinuxFile.SyncDirectoryOf(path);
            return layer;
        }
        catch
        {
            _ = LinuxFile.Unlink(partial);
            layer?.Dispose();
            LockedFile.Close(file);
            throw;
        }
    }

    /// <summary>Makes an empty layer that is removed when it is closed.</summary>
    /// <returns>Null if the name is taken.</returns>
    /// <exception cref="DiskException">The layer cannot be made; nothing is left behind.</exception>
    public static LayerFile? TryCreateDisposable(string path, SourceIdentity source)
    {
        SafeFileHandle? file = LockedFile.TryCreate(path);
        if (file is null)
            return null;
        try
        {
            return Fill(path, file, source, MapFlags.Disposable);
        }
        catch
        {
            _ = LinuxFile.Unlink(path);
            LockedFile.Close(file);
            throw;
        }
    }

    /// <summary>Opens a layer.</summary>
    /// <remarks>Nothing is written until <see cref="BlockMap.PrepareToWrite"/> of its map is called.</remarks>
    /// <param name="path">The file.</param>
    /// <param name="readOnly">The layer is only read, and others may read it as well.</param>
    /// <exception cref="DiskException">
    /// The file is absent, in use, no layer, or damaged. It is left as it was.
    /// </exception>
    public static LayerFile Open(string path, bool readOnly) => Open(path, readOnly, mayBeInUse: false, out _);

    /// <summary>
    /// Opens a layer to look at it, even while another program writes it: what is found is of this moment.
    /// </summary>
    /// <exception cref="DiskException">The file is absent, no layer, or damaged.</exception>
    public static LayerFile OpenUnlocked(string path, out bool isInUse)
        => Open(path, readOnly: true, mayBeInUse: true, out isInUse);

    private static LayerFile Open(string path, bool readOnly, bool mayBeInUse, out bool isInUse)
    {
        Errno errno = LinuxFile.Open(path, readOnly ? OpenMode.ReadOnly : OpenMode.ReadWrite, out SafeFileHandle? file);
        if (errno != Errno.None)
            throw LockedFile.Failure(errno, "open layer", path);
        try
        {
            if (LinuxFile.Status(file!, out FileStatus kind) == Errno.None && kind.Kind != FileKind.Regular)
            {
                throw new DiskException(
                    DiskError.Damaged, $"cannot open layer '{path}': it is no regular file");
            }

            isInUse = LinuxFile.TryLock(file!, shared: readOnly) == Errno.EAGAIN;
            if (isInUse && !mayBeInUse)
                throw new InUseException($"layer '{path}'", file!, UseConflict.NeededAlone);
            _ = LinuxFile.Status(file!, out FileStatus status);
            var store = new FileMapStore(path, file!);
            try
            {
                MapHeader header = ReadHeader(store, status, out string? problem)
                    ?? throw new DiskException(DiskError.Damaged, problem!);
                var map = BlockMap.Open(store, LinuxProcess.BootId);
                var data = ImageFile.OfPart(path, file!, header.DataStart, header.Source.Length, readOnly);
                return new LayerFile(path, data, map);
            }
            catch (DiskException failure)
            {
                throw new DiskException(failure.Error, $"cannot open layer '{path}': {failure.Message}");
            }
        }
        catch
        {
            LockedFile.Close(file);
            throw;
        }
    }

    /// <summary>Nobody can write any of it: its file system is read-only.</summary>
    public bool IsOnReadOnlyFileSystem => Data.IsOnReadOnlyFileSystem;

    /// <summary>
    /// Whether an open file is a disposable layer, or the beginning of one. Whoever holds its lock may remove it.
    /// </summary>
    public static bool IsDisposable(SafeFileHandle file)
    {
        if (LinuxFile.Status(file, out FileStatus status) != Errno.None || status.Kind != FileKind.Regular)
            return false;
        if (status.AllocatedBytes == 0)
            return true; // its header was never written: it holds nothing
        try
        {
            MapHeader? header = ReadHeader(new FileMapStore("", file), status, out _);
            return header is not null && (header.Flags & MapFlags.Disposable) != 0;
        }
        catch (DiskException)
        {
            return false;
        }
    }

    /// <summary>
    /// Makes this an empty layer on a base. What it held is lost, and its space is given back. Until that is done the
    /// layer is marked, and refused by all but this method: half of its blocks would be neither the old disk nor the
    /// new one.
    /// </summary>
    public void Clear(SourceIdentity source)
    {
        Map.ChangeHeader(header => header with
        {
            Flags = (header.Flags & ~MapFlags.Committing) | MapFlags.Discarding,
            Source = source,
            Generation = header.Generation + 1,
            CommitPosition = 0,
        });

        // The map comes before the data: at no time may it describe data that is gone.
        Map.Set(new BlockRange(0, Map.BlockCount), BlockState.Absent);
        Map.Commit();
        Data.Discard();
        Map.ChangeHeader(header => header with { Flags = header.Flags & ~MapFlags.Discarding });
    }

    /// <summary>
    /// Takes a disposable layer's name away, if this object made the layer. Operations may be under way: the file
    /// itself lives until it is closed.
    /// </summary>
    public void RemoveIfDisposable()
    {
        if (_isRemovedAtEnd && !Interlocked.Exchange(ref _isRemoved, true))
            _ = LinuxFile.Unlink(Path);
    }

    /// <summary>
    /// Closes the file. A disposable layer is removed first, while its lock is held: once the lock is gone, another
    /// server may take the name.
    /// </summary>
    public void Dispose()
    {
        RemoveIfDisposable();
        Data.Dispose();
    }

    private static LayerFile Fill(string path, SafeFileHandle file, SourceIdentity source, MapFlags flags)
    {
        if (source.Length > MaxDiskLength)
        {
            throw new DiskException(
                DiskError.NotSupported, $"'{source.Path}' is too long for a layer: {source.Length} bytes");
        }

        long mapLength = MapLayout.FileLength(source.Length);
        long dataStart = (mapLength + DataAlignment - 1) / DataAlignment * DataAlignment;
        Errno errno = LinuxFile.Truncate(file, dataStart + source.Length);
        if (errno != Errno.None)
            throw LockedFile.Failure(errno, "create", path);

        var header = new MapHeader
        {
            Id = Guid.NewGuid(),
            BootId = LinuxProcess.BootId,
            Flags = flags,
            DataStart = dataStart,
            Source = source,
        };
        var map = BlockMap.Create(new FileMapStore(path, file), header);
        var data = ImageFile.OfPart(path, file, dataStart, source.Length, readOnly: false);
        return new LayerFile(path, data, map, isRemovedAtEnd: (flags & MapFlags.Disposable) != 0);
    }

    private static MapHeader? ReadHeader(FileMapStore store, in FileStatus status, out string? problem)
    {
        problem = "it is no xNBD layer";
        Span<byte> start = stackalloc byte[MapHeader.Size];
        if (status.Kind != FileKind.Regular || status.Length < 2 * MapHeader.Size)
            return null;
        MapHeader? header = MapFile.ReadHeader(store);
        if (header is null)
        {
            store.Read(0, start);
            if (MapHeader.HasMagic(start))
                problem = "it is damaged: both copies of its header have wrong checksums";
            return null;
        }

        problem = "it is damaged: it is too short";
        long length = header.Source.Length;
        return length is >= 0 and <= MaxDiskLength && header.DataStart >= MapLayout.FileLength(length)
            && status.Length >= header.DataStart && status.Length - header.DataStart >= length ? header : null;
    }
}
