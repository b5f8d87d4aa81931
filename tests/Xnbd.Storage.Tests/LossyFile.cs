namespace Xnbd.Storage.Tests;

/// <summary>The machine, or the process, dies in the middle of an operation on a file.</summary>
public sealed class CrashException : Exception;

/// <summary>
/// A file whose writes are volatile until they are synced. When the machine dies, each sector keeps what it had at the last
/// sync, or any one of the versions written since: in any combination. When only the process dies, all is kept.
/// A countdown makes it die during an operation: a write is then carried out in part.
/// </summary>
internal sealed class LossyFile(Random random)
{
    public const int Sector = 512;

    private readonly Dictionary<long, byte[]> _durable = [];
    private readonly Dictionary<long, List<byte[]>> _volatile = [];

    /// <summary>Operations that are still carried out; after them each one is a death.</summary>
    public int OperationsLeft { get; set; } = int.MaxValue;

    public void Read(long offset, Span<byte> buffer)
    {
        for (int done = 0; done < buffer.Length;)
        {
            long sector = (offset + done) / Sector;
            int at = (int)((offset + done) % Sector), length = Math.Min(Sector - at, buffer.Length - done);
            if (Newest(sector) is { } bytes)
                bytes.AsSpan(at, length).CopyTo(buffer[done..]);
            else
                buffer.Slice(done, length).Clear();
            done += length;
        }
    }

    public void Write(long offset, ReadOnlySpan<byte> data)
    {
        bool dies = OperationsLeft-- <= 0;
        int unit = data.Length % Sector == 0 ? Sector : sizeof(ulong); // what is not torn: a sector, or a word of the map
        int end = dies ? random.Next((data.Length / unit) + 1) * unit : data.Length;
        for (int done = 0; done < end;)
        {
            long sector = (offset + done) / Sector;
            int at = (int)((offset + done) % Sector), length = Math.Min(Sector - at, data.Length - done);
            byte[] version = Newest(sector)?.ToArray() ?? new byte[Sector];
            data.Slice(done, length).CopyTo(version.AsSpan(at));
            if (!_volatile.TryGetValue(sector, out List<byte[]>? versions))
                _volatile.Add(sector, versions = []);
            versions.Add(version);
            done += length;
        }

        if (dies)
            throw new CrashException();
    }

    public void Sync()
    {
        if (OperationsLeft-- <= 0)
            throw new CrashException();
        foreach ((long sector, List<byte[]> versions) in _volatile)
            _durable[sector] = versions[^1];
        _volatile.Clear();
    }

    /// <summary>The machine has died, and is up again.</summary>
    public void LoseUnsynced()
    {
        foreach ((long sector, List<byte[]> versions) in _volatile)
        {
            int chosen = random.Next(versions.Count + 1);
            if (chosen > 0)
                _durable[sector] = versions[chosen - 1];
        }

        _volatile.Clear();
    }

    private byte[]? Newest(long sector)
        => _volatile.TryGetValue(sector, out List<byte[]>? versions) ? versions[^1] : _durable.GetValueOrDefault(sector);
}

/// <summary>A part of a lossy file as the place of a map.</summary>
internal sealed class LossyStore(LossyFile file) : IMapStore
{
    public void Read(long offset, Span<byte> buffer) => file.Read(offset, buffer);

    public void Write(long offset, ReadOnlySpan<byte> data) => file.Write(offset, data);

    public void Sync() => file.Sync();
}

/// <summary>A part of a lossy file as a disk; all its operations are done at once.</summary>
internal sealed class LossyDisk(LossyFile file, long start, long length) : Disk
{
    /// <summary>Done after a flush has synced, before it returns: what others write in the meantime.</summary>
    public Action? Flushed { get; set; }

    public override long Length => length;

    public override DiskFeatures Features => DiskFeatures.Trim;

    public override bool TryRead(long offset, Span<byte> buffer)
    {
        file.Read(start + offset, buffer);
        return true;
    }

    public override bool TryWrite(long offset, ReadOnlySpan<byte> data)
    {
        file.Write(start + offset, data);
        return true;
    }

    public override FileRange TryLocate(long offset, int length, bool findHoles) => FileRange.None;

    public override ValueTask ReadAsync(long offset, Memory<byte> buffer)
    {
        TryRead(offset, buffer.Span);
        return ValueTask.CompletedTask;
    }

    public override ValueTask WriteAsync(long offset, ReadOnlyMemory<byte> data, bool durable)
    {
        TryWrite(offset, data.Span);
        return durable ? FlushAsync() : ValueTask.CompletedTask;
    }

    public override ValueTask ZeroAsync(long offset, long length, ZeroMode mode, bool durable)
        => WriteAsync(offset, new byte[length], durable);

    public override ValueTask TrimAsync(long offset, long length, bool durable) => ZeroAsync(offset, length, ZeroMode.MayPunch, durable);

    public override ValueTask FlushAsync()
    {
        file.Sync();
        Flushed?.Invoke();
        return ValueTask.CompletedTask;
    }

    public override ValueTask PrefetchAsync(long offset, long length) => ValueTask.CompletedTask;

    public override ValueTask GetExtentsAsync(long offset, long length, ExtentList extents)
    {
        extents.Add(length, isHole: false);
        return ValueTask.CompletedTask;
    }

    protected override void Dispose(bool disposing)
    {
    }
}
