using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;

namespace Xnbd.Storage.Images;

/// <content>
/// Where data, holes and the end of the file are. Looking for them must not slow down reads and writes: it uses an
/// opening of its own (<c>lseek</c> locks its opening), no call walks through more than is asked for, and the last run
/// of data that was found is remembered. A remembered run may have got holes since; that data is said to be there is
/// never wrong.
/// </content>
public sealed partial class ImageFile
{
    /// <summary>
    /// How finely <see cref="TryLocate"/>, and a search in memory, look at data: one cheap system call for each such
    /// part, in bytes. Smaller holes count as data.
    /// </summary>
    private const int LocateBytes = 64 * 1024;

    /// <summary>
    /// The most data that one question about extents walks through in memory, in bytes: a millisecond. The answer ends
    /// there, and the client asks on.
    /// </summary>
    private const long MaxWalkBytes = 256 << 20;

    private readonly Lock _lastRunLock = new();
    private (long Start, long End) _lastRun; // of data; offsets in this image

    /// <inheritdoc/>
    public override FileRange TryLocate(long offset, int length, bool findHoles)
    {
        if (MayChange)
            return FileRange.None;
        findHoles &= _kind == FileKind.Regular;
        int done = 0;
        while (done < length)
        {
            long at = offset + done;
            if (findHoles)
            {
                long data = NextData(at);
                if (Errno.Of(data) == Errno.ENXIO)
                    data = FileEnd(at);
                if (data > at) // a hole: it ends the data before it, or is the answer
                    return done > 0 ? new FileRange(_file, _start + offset, done) : FileRange.Hole((int)Math.Min(length, data - at));
            }

            int part = (int)Math.Min(length - done, LocateBytes - (at % LocateBytes));
            if (!_inMemory && !(IsResident(at) && IsResident(at + part - 1)))
                return FileRange.None;
            done += part;
        }

        return new FileRange(_file, _start + offset, length);
    }

    /// <summary>
    /// The file's pages may be changed while a socket still refers to them: then data must be copied. (When XFS punches
    /// a hole, it clears whole blocks in place.) Nobody writes the base of a layer, as its locks say; an image that is
    /// only read is written as long as another program holds the lock of those who write.
    /// </summary>
    private bool MayChange => !_cannotChange && ((Features & DiskFeatures.ReadOnly) == 0 || ImageLock.IsWritten(_file));

    /// <summary>The opening of the file that is used to look for data and holes.</summary>
    private SafeFileHandle Seeking => _seeking ?? _file;

    /// <exception cref="DiskException">The range begins behind the end of the file.</exception>
    private void GetExtents(long offset, long length, ExtentList extents)
    {
        long end = Math.Min(offset + length, FileEnd(offset)), walked = 0;
        while (offset < end && walked < MaxWalkBytes)
        {
            long dataEnd = KnownDataEnd(offset);
            if (dataEnd <= offset)
            {
                long data = NextData(offset);
                if (Errno.Of(data) == Errno.ENXIO)
                    data = Math.Min(end, FileEnd(offset)); // nothing but a hole follows, if it has not just become shorter
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

    /// <summary>The end of the data around an offset, if it is remembered; else 0.</summary>
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
            dataEnd = end; // it cannot tell, or has changed meanwhile
        lock (_lastRunLock)
        {
            _lastRun = _lastRun.Start <= offset && offset <= _lastRun.End
                ? (_lastRun.Start, Math.Max(_lastRun.End, dataEnd))
                : (offset, dataEnd);
        }

        return dataEnd;
    }

    /// <summary>
    /// In memory SEEK_HOLE would go through all pages of the data, up to the end of the file, and hold a lock meanwhile
    /// for which writers wait. SEEK_DATA at an offset that holds data answers at once.
    /// </summary>
    private long WalkData(long offset, long end)
    {
        while (true)
        {
            long next = (offset / LocateBytes * LocateBytes) + LocateBytes;
            if (next >= end)
                return end;
            if (NextData(next) != next)
                return Math.Min(next, NextHole(offset)); // it is in this part, or begins where the next one does
            offset = next;
        }
    }

    /// <summary>Forgets a remembered run of data in which a hole is made.</summary>
    private void ForgetRun(long offset, long length)
    {
        lock (_lastRunLock)
        {
            if (offset < _lastRun.End && offset + length > _lastRun.Start)
                _lastRun = default;
        }
    }

    /// <returns>Where data begins, at or after an offset of this image; negative as the kernel's answer is.</returns>
    private long NextData(long offset)
    {
        long data = LinuxFile.NextData(Seeking, _start + offset);
        return data < 0 ? data : data - _start;
    }

    /// <returns>Where a hole begins, at or after an offset of this image; negative as the kernel's answer is.</returns>
    private long NextHole(long offset)
    {
        long hole = LinuxFile.NextHole(Seeking, _start + offset);
        return hole < 0 ? hole : hole - _start;
    }

    /// <summary>
    /// Where the image ends by now, if it has become shorter since it was opened, else its length. What stood behind
    /// that end is lost, and no hole: whoever asks for it gets an error, never zeroes.
    /// </summary>
    /// <param name="offset">Where somebody wants to know what is there.</param>
    /// <exception cref="DiskException">The end is not beyond that offset, or is not known.</exception>
    private long FileEnd(long offset)
    {
        if (_kind != FileKind.Regular)
            return Length; // a device that has lost its end says so itself
        Errno errno = LinuxFile.Status(_file, out FileStatus status);
        if (errno != Errno.None)
            throw new DiskException("looking for data", Path, offset, 0, errno);
        long end = Math.Min(Length, status.Length - _start);
        return offset < end || Length == 0 ? end : throw TooShort(offset, end);
    }

    /// <exception cref="DiskException">The image has become shorter.</exception>
    private void ThrowIfShorter()
    {
        if (Length > 0)
            _ = FileEnd(Length - 1);
    }

    private DiskException TooShort(long offset, long end)
        => new(DiskError.Io, $"'{Path}' has become shorter: it ends at {Math.Max(0, end)} and not at {Length}; what stood at {offset} is lost");
}
