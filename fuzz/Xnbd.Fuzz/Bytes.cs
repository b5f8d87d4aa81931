using System.Buffers.Binary;
using System.Text;

namespace Xnbd.Fuzz;

/// <summary>Builds messages in network order, for seeds.</summary>
internal sealed class Bytes
{
    private readonly List<byte> _bytes = [];

    public Bytes U8(byte value)
    {
        _bytes.Add(value);
        return this;
    }

    public Bytes U16(int value)
    {
        Span<byte> bytes = stackalloc byte[sizeof(ushort)];
        BinaryPrimitives.WriteUInt16BigEndian(bytes, (ushort)value);
        return Raw(bytes);
    }

    public Bytes U32(uint value)
    {
        Span<byte> bytes = stackalloc byte[sizeof(uint)];
        BinaryPrimitives.WriteUInt32BigEndian(bytes, value);
        return Raw(bytes);
    }

    public Bytes U64(ulong value)
    {
        Span<byte> bytes = stackalloc byte[sizeof(ulong)];
        BinaryPrimitives.WriteUInt64BigEndian(bytes, value);
        return Raw(bytes);
    }

    public Bytes Raw(ReadOnlySpan<byte> bytes)
    {
        _bytes.AddRange(bytes);
        return this;
    }

    public Bytes Text(string text) => Raw(Encoding.UTF8.GetBytes(text));

    public byte[] ToArray() => [.. _bytes];
}

/// <summary>Reads a message from front to back; running out of bytes is a result, not an error.</summary>
/// <param name="bytes">The message.</param>
/// <param name="start">Where to begin.</param>
internal sealed class ByteReader(byte[] bytes, int start = 0)
{
    private int _at = start;

    public int Left => bytes.Length - _at;

    /// <summary>Takes so many bytes, or none and says no.</summary>
    public bool TryTake(long length, out ReadOnlySpan<byte> taken)
    {
        taken = default;
        if (length > Left)
            return false;
        taken = bytes.AsSpan(_at, (int)length);
        _at += (int)length;
        return true;
    }

    /// <summary>Looks at the next bytes, and leaves them there.</summary>
    public bool TryPeek(int length, out ReadOnlySpan<byte> next)
    {
        next = default;
        if (length > Left)
            return false;
        next = bytes.AsSpan(_at, length);
        return true;
    }
}
