using Xnbd.Storage;

namespace Xnbd.Fuzz;

/// <summary>
/// A small disk in memory with a zone for each way in which a disk can answer: at once, after asking, on another
/// thread,
/// or not at all. What an operation does is done when it is called, also where it completes later; so the result of a
/// sequence of requests is known.
/// </summary>
/// <param name="isReadOnly">The disk cannot be written.</param>
internal sealed class FuzzDisk(bool isReadOnly) : Disk
{
    /// <summary>Bytes of the disk: more than two of the pieces in which the server copies a long read, and an odd
    /// tail.</summary>
    public const int Bytes = (160 * 1024) + 123;

    /// <summary>From here on, the fast forms say no, and the others complete at once.</summary>
    public const int SlowStart = 96 * 1024;

    /// <summary>From here on, operations complete on another thread.</summary>
    public const int LateStart = 120 * 1024;

    /// <summary>From here on, every operation fails.</summary>
    public const int BadStart = 140 * 1024;

    /// <summary>From here on, the disk is as at its start.</summary>
    public const int BadEnd = 144 * 1024;

    private readonly byte[] _bytes = new byte[Bytes];

    public ReadOnlySpan<byte> Content => _bytes;

    /// <summary>How many changes were asked to be durable, and have not failed.</summary>
    public int DurableChanges { get; private set; }

    /// <summary>How often it was flushed.</summary>
    public int Flushes { get; private set; }

    public override long Length => Bytes;

    public override DiskFeatures Features => isReadOnly ? DiskFeatures.ReadOnly : DiskFeatures.None;

    /// <summary>The content at the start of each run: data and holes in turn.</summary>
    public static void FillInitial(Span<byte> bytes)
    {
        bytes.Clear();
        for (int i = 0; i < bytes.Length; i++)
        {
            if (i / (12 * 1024) % 2 == 0)
                bytes[i] = (byte)((i / 251) | 1);
        }
    }

    /// <summary>A range has a byte in the zone where everything fails.</summary>
    public static bool IsBad(long offset, long length) => offset < BadEnd && offset + length > BadStart;

    /// <summary>A range has a byte in a zone without fast zeroes.</summary>
    public static bool IsSlow(long offset, long length) => offset < BadStart && offset + length > SlowStart;

    /// <summary>Takes it back to the content at the start.</summary>
    public void Reset()
    {
        FillInitial(_bytes);
        (DurableChanges, Flushes) = (0, 0);
    }

    public override bool TryRead(long offset, Span<byte> buffer)
    {
        CheckRange(offset, buffer.Length);
        if (IsSlow(offset, buffer.Length))
            return false;
        _bytes.AsSpan((int)offset, buffer.Length).CopyTo(buffer);
        return true;
    }

    public override bool TryWrite(long offset, ReadOnlySpan<byte> data)
    {
        CheckRange(offset, data.Length);
        if (IsSlow(offset, data.Length))
            return false;
        data.CopyTo(_bytes.AsSpan((int)offset));
        return true;
    }

    public override FileRange TryLocate(long offset, int length, bool findHoles) => FileRange.None;

    public override bool IsFar(long offset, long length, bool isWrite) => false;

    public override ValueTask ReadAsync(long offset, Memory<byte> buffer, CancellationToken cancel = default) => Do(
        offset, buffer.Length, () => _bytes.AsSpan((int)offset, buffer.Length).CopyTo(buffer.Span));

    public override ValueTask WriteAsync(
        long offset, ReadOnlyMemory<byte> data, bool durable, CancellationToken cancel = default) => Change(
        offset, data.Length, durable, () => data.Span.CopyTo(_bytes.AsSpan((int)offset)));

    public override ValueTask ZeroAsync(
        long offset, long length, ZeroMode mode, bool durable, CancellationToken cancel = default)
    {
        if ((mode & ZeroMode.FastOnly) != 0 && IsSlow(offset, length))
            return ValueTask.FromException(new DiskException(DiskError.NotSupported, "there are no fast zeroes here"));
        return Change(offset, length, durable, () => _bytes.AsSpan((int)offset, (int)length).Clear());
    }

    /// <summary>Makes zeroes of the range: so the range of a trim can be seen.</summary>
    public override ValueTask TrimAsync(long offset, long length, bool durable, CancellationToken cancel = default)
        => Change(
        offset, length, durable, () => _bytes.AsSpan((int)offset, (int)length).Clear());

    public override ValueTask FlushAsync()
    {
        Flushes++;
        return ValueTask.CompletedTask;
    }

    public override ValueTask PrefetchAsync(long offset, long length, CancellationToken cancel = default)
        => Do(offset, length, () => { });

    public override ValueTask GetExtentsAsync(long offset, long length, ExtentList extents) => Do(offset, length, () =>
    {
        for (long at = offset; at < offset + length;)
        {
            long part = Math.Min(1024 - (at % 1024), offset + length - at);
            if (!extents.Add(part, !_bytes.AsSpan((int)at, (int)part).ContainsAnyExcept((byte)0)))
                return;
            at += part;
        }
    });

    protected override void Dispose(bool disposing)
    {
    }

    private ValueTask Change(long offset, long length, bool durable, Action work) => Do(offset, length, () =>
    {
        work();
        DurableChanges += durable ? 1 : 0;
    });

    private static ValueTask Do(long offset, long length, Action work)
    {
        try
        {
            CheckRange(offset, length);
        }
        catch (DiskException failure)
        {
            return ValueTask.FromException(failure);
        }

        work();
        bool isLate = offset < BadStart && offset + length > LateStart;
        return isLate ? new ValueTask(CompleteLater()) : ValueTask.CompletedTask;
    }

    private static async Task CompleteLater() => await Task.Yield();

    /// <exception cref="DiskException">The range is of the bad zone.</exception>
    /// <exception cref="CheckException">The session has asked for bytes that the disk does not have.</exception>
    private static void CheckRange(long offset, long length)
    {
        Check.That(
            offset >= 0 && length > 0 && offset <= Bytes && length <= Bytes - offset,
            "a disk is asked for its own bytes alone");
        if (IsBad(offset, length))
            throw new DiskException(DiskError.Io, "a bad sector");
    }
}
