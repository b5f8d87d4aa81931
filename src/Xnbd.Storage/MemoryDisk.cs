namespace Xnbd.Storage;

/// <summary>
/// A disk in this process's memory: gone with the process. It stands in for an image in tests, and for an origin in
/// tests of layers. All its operations are done at once.
/// </summary>
/// <param name="length">Length in bytes, below 2 GiB.</param>
public sealed class MemoryDisk(int length) : Disk
{
    private readonly byte[] _bytes = new byte[length];

    /// <inheritdoc/>
    public override long Length => _bytes.Length;

    /// <inheritdoc/>
    public override DiskFeatures Features => DiskFeatures.None;

    /// <inheritdoc/>
    public override bool TryRead(long offset, Span<byte> buffer)
    {
        _bytes.AsSpan((int)offset, buffer.Length).CopyTo(buffer);
        return true;
    }

    /// <inheritdoc/>
    public override bool TryWrite(long offset, ReadOnlySpan<byte> data)
    {
        data.CopyTo(_bytes.AsSpan((int)offset));
        return true;
    }

    /// <inheritdoc/>
    public override FileRange TryLocate(long offset, int length, bool findHoles) => FileRange.None;

    /// <inheritdoc/>
    public override bool IsFar(long offset, long length, bool isWrite) => false;

    /// <inheritdoc/>
    public override ValueTask ReadAsync(long offset, Memory<byte> buffer, CancellationToken cancel = default)
    {
        _ = TryRead(offset, buffer.Span);
        return ValueTask.CompletedTask;
    }

    /// <inheritdoc/>
    public override ValueTask WriteAsync(
        long offset, ReadOnlyMemory<byte> data, bool durable, CancellationToken cancel = default)
    {
        _ = TryWrite(offset, data.Span);
        return ValueTask.CompletedTask;
    }

    /// <inheritdoc/>
    public override ValueTask ZeroAsync(
        long offset, long length, ZeroMode mode, bool durable, CancellationToken cancel = default)
    {
        _bytes.AsSpan((int)offset, (int)length).Clear();
        return ValueTask.CompletedTask;
    }

    /// <inheritdoc/>
    public override ValueTask TrimAsync(long offset, long length, bool durable, CancellationToken cancel = default)
        => ZeroAsync(offset, length, ZeroMode.MayPunch, durable);

    /// <inheritdoc/>
    public override ValueTask FlushAsync() => ValueTask.CompletedTask;

    /// <inheritdoc/>
    public override ValueTask PrefetchAsync(long offset, long length, CancellationToken cancel = default)
        => ValueTask.CompletedTask;

    /// <inheritdoc/>
    public override ValueTask GetExtentsAsync(long offset, long length, ExtentList extents)
    {
        _ = extents.Add(length, isHole: false);
        return ValueTask.CompletedTask;
    }

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
    }
}
