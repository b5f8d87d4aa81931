namespace Xnbd.Storage.Access;

/// <summary>
/// A disk whose clients are recorded: what they read, and the blocks that they write a part of. It does what the disk
/// below it does.
/// </summary>
/// <param name="disk">The disk; the caller's.</param>
/// <param name="record">The record; the caller's.</param>
public sealed class RecordingDisk(Disk disk, AccessRecord record) : Disk
{
    /// <inheritdoc/>
    public override long Length => disk.Length;

    /// <inheritdoc/>
    public override DiskFeatures Features => disk.Features;

    /// <inheritdoc/>
    public override bool HasIdleReader => disk.HasIdleReader;

    /// <inheritdoc/>
    public override bool TryRead(long offset, Span<byte> buffer)
    {
        record.Note(offset, buffer.Length);
        return disk.TryRead(offset, buffer);
    }

    /// <inheritdoc/>
    public override FileRange TryLocate(long offset, int length, bool findHoles)
    {
        FileRange range = disk.TryLocate(offset, length, findHoles);
        if (range.Length > 0)
            record.Note(offset, range.Length);
        return range;
    }

    /// <inheritdoc/>
    public override bool IsFar(long offset, long length, bool isWrite) => disk.IsFar(offset, length, isWrite);

    /// <inheritdoc/>
    public override ValueTask ReadAsync(long offset, Memory<byte> buffer, CancellationToken cancel = default)
    {
        record.Note(offset, buffer.Length);
        return disk.ReadAsync(offset, buffer, cancel);
    }

    /// <inheritdoc/>
    public override bool TryWrite(long offset, ReadOnlySpan<byte> data)
    {
        NoteEdges(offset, data.Length);
        return disk.TryWrite(offset, data);
    }

    /// <inheritdoc/>
    public override ValueTask WriteAsync(
        long offset, ReadOnlyMemory<byte> data, bool durable, CancellationToken cancel = default)
    {
        NoteEdges(offset, data.Length);
        return disk.WriteAsync(offset, data, durable, cancel);
    }

    /// <inheritdoc/>
    public override ValueTask ZeroAsync(
        long offset, long length, ZeroMode mode, bool durable, CancellationToken cancel = default)
    {
        NoteEdges(offset, length);
        return disk.ZeroAsync(offset, length, mode, durable, cancel);
    }

    /// <inheritdoc/>
    public override ValueTask TrimAsync(long offset, long length, bool durable, CancellationToken cancel = default)
        => disk.TrimAsync(offset, length, durable, cancel);

    /// <inheritdoc/>
    public override ValueTask FlushAsync() => disk.FlushAsync();

    /// <inheritdoc/>
    public override ValueTask PrefetchAsync(long offset, long length, CancellationToken cancel = default)
        => disk.PrefetchAsync(offset, length, cancel);

    /// <inheritdoc/>
    public override ValueTask GetExtentsAsync(long offset, long length, ExtentList extents)
        => disk.GetExtentsAsync(offset, length, extents);

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
    }

    /// <summary>A block that is written in part keeps the rest of what it holds.</summary>
    private void NoteEdges(long offset, long length)
    {
        if (length == 0)
            return;
        long end = offset + length;
        if (offset % BlockRange.BlockSize != 0)
            record.Note(offset, 1);
        if (end % BlockRange.BlockSize != 0 && end != Length)
            record.Note(end - 1, 1);
    }
}
