using Xnbd.Linux;

namespace Xnbd.Storage;

/// <content>Extents, and where bytes stand.</content>
public sealed partial class ImageFile
{
    /// <summary>
    /// How finely <see cref="TryLocate"/> looks at a range: two cheap system calls for each such part. A search for the
    /// end of the data instead would walk the whole rest of the image.
    /// </summary>
    private const int LocateBytes = 64 * 1024;

    /// <inheritdoc/>
    public override FileRange TryLocate(long offset, int length, bool findHoles)
    {
        findHoles &= _kind == FileKind.Regular;
        int done = 0;
        while (done < length)
        {
            long at = offset + done;
            if (findHoles)
            {
                long data = NextData(at);
                if (data == -(long)Errno.ENXIO)
                    data = Length;
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

    private void GetExtents(long offset, long length, ExtentList extents)
    {
        long end = offset + length;
        while (offset < end)
        {
            long data = NextData(offset);
            if (data == -(long)Errno.ENXIO)
                data = end; // nothing but a hole follows
            if (data < 0)
            {
                _ = extents.Add(end - offset, isHole: false); // it cannot tell: all is data
                return;
            }

            data = Math.Min(data, end);
            if (data > offset && !extents.Add(data - offset, isHole: true))
                return;
            if (data == end)
                return;

            long hole = LinuxFile.NextHole(_file, _start + data) - _start;
            hole = hole > data ? Math.Min(hole, end) : end;
            if (!extents.Add(hole - data, isHole: false))
                return;
            offset = hole;
        }
    }

    /// <returns>Where data begins, at or after an offset of this image; negative as the kernel's answer is.</returns>
    private long NextData(long offset)
    {
        long data = LinuxFile.NextData(_file, _start + offset);
        return data < 0 ? data : data - _start;
    }
}
