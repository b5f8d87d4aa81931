using Microsoft.Win32.SafeHandles;

namespace Xnbd.Storage;

/// <summary>Bounds of what a cache has under way.</summary>
/// <param name="Requests">Reads of the origin at once, at least 1.</param>
/// <param name="Bytes">Of them, and of what they brought and is not in the file yet; at least 1 MiB.</param>
public readonly record struct CacheLimits(int Requests, long Bytes);

/// <summary>
/// A cache of a far disk, from its files to the day when it needs that disk no more: opened, filled, and at last replaced by
/// the image alone (<see cref="Switch"/>), with all that use it going on.
/// </summary>
public sealed class CacheDisk : IDisposable
{
    private readonly SwitchableDisk _disk;
    private readonly CachingDisk _cache;
    private readonly ImageFile _image;
    private readonly SafeFileHandle _mapFile;
    private readonly Lock _switching = new();
    private Disk? _origin;

    private CacheDisk(CachingDisk cache, ImageFile image, SafeFileHandle mapFile, Disk origin)
    {
        _cache = cache;
        _image = image;
        _mapFile = mapFile;
        _origin = origin;
        _disk = new SwitchableDisk(cache);
    }

    /// <summary>What is served.</summary>
    public Disk Disk => _disk;

    /// <summary>It has been switched: the image, which alone is the disk now; null before.</summary>
    public ImageFile? Image => ReferenceEquals(_disk.Current, _image) ? _image : null;

    /// <summary>What has been done so far.</summary>
    public CacheStatistics Statistics => _cache.Statistics;

    /// <summary>Opens the cache's files, or makes them.</summary>
    /// <param name="origin">The far disk; owned from now on, also when this fails.</param>
    /// <param name="originName">Its address, by which it is known again.</param>
    /// <param name="imagePath">The cache image.</param>
    /// <param name="mapPath">Its map.</param>
    /// <param name="opening">What to do with a map that is there.</param>
    /// <param name="readOnly">Clients may not write.</param>
    /// <param name="limits">Of what is under way.</param>
    /// <param name="cannotStore">Told when what was fetched cannot be kept.</param>
    /// <exception cref="DiskException">The files do not fit; they are untouched.</exception>
    public static CacheDisk Open(
        Disk origin,
        string originName,
        string imagePath,
        string mapPath,
        CacheOpening opening,
        bool readOnly,
        CacheLimits limits,
        Action<DiskException> cannotStore)
    {
        try
        {
            (ImageFile image, BlockMap map, SafeFileHandle mapFile) = CacheFiles.Open(imagePath, mapPath, originName, origin.Length, opening);
            var cache = new CachingDisk(origin, image, map, readOnly, limits, cannotStore);
            if (!map.IsCommitted)
                cache.FlushAll().AsTask().GetAwaiter().GetResult(); // as OverlayDisk.SettleAsync says
            return new CacheDisk(cache, image, mapFile, origin);
        }
        catch
        {
            origin.Dispose();
            throw;
        }
    }

    /// <summary>Fetches all that is missing; see <see cref="CachingDisk.CacheAll"/>.</summary>
    public async Task CacheAll(int blocksPerRequest, CancellationToken cancel)
    {
        const int parallel = 16; // enough for a line of 1 GB/s and 10 ms with requests of 1 MiB
        await _cache.CacheAll(Math.Clamp(blocksPerRequest, 1, CachingDisk.MaxFetchBytes / BlockRange.BlockSize), parallel, cancel);
    }

    /// <summary>Gives up what was fetched, since the origin has changed; see <see cref="CachingDisk.Invalidate"/>.</summary>
    /// <exception cref="DiskException">The origin does not answer, or the map cannot be written, or the image alone is the disk now.</exception>
    public void Invalidate()
    {
        lock (_switching)
        {
            if (Image is not null)
                throw new DiskException(DiskError.Permission, "this is a target now: nothing here is a copy");
            _cache.Invalidate().GetAwaiter().GetResult();
        }
    }

    /// <summary>Records that the origin has another address now.</summary>
    public void Rebind(string originName)
        => _cache.Map.ChangeHeader(header => header with { Source = header.Source with { Path = originName } });

    /// <summary>
    /// Makes the image alone the disk, and lets go of the origin. All that is in use goes on; it pauses while what is under
    /// way ends.
    /// </summary>
    /// <param name="force">Also if blocks are missing: they become zeroes.</param>
    /// <exception cref="DiskException">Blocks are missing, or the image cannot be made complete; it goes on as before. (With force, missing blocks may be zeroes already.)</exception>
    public void Switch(bool force)
    {
        lock (_switching)
        {
            if (Image is not null)
                return;
            RefuseIfIncomplete(force);
            Complete(force: false); // most of it while all goes on,
            _disk.Switch(_ =>
            {
                if (force)
                    _cache.ZeroAbsent().GetAwaiter().GetResult(); // what may fail comes before anything has changed
                Complete(force); // and the rest while nothing does
                _cache.Map.ChangeHeader(header => header with { Flags = header.Flags | MapFlags.MayHoldWrites }); // nobody notes them any more
                return _image;
            });
            _image.ShareLock();
            _origin?.Dispose();
            _origin = null;
        }
    }

    /// <summary>Makes durable all that is cached, also of a disk that clients may not write, and what has just been fetched.</summary>
    public async Task FlushAll()
    {
        if (Image is null)
            await _cache.StoredAsync();
        await (Image is null ? _cache.FlushAll() : _image.FlushAsync());
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        _origin?.Dispose();
        _cache.StopStoring();
        _image.Dispose();
        Linux.LinuxFile.Unlock(_mapFile);
        _mapFile.Dispose();
    }

    /// <summary>The file holds every byte of the disk, and file and map are durable.</summary>
    private void Complete(bool force)
    {
        _cache.Materialize(giveUpAbsent: force).GetAwaiter().GetResult();
        _cache.Map.WriteBehind(); // from now on nobody does, and what clients write must not be fetched anew by a proxy of the same files
        _cache.FlushAll().AsTask().GetAwaiter().GetResult();
    }

    private void RefuseIfIncomplete(bool force)
    {
        long absent = _cache.Statistics.AbsentBlocks;
        if (absent == 0 || force)
            return;
        BlockRange first = _cache.Map.Runs().First(r => r.State == BlockState.Absent).Run;
        throw new DiskException(
            DiskError.Permission,
            $"{absent} blocks of {BlockRange.BlockSize} bytes are not cached yet, the first at byte {first.Offset}: cache all first (xnbd-bgctl --cache-all)");
    }
}
