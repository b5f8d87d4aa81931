using Microsoft.Win32.SafeHandles;

namespace Xnbd.Storage;

/// <summary>
/// A disk: a fixed number of bytes that can be read and written at any offset. A mode of the server is a
/// composition of disks, so this contract is all that a session knows of its storage:
/// <list type="bullet">
/// <item>Offsets and lengths are bytes; a range lies inside the disk (the session has checked it).</item>
/// <item>All operations may be called concurrently. Operations that overlap in time have no order; one that has
/// completed is visible to every one that starts later, whichever session it belongs to.</item>
/// <item><see cref="FlushAsync"/> makes durable every write, zeroing and trim that had <em>completed</em> when it was
/// called. A durable operation completes only when it is durable itself.</item>
/// <item>An operation that fails throws <see cref="DiskException"/> (an async one through its task, never at the call).
/// A part of it may have happened.</item>
/// <item>A disk that is read-only is never asked to write, zero or trim.</item>
/// <item>An operation may be given up by whoever waits for it. If it waits for another machine, or for an operation
/// that does, then it ends soon as <see cref="OperationCanceledException"/>; a write may have happened in part. Until
/// its task has completed, its buffer belongs to the disk all the same. A disk that answers soon need not
/// look.</item>
/// </list>
/// Reads and writes have a fast form, <c>Try...</c>, which completes on the calling thread without waiting for a
/// disk or a network, or says no; and an async form, which does whatever it takes. Every operation is abstract: each
/// disk says what it does with it, so that none is passed over silently.
/// </summary>
public abstract class Disk : IDisposable
{
    /// <summary>Length of the disk in bytes. It never changes.</summary>
    public abstract long Length { get; }

    /// <summary>What the disk can do. It never changes.</summary>
    public abstract DiskFeatures Features { get; }

    /// <summary>Reads a range if that needs no waiting.</summary>
    /// <returns>False if it would wait; then the buffer's contents are undefined.</returns>
    /// <exception cref="DiskException">The read failed.</exception>
    public abstract bool TryRead(long offset, Span<byte> buffer);

    /// <summary>
    /// Writes a range if that needs no waiting. What was written is visible at once, and durable after the next flush.
    /// </summary>
    /// <returns>False if it would wait; then nothing was written.</returns>
    /// <exception cref="DiskException">The write failed; a part of it may have happened.</exception>
    public abstract bool TryWrite(long offset, ReadOnlySpan<byte> data);

    /// <summary>
    /// Tells where the bytes from <paramref name="offset"/> on stand, if one file holds them, nobody changes that file
    /// as long as the disk is open, and reading them needs no waiting. A session can then send them without a copy. (A
    /// socket refers to the file's pages until the client has taken them. If they were changed in place meanwhile, the
    /// client would get bytes that the disk may never have held.)
    /// </summary>
    /// <param name="offset">Offset of the first byte.</param>
    /// <param name="length">How many bytes are wanted, at least 1.</param>
    /// <param name="findHoles">Tell holes from data; without it all is data.</param>
    /// <exception cref="DiskException">The bytes are lost.</exception>
    /// <returns>
    /// A range that begins at <paramref name="offset"/> and is at most <paramref name="length"/> long;
    /// <see cref="FileRange.None"/> if the bytes must be read instead.
    /// </returns>
    public abstract FileRange TryLocate(long offset, int length, bool findHoles);

    /// <summary>
    /// Whether a read or a write of a range may wait for another machine. An estimate; it costs little.
    /// </summary>
    /// <param name="offset">Offset of the first byte.</param>
    /// <param name="length">Length in bytes, at least 1.</param>
    /// <param name="isWrite">It is written.</param>
    public abstract bool IsFar(long offset, long length, bool isWrite);

    /// <summary>Reads a range; <paramref name="buffer"/> belongs to the disk until the task completes.</summary>
    public abstract ValueTask ReadAsync(long offset, Memory<byte> buffer, CancellationToken cancel = default);

    /// <summary>
    /// A hint: another thread makes <see cref="ReadAsync"/>, and one is idle now. Then a long read may go there
    /// although its data are in memory, so that the caller can do something else meanwhile.
    /// </summary>
    public virtual bool HasIdleReader => false;

    /// <summary>Writes a range; <paramref name="data"/> belongs to the disk until the task completes.</summary>
    public abstract ValueTask WriteAsync(
        long offset, ReadOnlyMemory<byte> data, bool durable, CancellationToken cancel = default);

    /// <summary>Makes a range read as zeroes. A range of length 0 is left alone.</summary>
    /// <exception cref="DiskException">
    /// The kind is <see cref="DiskError.NotSupported"/> only with <see cref="ZeroMode.FastOnly"/>; then the range is
    /// unchanged.
    /// </exception>
    public abstract ValueTask ZeroAsync(
        long offset, long length, ZeroMode mode, bool durable, CancellationToken cancel = default);

    /// <summary>
    /// Tells the disk that the contents of a range are no longer needed. What is read there afterwards is undefined.
    /// </summary>
    public abstract ValueTask TrimAsync(long offset, long length, bool durable, CancellationToken cancel = default);

    /// <summary>Makes durable all that had completed when it was called.</summary>
    public abstract ValueTask FlushAsync();

    /// <summary>Hints that a range will be read soon; may complete before the data is there.</summary>
    public abstract ValueTask PrefetchAsync(long offset, long length, CancellationToken cancel = default);

    /// <summary>Tells data from holes, and which file holds them.</summary>
    /// <param name="offset">Offset of the first byte.</param>
    /// <param name="length">
    /// Length in bytes, at least 1. The answer may cover less, but it has at least one extent.
    /// </param>
    /// <param name="extents">
    /// Receives the extents, in order from <paramref name="offset"/> on, as many as it has room for.
    /// </param>
    public abstract ValueTask GetExtentsAsync(long offset, long length, ExtentList extents);

    /// <summary>Releases files and memory. No operation is under way or will start.</summary>
    public void Dispose()
    {
        Dispose(disposing: true);
        GC.SuppressFinalize(this);
    }

    /// <summary>Releases what the disk holds.</summary>
    protected abstract void Dispose(bool disposing);
}

/// <summary>What a disk can do.</summary>
[Flags]
public enum DiskFeatures
{
    /// <summary>Read and write.</summary>
    None = 0,

    /// <summary>It cannot be written.</summary>
    ReadOnly = 1,

    /// <summary>Its extents stand in several files: their depth is worth asking for.</summary>
    Layered = 2,
}

/// <summary>How a range is made zero.</summary>
[Flags]
public enum ZeroMode
{
    /// <summary>The range stays allocated, or becomes so, however long that takes.</summary>
    None = 0,

    /// <summary>The range may become a hole.</summary>
    MayPunch = 1,

    /// <summary>Fail with <see cref="DiskError.NotSupported"/> rather than write zeroes one by one.</summary>
    FastOnly = 2,
}

/// <summary>Where consecutive bytes of a disk stand in a file, or that they are a hole.</summary>
/// <param name="File">
/// The file; null for a hole, and for <see cref="None"/>. It stays open as long as the disk does.
/// </param>
/// <param name="FileOffset">Offset of the first byte in the file.</param>
/// <param name="Length">Length in bytes, at least 1; 0 for <see cref="None"/>.</param>
public readonly record struct FileRange(SafeFileHandle? File, long FileOffset, int Length)
{
    /// <summary>No answer: the bytes must be read.</summary>
    public static FileRange None => default;

    /// <summary>The bytes are zeroes, which take no space.</summary>
    public bool IsHole => File is null && Length > 0;

    /// <summary>A hole of so many bytes.</summary>
    public static FileRange Hole(int length) => new(null, 0, length);
}
