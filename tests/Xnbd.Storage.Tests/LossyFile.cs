using Xnbd.Storage.Maps;

namespace Xnbd.Storage.Tests;

/// <summary>The machine, or the process, dies in the middle of an operation on a file.</summary>
public sealed class CrashException : Exception;

/// <summary>
/// A file whose writes are volatile until they are synced. When the machine dies, each sector keeps what it had at the
/// last sync, or any one of the versions written since: in any combination. When only the process dies, all is kept.
/// A countdown makes it die during an operation: a write is then carried out in part.
/// </summary>
internal sealed class LossyFile(Random random)
{
    public const int Sector = 512;

    private readonly Dictionary<long, byte[]> _durable = [];
    private readonly Dictionary<long, List<byte[]>> _volatile = [];

    /// <summary>Operations that are still carried out; after them each one is a death.</summary>
    public int OperationsLeft { get; set; } = int.MaxValue;

    /// <summary>Grows with each death: what an earlier life has under way comes too late.</summary>
    public int Life { get; private set; }

    /// <summary>Somebody died; another life begins.</summary>
    public void Die()
    {
        lock (_durable)
            Life++;
    }

    private void Live(int life)
    {
        if (life != Life || OperationsLeft-- <= 0)
            throw new CrashException();
    }

    public void Read(int life, long offset, Span<byte> buffer)
    {
        lock (_durable)
        {
            if (life != Life)
                throw new CrashException();
            ReadInside(offset, buffer);
        }
    }

    private void ReadInside(long offset, Span<byte> buffer)
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

    public void Write(int life, long offset, ReadOnlySpan<byte> data)
    {
        lock (_durable)
            WriteInside(life, offset, data);
    }

    private void WriteInside(int life, long offset, ReadOnlySpan<byte> data)
    {
        if (life != Life)
            throw new CrashException();
        bool dies = OperationsLeft-- <= 0;
        // what is not torn: a sector, or a word of the map
        int unit = data.Length % Sector == 0 ? Sector : sizeof(ulong);
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

    /// <summary>Syncs a part of the file: as if that were a file of its own.</summary>
    public void Sync(int life, long from, long end)
    {
        lock (_durable)
        {
            Live(life);
            foreach (long sector in _volatile.Keys.Where(s => s * Sector >= from && s * Sector < end).ToList())
            {
                _durable[sector] = _volatile[sector][^1];
                _volatile.Remove(sector);
            }
        }
    }

    /// <summary>Gives bytes space. They stay zero, and so count as a hole. The process may die here.</summary>
    public void Allocate(int life)
    {
        lock (_durable)
            Live(life);
    }

    /// <summary>Finds sectors that were ever written.</summary>
    public (long Start, long End) FindData(long offset, long end)
    {
        lock (_durable)
        {
            long first = long.MaxValue;
            foreach (long sector in _durable.Keys.Concat(_volatile.Keys))
            {
                if ((sector + 1) * Sector > offset)
                    first = Math.Min(first, sector);
            }

            if (first == long.MaxValue || first * Sector >= end)
                return (end, end);
            long last = first;
            while (Newest(last + 1) is not null)
                last++;
            return (Math.Max(offset, first * Sector), Math.Min(end, (last + 1) * Sector));
        }
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
        => _volatile.TryGetValue(sector, out List<byte[]>? versions)
            ? versions[^1]
            : _durable.GetValueOrDefault(sector);
}

/// <summary>A part of a lossy file as the place of a map.</summary>
/// <param name="file">The file.</param>
/// <param name="end">What is beyond is another file.</param>
internal sealed class LossyStore(LossyFile file, long end = long.MaxValue) : IMapStore
{
    private readonly int _life = file.Life;

    public void Read(long offset, Span<byte> buffer) => file.Read(_life, offset, buffer);

    public void Write(long offset, ReadOnlySpan<byte> data) => file.Write(_life, offset, data);

    public void Sync() => file.Sync(_life, 0, end);

    public void Allocate(long offset, long length) => file.Allocate(_life);

    public (long Start, long End) FindData(long offset, long end) => file.FindData(offset, end);
}

/// <summary>A part of a lossy file as a disk; all its operations are done at once.</summary>
/// <param name="file">The file.</param>
/// <param name="start">Where the disk begins.</param>
/// <param name="length">Its length.</param>
/// <param name="isAlone">What is before its start is another file.</param>
internal sealed class LossyDisk(LossyFile file, long start, long length, bool isAlone = false) : Disk
{
    private readonly int _life = file.Life;

    /// <summary>Done after a flush has synced, before it returns: what others write in the meantime.</summary>
    public Action? Flushed { get; set; }

    public override long Length => length;

    public override DiskFeatures Features => DiskFeatures.None;

    public override bool TryRead(long offset, Span<byte> buffer)
    {
        file.Read(_life, start + offset, buffer);
        return true;
    }

    public override bool TryWrite(long offset, ReadOnlySpan<byte> data)
    {
        file.Write(_life, start + offset, data);
        return true;
    }

    public override FileRange TryLocate(long offset, int length, bool findHoles) => FileRange.None;

    public override bool IsFar(long offset, long length, bool isWrite) => false;

    public override ValueTask ReadAsync(long offset, Memory<byte> buffer, CancellationToken cancel = default)
    {
        TryRead(offset, buffer.Span);
        return ValueTask.CompletedTask;
    }

    public override ValueTask WriteAsync(
        long offset, ReadOnlyMemory<byte> data, bool durable, CancellationToken cancel = default)
    {
        TryWrite(offset, data.Span);
        return durable ? FlushAsync() : ValueTask.CompletedTask;
    }

    public override ValueTask ZeroAsync(
        long offset, long length, ZeroMode mode, bool durable, CancellationToken cancel = default)
        => WriteAsync(offset, new byte[length], durable);

    public override ValueTask TrimAsync(long offset, long length, bool durable, CancellationToken cancel = default)
        => ZeroAsync(offset, length, ZeroMode.MayPunch, durable);

    public override ValueTask FlushAsync()
    {
        file.Sync(_life, isAlone ? start : 0, long.MaxValue);
        Flushed?.Invoke();
        return ValueTask.CompletedTask;
    }

    public override ValueTask PrefetchAsync(long offset, long length, CancellationToken cancel = default)
        => ValueTask.CompletedTask;

    public override ValueTask GetExtentsAsync(long offset, long length, ExtentList extents)
    {
        extents.Add(length, isHole: false);
        return ValueTask.CompletedTask;
    }

    protected override void Dispose(bool disposing)
    {
    }
}
