namespace Xnbd.Storage.Cache;

/// <summary>
/// A disk that can be replaced by another one with the same contents while it is in use. No session notices, and
/// nothing is held up.
/// <para>
/// Operations that are under way when the disk is replaced end on the old one. So from the replacement on, an operation
/// of the old disk must do to the stored bytes what the same operation of the new disk would do. Whoever replaces the
/// disk sees to that.
/// </para>
/// <para>
/// The old disk may fail an operation as <see cref="DiskError.Replaced"/>, because it would wait too long. Such an
/// operation waits until the replacement has ended, well or not, and is carried over to the disk of that time. So is an
/// operation that the old disk fails later.
/// </para>
/// <para>
/// States: at rest; being replaced. <c>_switching</c> is held while the disk is replaced; operations take no lock. The
/// present disk and the task of the last replacement are read by any thread.
/// </para>
/// </summary>
/// <param name="first">The first disk; owned, like all later ones.</param>
internal sealed class SwitchableDisk(Disk first) : Disk
{
    private readonly Lock _switching = new();
    private volatile Disk _current = first;
    private volatile Task _switched = Task.CompletedTask; // completes when the last replacement has ended

    /// <summary>The present disk.</summary>
    public Disk Current => _current;

    /// <inheritdoc/>
    public override long Length { get; } = first.Length;

    /// <inheritdoc/>
    public override DiskFeatures Features { get; } = first.Features;

    /// <summary>Replaces the disk. All operations go on meanwhile.</summary>
    /// <param name="make">Makes the new disk from the old one. If it throws, the old one stays.</param>
    public void Switch(Func<Disk, Disk> make)
    {
        lock (_switching)
        {
            var ended = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
            _switched = ended.Task;
            try
            {
                _current = make(_current);
            }
            finally
            {
                ended.SetResult();
            }
        }
    }

    /// <inheritdoc/>
    public override bool TryRead(long offset, Span<byte> buffer) => _current.TryRead(offset, buffer);

    /// <inheritdoc/>
    public override bool TryWrite(long offset, ReadOnlySpan<byte> data) => _current.TryWrite(offset, data);

    /// <inheritdoc/>
    /// <remarks>The file stays open: the new disk has the same one.</remarks>
    public override FileRange TryLocate(long offset, int length, bool findHoles)
        => _current.TryLocate(offset, length, findHoles);

    /// <inheritdoc/>
    public override bool IsFar(long offset, long length, bool isWrite) => _current.IsFar(offset, length, isWrite);

    /// <inheritdoc/>
    public override ValueTask ReadAsync(long offset, Memory<byte> buffer, CancellationToken cancel = default)
        => Run(
            (offset, buffer), static (disk, read, cancel) => disk.ReadAsync(read.offset, read.buffer, cancel), cancel);

    /// <inheritdoc/>
    public override bool HasIdleReader => _current.HasIdleReader;

    /// <inheritdoc/>
    public override ValueTask WriteAsync(
        long offset, ReadOnlyMemory<byte> data, bool durable, CancellationToken cancel = default)
        => Run(
            (offset, data, durable),
            static (disk, write, cancel) => disk.WriteAsync(write.offset, write.data, write.durable, cancel),
            cancel);

    /// <inheritdoc/>
    public override ValueTask ZeroAsync(
        long offset, long length, ZeroMode mode, bool durable, CancellationToken cancel = default)
        => Run(
            (offset, length, mode, durable),
            static (disk, zero, cancel) => disk.ZeroAsync(zero.offset, zero.length, zero.mode, zero.durable, cancel),
            cancel);

    /// <inheritdoc/>
    public override ValueTask TrimAsync(long offset, long length, bool durable, CancellationToken cancel = default)
        => Run(
            (offset, length, durable),
            static (disk, trim, cancel) => disk.TrimAsync(trim.offset, trim.length, trim.durable, cancel),
            cancel);

    /// <inheritdoc/>
    public override ValueTask FlushAsync() => Run(0, static (disk, _, _) => disk.FlushAsync(), default);

    /// <inheritdoc/>
    public override async ValueTask PrefetchAsync(long offset, long length, CancellationToken cancel = default)
    {
        try
        {
            await _current.PrefetchAsync(offset, length, cancel);
        }
        catch (DiskException failure) when (failure.Error == DiskError.Replaced)
        {
            // Where everything is local, there is nothing to fetch.
        }
    }

    /// <inheritdoc/>
    public override ValueTask GetExtentsAsync(long offset, long length, ExtentList extents)
        => Run(
            (offset, length, extents),
            static (disk, question, _) =>
            {
                question.extents.Clear(); // an earlier disk may have added some
                return disk.GetExtentsAsync(question.offset, question.length, question.extents);
            },
            default);

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (disposing)
            _current.Dispose();
    }

    private ValueTask Run<T>(
        T arguments, Func<Disk, T, CancellationToken, ValueTask> start, CancellationToken cancel)
    {
        Disk disk = _current;
        ValueTask operation = start(disk, arguments, cancel);
        return operation.IsCompletedSuccessfully ? operation : CarryOver(disk, operation, arguments, start, cancel);
    }

    private async ValueTask CarryOver<T>(
        Disk disk,
        ValueTask operation,
        T arguments,
        Func<Disk, T, CancellationToken, ValueTask> start,
        CancellationToken cancel)
    {
        while (true)
        {
            try
            {
                await operation;
                return;
            }
            catch (DiskException failure) when (failure.Error == DiskError.Replaced || !ReferenceEquals(disk, _current))
            {
                // Carried over.
            }

            await _switched.WaitAsync(cancel);
            disk = _current;
            operation = start(disk, arguments, cancel);
        }
    }
}
