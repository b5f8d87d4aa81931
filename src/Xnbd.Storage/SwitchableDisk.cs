namespace Xnbd.Storage;

/// <summary>
/// A disk that can be replaced by another one with the same contents, while it is in use: operations that are under way end on
/// the old one first, those that come meanwhile wait, and then go to the new one. No session notices more than a pause.
/// <para>Each operation stands inside the gate, from its start until it is complete; the disk is replaced while it is closed.</para>
/// </summary>
/// <param name="first">The disk at first; owned, as all later ones.</param>
public sealed class SwitchableDisk(Disk first) : Disk
{
    private readonly WriteGate _gate = new();
    private volatile Disk _current = first;

    /// <summary>The disk at present.</summary>
    public Disk Current => _current;

    /// <inheritdoc/>
    public override long Length { get; } = first.Length;

    /// <inheritdoc/>
    public override DiskFeatures Features { get; } = first.Features;

    /// <summary>Replaces the disk.</summary>
    /// <param name="make">Makes the new one of the old one, while nothing is under way. If it throws, the old one stays.</param>
    public void Switch(Func<Disk, Disk> make) => _gate.RunClosed(() => _current = make(_current));

    /// <inheritdoc/>
    public override bool TryRead(long offset, Span<byte> buffer)
    {
        if (!_gate.TryEnter())
            return false;
        try
        {
            return _current.TryRead(offset, buffer);
        }
        finally
        {
            _gate.Leave();
        }
    }

    /// <inheritdoc/>
    public override bool TryWrite(long offset, ReadOnlySpan<byte> data)
    {
        if (!_gate.TryEnter())
            return false;
        try
        {
            return _current.TryWrite(offset, data);
        }
        finally
        {
            _gate.Leave();
        }
    }

    /// <inheritdoc/>
    public override FileRange TryLocate(long offset, int length, bool findHoles)
    {
        if (!_gate.TryEnter())
            return FileRange.None;
        try
        {
            return _current.TryLocate(offset, length, findHoles); // the file stays open: the new disk has the same one
        }
        finally
        {
            _gate.Leave();
        }
    }

    /// <inheritdoc/>
    public override ValueTask ReadAsync(long offset, Memory<byte> buffer)
    {
        _gate.Enter();
        return Guard(_current.ReadAsync(offset, buffer));
    }

    /// <inheritdoc/>
    public override ValueTask WriteAsync(long offset, ReadOnlyMemory<byte> data, bool durable)
    {
        _gate.Enter();
        return Guard(_current.WriteAsync(offset, data, durable));
    }

    /// <inheritdoc/>
    public override ValueTask ZeroAsync(long offset, long length, ZeroMode mode, bool durable)
    {
        _gate.Enter();
        return Guard(_current.ZeroAsync(offset, length, mode, durable));
    }

    /// <inheritdoc/>
    public override ValueTask TrimAsync(long offset, long length, bool durable)
    {
        _gate.Enter();
        return Guard(_current.TrimAsync(offset, length, durable));
    }

    /// <inheritdoc/>
    public override ValueTask FlushAsync()
    {
        _gate.Enter();
        return Guard(_current.FlushAsync());
    }

    /// <inheritdoc/>
    public override ValueTask PrefetchAsync(long offset, long length)
    {
        _gate.Enter();
        return Guard(_current.PrefetchAsync(offset, length));
    }

    /// <inheritdoc/>
    public override ValueTask GetExtentsAsync(long offset, long length, ExtentList extents)
    {
        _gate.Enter();
        return Guard(_current.GetExtentsAsync(offset, length, extents));
    }

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (disposing)
            _current.Dispose();
    }

    private ValueTask Guard(ValueTask operation)
    {
        if (!operation.IsCompleted)
            return Await(operation);
        _gate.Leave();
        return operation;
    }

    private async ValueTask Await(ValueTask operation)
    {
        try
        {
            await operation;
        }
        finally
        {
            _gate.Leave();
        }
    }
}
