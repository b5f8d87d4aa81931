using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;

namespace Xnbd.Storage.Maps;

/// <summary>
/// Where a map is kept. Bytes survive the process as soon as they are written, and the machine as soon as they are
/// synced. All methods throw <see cref="DiskException"/>.
/// </summary>
internal interface IMapStore
{
    /// <summary>Reads bytes.</summary>
    void Read(long offset, Span<byte> buffer);

    /// <summary>Writes bytes.</summary>
    void Write(long offset, ReadOnlySpan<byte> data);

    /// <summary>Makes durable all that was written.</summary>
    void Sync();

    /// <summary>
    /// Gives bytes space, so that what is written there later finds it. They stay as they are. A store that cannot do
    /// that does nothing.
    /// </summary>
    void Allocate(long offset, long length);

    /// <summary>Finds bytes that may be other than zero.</summary>
    /// <param name="offset">Where the search begins.</param>
    /// <param name="end">Where it ends, behind <paramref name="offset"/>.</param>
    /// <returns>
    /// The first such bytes, at least one, within these bounds. All others before them are zero. A store that cannot
    /// tell returns all that was asked about. Both numbers are <paramref name="end"/> if all are zero.
    /// </returns>
    (long Start, long End) FindData(long offset, long end);
}

/// <summary>A map in a file.</summary>
/// <param name="path">The file's path, for messages.</param>
/// <param name="file">The open file; its owner closes it.</param>
internal sealed class FileMapStore(string path, SafeFileHandle file) : IMapStore
{
    public void Read(long offset, Span<byte> buffer)
    {
        long count = LinuxFile.Read(file, buffer, offset);
        if (count < 0)
            throw new DiskException("read", path, offset, buffer.Length, Errno.Of(count));
        if (count < buffer.Length)
            throw new DiskException(DiskError.Damaged, $"'{path}' is damaged: it is too short");
    }

    public void Write(long offset, ReadOnlySpan<byte> data)
    {
        long count = LinuxFile.Write(file, data, offset);
        if (count < 0)
            throw new DiskException("write", path, offset, data.Length, Errno.Of(count));
    }

    public void Sync()
    {
        if (LinuxFile.SyncData(file) is var errno and not Errno.None)
            throw new DiskException(DiskException.Classify(errno), $"sync of '{path}': {errno.Describe()}");
    }

    public void Allocate(long offset, long length)
    {
        Errno errno = LinuxFile.Allocate(file, AllocateMode.KeepSize, offset, length);
        if (errno is not (Errno.None or Errno.EOPNOTSUPP))
            throw new DiskException("allocation", path, offset, length, errno);
    }

    public (long Start, long End) FindData(long offset, long end)
    {
        long start = LinuxFile.NextData(file, offset);
        if (Errno.Of(start) == Errno.ENXIO || start >= end)
            return (end, end); // only a hole follows, or nothing
        if (start < offset)
            return (offset, end); // the file system cannot tell
        long hole = LinuxFile.NextHole(file, start);
        return (start, hole > start ? Math.Min(hole, end) : end);
    }
}
