using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;

namespace Xnbd.Storage.Images;

/// <summary>
/// Finds where data, holes and the end of an image's file are. Looking for them must not slow down reads and writes: it
/// uses an opening of its own (<c>lseek</c> locks its opening), no call walks through more than is asked for, and the
/// last run of data that was found is remembered. Holes may have been made in a remembered run by another program; to
/// call a hole data is never wrong.
/// <para>
/// Threads: any thread may call any method. <c>_lastRunLock</c> guards the remembered run; no other lock is taken under
/// it.
/// </para>
/// </summary>
internal sealed class DataFinder : IDisposable
{
    /// <summary>
    /// How finely data is looked at, in bytes: one cheap system call for each such part. Smaller holes count as data.
    /// </summary>
    public const int StepBytes = 64 * 1024;

    /// <summary>
    /// How much data one question about extents walks through in memory, in bytes: a millisecond. The answer ends
    /// there, and the client asks on.
    /// </summary>
    private const long MaxWalkBytes = 256 << 20;

    private readonly string _path;
    private readonly SafeFileHandle _file;
    private readonly SafeFileHandle? _ownOpening; // null if the file could not be opened again
    private readonly FileKind _kind;
    private readonly long _start; // where the image begins in its file, in bytes
    private readonly long _length;
    private readonly bool _inMemory;
    private readonly Lock _lastRunLock = new();
    private (long Start, long End) _lastRun; // of data; offsets in the image

    /// <summary>Opens the file a second time.</summary>
    /// <param name="path">The image's path, for messages.</param>
    /// <param name="file">The open file; its owner closes it.</param>
    /// <param name="kind">A regular file or a block device.</param>
    /// <param name="start">Where the image begins in the file, in bytes.</param>
    /// <param name="length">Length of the image in bytes.</param>
    /// <param name="inMemory">The file system keeps all data in memory.</param>
    public DataFinder(string path, SafeFileHandle file, FileKind kind, long start, long length, bool inMemory)
    {
        _path = path;
        _file = file;
        _kind = kind;
        _start = start;
        _length = length;
        _inMemory = inMemory;
        if (kind == FileKind.Regular)
            _ = LinuxFile.OpenAgain(file, out _ownOpening); // if that fails, all goes on with one opening
    }

    /// <summary>The opening of the file that is used to look for data and holes.</summary>
    public SafeFileHandle Opening => _ownOpening ?? _file;

    /// <summary>Where a hole at an offset ends.</summary>
    /// <returns>The offset itself if data stands there, or if the file system cannot tell.</returns>
    /// <exception cref="DiskException">The image ends at or before the offset: it has become shorter.</exception>
    public long HoleEnd(long offset)
    {
        if (_kind != FileKind.Regular)
            return offset;
        long data = NextData(offset);
        return Errno.Of(data) == Errno.ENXIO ? End(offset) : Math.Max(offset, data);
    }

    /// <summary>Tells data from holes, as <see cref="Disk.GetExtentsAsync"/> does.</summary>
    /// <exception cref="DiskException">The range begins behind the end of the file.</exception>
    public void GetExtents(long offset, long length, ExtentList extents)
    {
        long end = Math.Min(offset + length, End(offset)), walked = 0;
        while (offset < end && walked < MaxWalkBytes)
        {
            long dataEnd = KnownDataEnd(offset);
            if (dataEnd <= offset)
            {
                long data = NextData(offset);
                if (Errno.Of(data) == Errno.ENXIO)
                    data = Math.Min(end, End(offset)); // a hole up to the end, unless the file has just become shorter
                if (data < 0)
                {
                    _ = extents.Add(end - offset, isHole: false); // the file system cannot tell: all is data
                    return;
                }

                data = Math.Min(data, end);
                if (data > offset && !extents.Add(data - offset, isHole: true))
                    return;
                offset = data;
                if (offset == end)
                    return;
                dataEnd = FindDataEnd(offset, end);
            }

            dataEnd = Math.Min(dataEnd, end);
            if (!extents.Add(dataEnd - offset, isHole: false))
                return;
            walked += dataEnd - offset;
            offset = dataEnd;
        }
    }

    /// <summary>Forgets a remembered run of data in which a hole is about to be made.</summary>
    public void ForgetRun(long offset, long length)
    {
        lock (_lastRunLock)
        {
            if (offset < _lastRun.End && offset + length > _lastRun.Start)
                _lastRun = default;
        }
    }

    /// <summary>Throws if the image has become shorter since it was opened.</summary>
    /// <exception cref="DiskException">It has.</exception>
    public void ThrowIfShorter()
    {
        if (_length > 0)
            _ = End(_length - 1);
    }

    /// <summary>What to throw when the image ends too early.</summary>
    /// <param name="offset">The first byte that is lost.</param>
    /// <param name="end">Where the image ends now.</param>
    public DiskException TooShort(long offset, long end) => new(
        DiskError.Io,
        $"'{_path}' has become shorter: it ends at {Math.Max(0, end)} and not at {_length}; "
            + $"what stood at {offset} is lost");

    /// <inheritdoc/>
    public void Dispose() => _ownOpening?.Dispose();

    /// <summary>
    /// Where the image ends now: before its length if it has become shorter since it was opened. What stood behind that
    /// end is lost, and no hole: whoever asks for it gets an error, never zeroes.
    /// </summary>
    /// <param name="offset">An offset that somebody asks about.</param>
    /// <exception cref="DiskException">The image ends at or before that offset, or its end is not known.</exception>
    private long End(long offset)
    {
        if (_kind != FileKind.Regular)
            return _length; // a device that has lost its end says so itself
        Errno errno = LinuxFile.Status(_file, out FileStatus status);
        if (errno != Errno.None)
            throw new DiskException("looking for data", _path, offset, 0, errno);
        long end = Math.Min(_length, status.Length - _start);
        return offset < end || _length == 0 ? end : throw TooShort(offset, end);
    }

    /// <summary>The end of the data around an offset if it is remembered, else 0.</summary>
    private long KnownDataEnd(long offset)
    {
        lock (_lastRunLock)
            return offset >= _lastRun.Start && offset < _lastRun.End ? _lastRun.End : 0;
    }

    /// <summary>Finds where data ends, and remembers it.</summary>
    /// <param name="offset">Data stands here.</param>
    /// <param name="end">How far it matters; beyond <paramref name="offset"/>.</param>
    /// <returns>Beyond <paramref name="offset"/>; perhaps beyond <paramref name="end"/>.</returns>
    private long FindDataEnd(long offset, long end)
    {
        long dataEnd = _inMemory ? WalkData(offset, Math.Min(end, offset + MaxWalkBytes)) : NextHole(offset);
        if (dataEnd <= offset)
            dataEnd = end; // the file system cannot tell, or the file has changed meanwhile
        lock (_lastRunLock)
        {
            _lastRun = _lastRun.Start <= offset && offset <= _lastRun.End
                ? (_lastRun.Start, Math.Max(_lastRun.End, dataEnd))
                : (offset, dataEnd);
        }

        return dataEnd;
    }

    /// <summary>
    /// Finds where data ends in memory. SEEK_HOLE would go through all pages of the data, up to the end of the file,
    /// and hold a lock meanwhile for which writers wait. SEEK_DATA at an offset that holds data answers at once.
    /// </summary>
    private long WalkData(long offset, long end)
    {
        while (true)
        {
            long next = (offset / StepBytes * StepBytes) + StepBytes;
            if (next >= end)
                return end;
            if (NextData(next) != next)
                return Math.Min(next, NextHole(offset)); // the hole is in this part, or begins where the next part does
            offset = next;
        }
    }

    /// <returns>Where data begins, at or after an offset of the image; negative, a negated errno, for none.</returns>
    private long NextData(long offset)
    {
        long data = LinuxFile.NextData(Opening, _start + offset);
        return data < 0 ? data : data - _start;
    }

    /// <returns>Where a hole begins, at or after an offset of the image; negative, a negated errno, for none.</returns>
    private long NextHole(long offset)
    {
        long hole = LinuxFile.NextHole(Opening, _start + offset);
        return hole < 0 ? hole : hole - _start;
    }
}
