using System.Buffers;

namespace Xnbd.Linux;

/// <summary>
/// A page-aligned buffer outside the managed heap: system calls use it without pinning, a large one costs the
/// garbage collector nothing, and freeing it returns its pages at once. It has one owner at a time, who frees it.
/// </summary>
public sealed unsafe class NativeBuffer : MemoryManager<byte>
{
    private byte* _start;

    /// <summary>Allocates a buffer; its pages are touched only when they are used.</summary>
    /// <param name="length">Length in bytes, at least 1.</param>
    /// <exception cref="OutOfMemoryException">There is not enough memory.</exception>
    public NativeBuffer(int length)
    {
        const int readWrite = 1 | 2, privateAnonymous = 2 | 0x20;
        _start = LibC.MMap(null, (nuint)length, readWrite, privateAnonymous, -1, 0);
        if (_start == (byte*)-1)
        {
            _start = null;
            throw new OutOfMemoryException($"no memory for a buffer of {length} bytes");
        }

        Length = length;
    }

    /// <summary>Length in bytes.</summary>
    public int Length { get; }

    /// <inheritdoc/>
    public override Span<byte> GetSpan() => new(_start, _start is null ? 0 : Length);

    /// <summary>A part of the buffer.</summary>
    public Span<byte> Slice(int start, int length) => GetSpan().Slice(start, length);

    /// <inheritdoc/>
    public override MemoryHandle Pin(int elementIndex = 0) => new(_start + elementIndex);

    /// <inheritdoc/>
    public override void Unpin()
    {
    }

    /// <summary>Frees the memory.</summary>
    public void Free() => Dispose(disposing: true);

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (_start is not null)
            _ = LibC.MUnmap(_start, (nuint)Length);
        _start = null;
    }
}
