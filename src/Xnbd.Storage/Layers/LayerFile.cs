using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;
using Xnbd.Storage.Images;
using Xnbd.Storage.Maps;

namespace Xnbd.Storage.Layers;

/// <summary>
/// A copy-on-write layer: one file, which holds a <see cref="BlockMap"/> and, behind it, the blocks' data, sparse, as long as
/// the disk (docs/formats.md). It is locked while it is open: alone by who writes it, together by those who only read it.
/// <para>
/// A layer is made under a temporary name and put in place when it is complete. A disposable one is put in place at once: its
/// name must be taken before another server takes it, and what a killed server leaves of it is removed by the next one.
/// </para>
/// </summary>
internal sealed class LayerFile : IDisposable
{
    /// <summary>The data begins at a multiple of this, in bytes, which suits every file system's extents.</summary>
    private const long DataAlignment = 1 << 20;

    /// <summary>The longest disk, in bytes: its map is an array of at most 2^31 words.</summary>
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

    /// <summary>Where it stands.</summary>
    public string Path { get; }

    /// <summary>The blocks that it holds, each at its place. The layer closes it.</summary>
    public ImageFile Data { get; }

    /// <summary>Which blocks it holds.</summary>
    public BlockMap Map { get; }

    /// <summary>Makes an empty layer that is kept.</summary>
    /// <exception cref="DiskException">It cannot be made; nothing is left behind.</exception>
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
            file.Dispose();
            throw;
        }
    }

    /// <summary>Makes a layer that goes when it is closed, unless somebody has taken the name.</summary>
    /// <returns>Null when the name is taken.</returns>
    /// <exception cref="DiskException">It cannot be made; nothing is left behind.</exception>
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
            file.Dispose();
            throw;
        }
    }

    /// <summary>Opens a layer.</summary>
    /// <remarks>Nothing is written, until <see cref="BlockMap.PrepareToWrite"/> is called of its map.</remarks>
    /// <param name="path">The file.</param>
    /// <param name="readOnly">It is only read, and others may read it as well.</param>
    /// <exception cref="DiskException">It is absent, in use, no layer, or damaged; it is untouched.</exception>
    public static LayerFile Open(string path, bool readOnly) => Open(path, readOnly, mayBeInUse: false, out _);

    /// <summary>Opens a layer to look at it, even while somebody writes it: then what is found is of that moment.</summary>
    /// <exception cref="DiskException">It is absent, no layer, or damaged.</exception>
    public static LayerFile OpenUnlocked(string path, out bool isInUse) => Open(path, readOnly: true, mayBeInUse: true, out isInUse);

    private static LayerFile Open(string path, bool readOnly, bool mayBeInUse, out bool isInUse)
    {
        Errno errno = LinuxFile.Open(path, readOnly ? OpenMode.ReadOnly : OpenMode.ReadWrite, out SafeFileHandle? file);
        if (errno != Errno.None)
            throw LockedFile.Failure(errno, "open layer", path);
        try
        {
            if (LinuxFile.Status(file!, out FileStatus kind) == Errno.None && kind.Kind != FileKind.Regular)
                throw new DiskException(DiskError.Damaged, $"cannot open layer '{path}': it is no regular file");
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
                return new LayerFile(path, ImageFile.OfPart(path, file!, header.DataStart, header.Source.Length, readOnly), map);
            }
            catch (DiskException failure)
            {
                throw new DiskException(failure.Error, $"cannot open layer '{path}': {failure.Message}");
            }
        }
        catch
        {
            file!.Dispose();
            throw;
        }
    }

    /// <summary>Nothing of it can be written, whoever tries: its file system is read-only.</summary>
    public bool IsOnReadOnlyFileSystem => Data.IsOnReadOnlyFileSystem;

    /// <summary>Whether an open file is a disposable layer, or the beginning of one; who holds its lock may remove it.</summary>
    public static bool IsDisposable(SafeFileHandle file)
    {
        if (LinuxFile.Status(file, out FileStatus status) != Errno.None || status.Kind != FileKind.Regular)
            return false;
        if (status.AllocatedBytes == 0)
            return true; // it never got its header, and holds nothing
        try
        {
            return ReadHeader(new FileMapStore("", file), status, out _) is { } header && (header.Flags & MapFlags.Disposable) != 0;
        }
        catch (DiskException)
        {
            return false;
        }
    }

    /// <summary>
    /// Makes it an empty layer on a base; what it held is lost, and its space is given back. Until that is done the layer is
    /// marked, and refused by all but this method: half of its blocks would be neither the old disk nor the new one.
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

        // The map before the data: at no time may it speak of data that is gone.
        Map.Set(new BlockRange(0, Map.BlockCount), BlockState.Absent);
        Map.Commit();
        Data.Discard();
        Map.ChangeHeader(header => header with { Flags = header.Flags & ~MapFlags.Discarding });
    }

    /// <summary>
    /// Takes a disposable layer's name away, if this object made the layer. Operations may be under way: the file itself lives
    /// until it is closed.
    /// </summary>
    public void RemoveIfDisposable()
    {
        if (_isRemovedAtEnd && !Interlocked.Exchange(ref _isRemoved, true))
            _ = LinuxFile.Unlink(Path);
    }

    /// <summary>
    /// Closes the file. A disposable layer is removed first, while its lock is held: once the lock is gone, another server may
    /// take the name.
    /// </summary>
    public void Dispose()
    {
        RemoveIfDisposable();
        Data.Dispose();
    }

    private static LayerFile Fill(string path, SafeFileHandle file, SourceIdentity source, MapFlags flags)
    {
        if (source.Length > MaxDiskLength)
            throw new DiskException(DiskError.NotSupported, $"'{source.Path}' is too long for a layer: {source.Length} bytes");
        long mapLength = MapLayout.FileLength(source.Length);
        long dataStart = (mapLength + DataAlignment - 1) / DataAlignment * DataAlignment;
        Errno errno = LinuxFile.Truncate(file, dataStart + source.Length);

        // The map has its space from the start: where the disk is full, a flush still finds room for it.
        if (errno == Errno.None && (flags & MapFlags.Disposable) == 0)
            errno = LinuxFile.Allocate(file, AllocateMode.KeepSize, 0, mapLength);
        if (errno is not (Errno.None or Errno.EOPNOTSUPP))
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
        return new LayerFile(path, ImageFile.OfPart(path, file, dataStart, source.Length, readOnly: false), map, (flags & MapFlags.Disposable) != 0);
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
