using Microsoft.Win32.SafeHandles;
using Xnbd.Storage.Images;
using Xnbd.Storage.Maps;

namespace Xnbd.Storage.Cache;

/// <summary>
/// A cache of a far disk, from its files on: it is opened, filled, and in the end replaced by its image alone
/// (<see cref="Switch"/>), while clients use it.
/// <para>
/// States: cache; target, after a switch, or from the start if an earlier process has switched it; closed.
/// <c>_switching</c> is held while the disk is switched, while the origin's address or contents change, and while all
/// is closed. Clients' operations take no lock here. It is the first lock in the order: blocks, and the locks of the
/// cache's parts, are taken inside it. <c>_files</c> is held while a file is used for the remote's sake, and while the
/// files are closed. Nobody who holds it waits for the remote: the thread that makes connections takes it.
/// </para>
/// <para>What survives: the map's header notes the switch durably, before the disk is replaced.</para>
/// </summary>
public sealed class OriginCache : IDisposable
{
    /// <summary>How long the end of the program waits for a switch that is under way.</summary>
    private static readonly TimeSpan s_maxSwitch = TimeSpan.FromSeconds(5);

    /// <summary>
    /// How many pieces are being copied, or stored, at once: more than the pace lets out, since a piece takes the line
    /// a few milliseconds.
    /// </summary>
    private const int MaxPieces = 256;

    private readonly SwitchableDisk _disk;
    private readonly CachingDisk _cache;
    private readonly ImageFile _image;
    private readonly SafeFileHandle _mapFile;
    private readonly Disk _origin;
    private readonly Lock _switching = new();
    private readonly Lock _files = new();
    private readonly CancellationTokenSource _closing = new();
    private bool _isClosed;

    /// <summary>Composes a cache of open parts, which it owns from now on.</summary>
    /// <param name="cache">The cache.</param>
    /// <param name="image">Its image.</param>
    /// <param name="mapFile">The file of its map.</param>
    /// <param name="origin">The origin.</param>
    /// <param name="isSwitched">The image is the disk from the start: the cache is asked for its figures alone.</param>
    internal OriginCache(
        CachingDisk cache, ImageFile image, SafeFileHandle mapFile, Disk origin, bool isSwitched = false)
    {
        _cache = cache;
        _image = image;
        _mapFile = mapFile;
        _origin = origin;
        _disk = new SwitchableDisk(isSwitched ? image : cache);
    }

    /// <summary>The disk that is served.</summary>
    public Disk Disk => _disk;

    /// <summary>The image, if it alone is the disk now, after a switch; null before.</summary>
    public ImageFile? Image => ReferenceEquals(_disk.Current, _image) ? _image : null;

    /// <summary>
    /// Bytes that the image's file has beyond the disk, if the cache was switched before the start: it was enlarged
    /// since, or has always been larger. They are not served.
    /// </summary>
    public long ExcessBytes { get; init; }

    /// <summary>What has been done so far.</summary>
    public CacheStatistics Statistics => _cache.Statistics;

    /// <summary>How long clients have waited for the origin since the start.</summary>
    public List<LatencyBucket> MissLatency => _cache.MissLatency;

    /// <summary>The largest number of cells of a drawn map.</summary>
    public const int MaxCells = MapCells.Max;

    /// <summary>
    /// Draws which blocks are local, and which are being fetched: a sign for each cell (docs/control.md, method
    /// <c>watch</c>). No request waits for that.
    /// </summary>
    /// <param name="cells">How many cells, 1 to <see cref="MaxCells"/>; fewer if the disk has fewer blocks.</param>
    public string DrawMap(int cells) => _cache.DrawMap(cells);

    /// <summary>Opens the cache's files, or makes them.</summary>
    /// <param name="origin">The far disk; owned from now on, also when this fails.</param>
    /// <param name="originNames">
    /// The origin's addresses, by which it is recognized; the first one is that in use, and is recorded.
    /// </param>
    /// <param name="imagePath">Path of the cache image.</param>
    /// <param name="mapPath">Path of its map.</param>
    /// <param name="opening">What to do with a map that exists.</param>
    /// <param name="readOnly">Clients may not write.</param>
    /// <param name="limits">Bounds of what is under way.</param>
    /// <param name="cannotStore">Told when what was fetched cannot be kept.</param>
    /// <param name="saved">May have loaded the map already.</param>
    /// <exception cref="DiskException">The files do not match; they are untouched.</exception>
    public static OriginCache Open(
        Disk origin,
        IReadOnlyList<string> originNames,
        string imagePath,
        string mapPath,
        CacheOpening opening,
        bool readOnly,
        CacheLimits limits,
        Action<DiskException> cannotStore,
        SavedCache? saved = null)
    {
        ImageFile? image = null;
        SafeFileHandle? mapFile = null;
        try
        {
            (image, BlockMap map, mapFile) = CacheFiles.Open(
                imagePath, mapPath, originNames[0], origin.Length, opening, others: originNames, saved);
            var cache = new CachingDisk(origin, image, map, readOnly, limits, cannotStore);
            if (!map.IsCommitted)
                cache.FlushAll().AsTask().GetAwaiter().GetResult(); // as OverlayDisk.SettleAsync says
            return new OriginCache(cache, image, mapFile, origin);
        }
        catch
        {
            origin.Dispose();
            image?.Dispose();
            LockedFile.Close(mapFile);
            throw;
        }
    }

    /// <summary>Takes blocks that are as the origin has them, by which another server of it is recognized.</summary>
    public DiskSamples TakeSamples()
    {
        lock (_files)
            return _isClosed || Image is not null ? DiskSamples.None : _cache.TakeSamples();
    }

    /// <summary>Reads pass through, and nothing is kept; see <see cref="CachingDisk.IsIncoming"/>.</summary>
    public bool IsIncoming => Image is null && _cache.IsIncoming;

    /// <summary>Told when the first write of a client has ended <see cref="IsIncoming"/>.</summary>
    public Action? Begun
    {
        get => _cache.Begun;
        set => _cache.Begun = value;
    }

    /// <summary>
    /// Lets reads pass through until <see cref="Begin"/>, or until a client writes. To be called before clients use the
    /// disk.
    /// </summary>
    /// <returns>False if something is local already: then the machine has come before.</returns>
    public bool TryPassThrough()
    {
        if (Image is not null || _cache.Statistics.AbsentBlocks < _cache.Map.BlockCount)
            return false;
        _cache.PassThrough();
        return true;
    }

    /// <summary>What is read from now on is kept.</summary>
    /// <returns>False if that is so already.</returns>
    public bool Begin() => _cache.Begin();

    /// <summary>Fetches all that is missing; see <see cref="CachingDisk.CacheAll"/>.</summary>
    /// <param name="blocksPerRequest">How many blocks one request fetches at most; 1 to 256.</param>
    /// <param name="cancel">Ends the work; what was fetched stays.</param>
    /// <exception cref="DiskException">The origin failed, or what was fetched cannot be kept.</exception>
    public async Task CacheAll(int blocksPerRequest, CancellationToken cancel)
    {
        RefuseIfIncoming();
        await _cache.CacheAll(Math.Clamp(blocksPerRequest, 1, Fetch.MaxBlocks), MaxPieces, cancel);
    }

    /// <summary>
    /// Adds ranges that <see cref="CacheAll"/> copies first: one that is under way, or else the next one.
    /// </summary>
    /// <param name="ranges">Ranges inside the disk, in the order in which they are copied.</param>
    /// <exception cref="DiskException">Too many ranges wait already.</exception>
    public void Prefer(IEnumerable<BlockRange> ranges) => _cache.Fill.Prefer(ranges);

    /// <summary>How many blocks those ranges still have; some of them may be local.</summary>
    public long PreferredBlocks => _cache.Fill.PreferredBlocks;

    /// <summary>How many blocks they had, since there were none.</summary>
    public long PreferredTotal => _cache.Fill.PreferredTotal;

    /// <summary>What is left of those ranges has no place before others any more.</summary>
    public void PreferNothing() => _cache.Fill.PreferNothing();

    /// <summary>Fetches what is missing of the ranges of <see cref="Prefer"/>, and nothing else.</summary>
    /// <param name="cancel">Ends the work; what was fetched stays.</param>
    /// <exception cref="DiskException">The origin failed, or what was fetched cannot be kept.</exception>
    public async Task CachePreferred(CancellationToken cancel)
    {
        RefuseIfIncoming();
        do
            await _cache.Fill.RunAsync(all: false, Fetch.MaxBlocks, MaxPieces, cancel);
        while (PreferredBlocks > 0); // a list that came while the last pieces were under way
    }

    /// <summary>
    /// How fast the background copy may be, in bytes per second; 0 for as fast as the line allows. Clients' reads are
    /// not limited.
    /// </summary>
    public long MaxCopyRate
    {
        get => _cache.Throttle.BytesPerSecond;
        set => _cache.Throttle.BytesPerSecond = value;
    }

    /// <summary>Waits while the background copy is paused.</summary>
    public Task WaitWhilePaused(CancellationToken cancel) => _cache.Throttle.WaitAsync(cancel);

    /// <summary>Whether the background copy is paused: it waits until it is not. Clients go on.</summary>
    public bool IsCopyPaused
    {
        get => _cache.Throttle.IsPaused;
        set => _cache.Throttle.IsPaused = value;
    }

    /// <summary>What the line to the origin delivers, in bytes per second; 0 while nothing is known.</summary>
    public long LineRate => _cache.LineRate;

    /// <summary>
    /// Compares what was fetched, and was not written here, with the origin; see <see cref="CacheVerify"/>.
    /// </summary>
    /// <param name="result">Is filled in meanwhile.</param>
    /// <param name="cancel">Ends the work.</param>
    /// <exception cref="DiskException">The origin or the image cannot be read.</exception>
    public Task Verify(CacheVerification result, CancellationToken cancel) => _cache.Verify(result, cancel);

    /// <summary>
    /// Gives up what was fetched, since the origin has changed; see <see cref="CachingDisk.Invalidate"/>.
    /// </summary>
    /// <exception cref="DiskException">
    /// The origin does not answer, or something was written here, or the map cannot be written, or the image alone is
    /// the disk now.
    /// </exception>
    public void Invalidate()
    {
        lock (_switching)
        {
            ThrowIfClosed();
            if (Image is not null)
                throw new DiskException(DiskError.Permission, "this is a target now: nothing here is a copy");
            _cache.Invalidate().GetAwaiter().GetResult();
        }
    }

    /// <summary>Whether an origin's address can be recorded.</summary>
    /// <param name="originName">The address.</param>
    public static bool CanRecord(string originName) => MapHeader.FitsPath(originName);

    /// <summary>Records that the origin has another address now.</summary>
    /// <exception cref="DiskException">The map cannot be written, or the image alone is the disk now.</exception>
    public void Rebind(string originName)
    {
        lock (_files)
        {
            ThrowIfClosed();
            if (Image is not null)
                throw new DiskException(DiskError.Permission, "this is a target now: there is no remote");
            _cache.Map.ChangeHeader(header => header with { Source = header.Source with { Path = originName } });
        }
    }

    /// <summary>
    /// Makes the image alone the disk, and closes the origin. Clients notice nothing; only what waits for the origin
    /// waits for the end of the switch instead.
    /// <para>
    /// The order: 1. The map is sealed: from now on blocks become zero in the file itself only. 2. What the map calls
    /// zero is made zero in the file. From then on all blocks are local, and stay so. Whatever is still under way, the
    /// cache does to the file what the image alone would do: nothing is fetched or stored, no block is completed from
    /// elsewhere, and the map's states do not matter. 3. Data and map are made durable. So the map calls every block
    /// local after a death of the machine, too, and a proxy that is started on it never fetches or zeroes a block that
    /// the image alone has written. 4. The header notes the switch. 5. The disk is replaced.
    /// </para>
    /// </summary>
    /// <param name="force">Switches also if blocks are missing: they become zeroes.</param>
    /// <exception cref="DiskException">
    /// Blocks are missing, or the image cannot be made complete; the cache goes on as before. (With
    /// <paramref name="force"/>, missing blocks may be zeroes already.)
    /// </exception>
    public void Switch(bool force)
    {
        lock (_switching)
        {
            ThrowIfClosed();
            if (Image is not null)
                return;
            RefuseIfIncoming();
            RefuseIfIncomplete(force);
            _disk.Switch(_ =>
            {
                bool mayHaveNoted = false;
                try
                {
                    Complete(force);
                    mayHaveNoted = true;
                    _cache.Map.ChangeHeader(
                        header => header with { Flags = header.Flags | MapFlags.MayHoldWrites | MapFlags.Switched });
                    return _image;
                }
                catch (Exception failure)
                {
                    GoOn(mayHaveNoted);
                    if (failure is OperationCanceledException)
                        throw Closed();
                    throw;
                }
            });
            _image.ShareLock();
            _origin.Dispose();
            _cache.StopStoring(); // nothing is left to store; this frees memory
        }
    }

    /// <summary>
    /// Makes durable all that is cached, and what has just been fetched, also of a disk that clients may not write.
    /// </summary>
    public async Task FlushAll()
    {
        if (Image is null)
            await _cache.WaitUntilStored();
        await (Image is null ? _cache.FlushAll() : _image.FlushAsync());
    }

    /// <inheritdoc/>
    /// <remarks>
    /// A switch that is under way is given up, or ends first. If the file that it waits for does not answer, the files
    /// stay open until the end of the process.
    /// </remarks>
    public void Dispose()
    {
        _closing.Cancel();
        _origin.Dispose(); // what waits for it fails
        if (!_switching.TryEnter(s_maxSwitch))
            return;
        try
        {
            if (_isClosed || !_files.TryEnter(s_maxSwitch))
                return;
            try
            {
                _isClosed = true;
                _cache.StopStoring();
                _image.Dispose();
                LockedFile.Close(_mapFile);
            }
            finally
            {
                _files.Exit();
            }
        }
        finally
        {
            _switching.Exit();
        }
    }

    private void ThrowIfClosed()
    {
        if (_isClosed || _closing.IsCancellationRequested)
            throw Closed();
    }

    private static DiskException Closed() => new(DiskError.Permission, "the server is ending");

    /// <summary>Makes the file hold every byte of the disk, and makes file and map durable. Both stay so.</summary>
    private void Complete(bool force)
    {
        CancellationToken cancel = _closing.Token;
        _cache.Map.Seal();
        if (force)
        {
            // Before anything is given up comes all that may fail, or takes long.
            _cache.ZeroAbsent(cancel).GetAwaiter().GetResult();
            _cache.FlushAll().AsTask().GetAwaiter().GetResult();
            _cache.Detach(); // a writer that waits for the origin holds its blocks
        }

        _cache.Materialize(giveUpAbsent: force, cancel).GetAwaiter().GetResult();
        if (_cache.Map.Count(BlockState.Absent) + _cache.Map.Count(BlockState.Zero) is var left and > 0)
            // This cannot happen; if it does, the switch fails.
            throw new DiskException(DiskError.Io, $"{left} blocks are not in the image");
        _cache.Map.WriteBehind();
        _cache.FlushAll().AsTask().GetAwaiter().GetResult();
        cancel.ThrowIfCancellationRequested();
        _cache.Detach(); // a read may still wait for the origin, of blocks that were written here meanwhile
    }

    /// <summary>
    /// The switch has failed, and the cache goes on. As long as the header may say that the image is complete, the
    /// image stays so.
    /// </summary>
    private void GoOn(bool mayHaveNoted)
    {
        try
        {
            if (mayHaveNoted)
                _cache.Map.ChangeHeader(header => header with { Flags = header.Flags & ~MapFlags.Switched });
            _cache.Map.Unseal();
        }
        catch (DiskException)
        {
            // The map stays sealed.
        }

        _cache.Reattach();
    }

    /// <summary>Refuses what makes no sense while nothing is kept.</summary>
    /// <exception cref="DiskException"><see cref="IsIncoming"/>.</exception>
    public void RefuseIfIncoming()
    {
        if (IsIncoming)
        {
            throw new DiskException(
                DiskError.Permission,
                "the remote may still be written to, so that nothing of it is kept",
                Remedy.BeginKeeping);
        }
    }

    private void RefuseIfIncomplete(bool force)
    {
        long absent = _cache.Statistics.AbsentBlocks;
        if (absent == 0 || force)
            return;
        BlockRange first = _cache.Map.Runs().First(r => r.State == BlockState.Absent).Run;
        throw new DiskException(
            DiskError.Permission,
            $"{absent} blocks of {BlockRange.BlockSize} bytes are not cached yet, the first at byte {first.Offset}",
            Remedy.CacheAll);
    }
}
