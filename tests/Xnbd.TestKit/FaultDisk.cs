using Xnbd.Storage;

namespace Xnbd.TestKit;

/// <summary>
/// A disk that misbehaves on demand. It passes everything on to another disk, and calls <see cref="Before"/> first,
/// which may wait or throw, and <see cref="After"/> afterwards. <see cref="Slow"/> makes the fast forms refuse, as
/// those of a disk that must be waited for do.
/// </summary>
public sealed class FaultDisk(Disk inner) : Disk
{
    /// <summary>Called before each operation with its name, offset and length.</summary>
    public Func<string, long, long, Task>? Before { get; set; }

    /// <summary>Called after each operation that is no fast form, as <see cref="Before"/>.</summary>
    public Func<string, long, long, Task>? After { get; set; }

    /// <summary>
    /// Reports extents in place of the other disk: gets offset, length and the list to fill.
    /// </summary>
    public Action<long, long, ExtentList>? Extents { get; set; }

    /// <summary>The fast forms say no.</summary>
    public bool Slow { get; set; }

    /// <summary>The fast forms say no for some offsets.</summary>
    public Func<long, bool>? SlowAt { get; set; }

    /// <summary>The disk says that another thread reads, and is idle.</summary>
    public bool IsReaderIdle { get; init; }

    /// <summary>The disk reports that its operations wait for another machine; reads can be given up then.</summary>
    public bool IsRemote { get; init; }

    /// <summary>The disk reports that it is read-only.</summary>
    public bool ReadOnly { get; init; }

    /// <summary>Flushes and durable operations that have completed.</summary>
    public int Syncs;

    public override long Length => inner.Length;

    public override DiskFeatures Features => ReadOnly ? DiskFeatures.ReadOnly : inner.Features;

    public override bool HasIdleReader => IsReaderIdle;

    public override bool TryRead(long offset, Span<byte> buffer)
    {
        if (IsSlow(offset))
            return false;
        Before?.Invoke("read", offset, buffer.Length).GetAwaiter().GetResult();
        return inner.TryRead(offset, buffer);
    }

    public override bool TryWrite(long offset, ReadOnlySpan<byte> data)
    {
        if (IsSlow(offset))
            return false;
        Before?.Invoke("write", offset, data.Length).GetAwaiter().GetResult();
        return inner.TryWrite(offset, data);
    }

    public override FileRange TryLocate(long offset, int length, bool findHoles)
        => IsSlow(offset) ? FileRange.None : inner.TryLocate(offset, length, findHoles);

    public override bool IsFar(long offset, long length, bool isWrite)
        => IsRemote || inner.IsFar(offset, length, isWrite);

    public override ValueTask ReadAsync(long offset, Memory<byte> buffer, CancellationToken cancel = default)
        => Run(
            "read",
            offset,
            buffer.Length,
            false,
            () => inner.ReadAsync(offset, buffer, cancel),
            IsRemote ? cancel : default);

    public override ValueTask WriteAsync(
        long offset, ReadOnlyMemory<byte> data, bool durable, CancellationToken cancel = default)
        => Run("write", offset, data.Length, durable, () => inner.WriteAsync(offset, data, durable, cancel));

    public override ValueTask ZeroAsync(
        long offset, long length, ZeroMode mode, bool durable, CancellationToken cancel = default)
        => Run("zero", offset, length, durable, () => inner.ZeroAsync(offset, length, mode, durable, cancel));

    public override ValueTask TrimAsync(long offset, long length, bool durable, CancellationToken cancel = default)
        => Run("trim", offset, length, durable, () => inner.TrimAsync(offset, length, durable, cancel));

    public override ValueTask FlushAsync() => Run("flush", 0, 0, true, inner.FlushAsync);

    public override ValueTask PrefetchAsync(long offset, long length, CancellationToken cancel = default)
        => Run("prefetch", offset, length, false, () => inner.PrefetchAsync(offset, length, cancel));

    public override ValueTask GetExtentsAsync(long offset, long length, ExtentList extents)
        => Run("extents", offset, length, false, () =>
        {
            if (Extents is null)
                return inner.GetExtentsAsync(offset, length, extents);
            Extents(offset, length, extents);
            return ValueTask.CompletedTask;
        });

    protected override void Dispose(bool disposing)
    {
        if (disposing)
            inner.Dispose();
    }

    private bool IsSlow(long offset) => Slow || SlowAt?.Invoke(offset) == true;

    private async ValueTask Run(
        string operation,
        long offset,
        long length,
        bool durable,
        Func<ValueTask> action,
        CancellationToken cancel = default)
    {
        if (Before is { } before)
            await Task.Run(() => before(operation, offset, length), CancellationToken.None).WaitAsync(cancel);
        await action();
        if (After is { } after)
            await Task.Run(() => after(operation, offset, length));
        if (durable)
            Interlocked.Increment(ref Syncs);
    }
}
