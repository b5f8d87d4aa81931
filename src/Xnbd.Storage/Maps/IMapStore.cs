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
}
