using System.Buffers.Binary;
using System.Text;

namespace Xnbd.Protocol;

/// <summary>
/// Writes the replies of the transmission phase (sections "Simple reply message" and "Structured reply chunk
/// message"). Each method writes at the start of its destination and returns the number of bytes written.
/// </summary>
public static class NbdReply
{
    /// <summary>
    /// An error chunk's message is cut to this many bytes: enough for a sentence, far below
    /// <see cref="NbdSize.MaxString"/>.
    /// </summary>
    public const int MaxErrorMessage = 256;

    /// <summary>The most that <see cref="WriteErrorChunk"/> writes.</summary>
    public const int MaxErrorChunk = NbdSize.StructuredReply + 6 + MaxErrorMessage;

    /// <summary>Writes a simple reply's header; for a read without error the data is to follow it.</summary>
    public static int WriteSimple(Span<byte> destination, NbdError error, ulong cookie)
    {
        BinaryPrimitives.WriteUInt32BigEndian(destination, NbdMagic.SimpleReply);
        BinaryPrimitives.WriteUInt32BigEndian(destination[4..], (uint)error);
        BinaryPrimitives.WriteUInt64BigEndian(destination[8..], cookie);
        return NbdSize.SimpleReply;
    }

    /// <summary>Writes a chunk's header; <paramref name="payloadLength"/> bytes of payload are to follow it.</summary>
    public static int WriteChunkHeader(
        Span<byte> destination, NbdChunkFlags flags, NbdChunkType type, ulong cookie, int payloadLength)
    {
        BinaryPrimitives.WriteUInt32BigEndian(destination, NbdMagic.StructuredReply);
        BinaryPrimitives.WriteUInt16BigEndian(destination[4..], (ushort)flags);
        BinaryPrimitives.WriteUInt16BigEndian(destination[6..], (ushort)type);
        BinaryPrimitives.WriteUInt64BigEndian(destination[8..], cookie);
        BinaryPrimitives.WriteUInt32BigEndian(destination[16..], (uint)payloadLength);
        return NbdSize.StructuredReply;
    }

    /// <summary>
    /// Writes the header and offset of an offset-data chunk; <paramref name="dataLength"/> bytes (at least 1) are to
    /// follow it.
    /// </summary>
    public static int WriteOffsetData(
        Span<byte> destination, NbdChunkFlags flags, ulong cookie, ulong offset, int dataLength)
    {
        int at = WriteChunkHeader(
            destination, flags, NbdChunkType.OffsetData, cookie, NbdSize.OffsetDataPrefix + dataLength);
        BinaryPrimitives.WriteUInt64BigEndian(destination[at..], offset);
        return at + NbdSize.OffsetDataPrefix;
    }

    /// <summary>
    /// Writes an offset-hole chunk: <paramref name="holeLength"/> bytes (at least 1) from <paramref name="offset"/> are
    /// zeroes.
    /// </summary>
    public static int WriteOffsetHole(
        Span<byte> destination, NbdChunkFlags flags, ulong cookie, ulong offset, uint holeLength)
    {
        int at = WriteChunkHeader(destination, flags, NbdChunkType.OffsetHole, cookie, NbdSize.OffsetHolePayload);
        BinaryPrimitives.WriteUInt64BigEndian(destination[at..], offset);
        BinaryPrimitives.WriteUInt32BigEndian(destination[(at + 8)..], holeLength);
        return at + NbdSize.OffsetHolePayload;
    }

    /// <summary>Writes an error chunk with a message for people; it is the reply's last chunk.</summary>
    /// <param name="destination">At least <see cref="MaxErrorChunk"/> bytes.</param>
    /// <param name="cookie">The request's cookie.</param>
    /// <param name="error">Not <see cref="NbdError.None"/>.</param>
    /// <param name="message">May be empty; cut to <see cref="MaxErrorMessage"/> bytes.</param>
    public static int WriteErrorChunk(Span<byte> destination, ulong cookie, NbdError error, string message)
    {
        Span<byte> text = destination.Slice(NbdSize.StructuredReply + 6, MaxErrorMessage);
        Encoder encoder = Encoding.UTF8.GetEncoder();
        encoder.Convert(message, text, flush: true, out _, out int textLength, out _);

        int at = WriteChunkHeader(destination, NbdChunkFlags.Done, NbdChunkType.Error, cookie, 6 + textLength);
        BinaryPrimitives.WriteUInt32BigEndian(destination[at..], (uint)error);
        BinaryPrimitives.WriteUInt16BigEndian(destination[(at + 4)..], (ushort)textLength);
        return at + 6 + textLength;
    }

    /// <summary>Bytes of a block-status chunk with <paramref name="extentCount"/> extents.</summary>
    public static int BlockStatusLength(int extentCount) => NbdSize.StructuredReply + 4 + (ExtentLength * extentCount);

    /// <summary>What one extent takes in a block-status chunk, in bytes.</summary>
    public const int ExtentLength = 8;

    /// <summary>
    /// Writes the header and context id of a block-status chunk; the extents follow through <see cref="WriteExtent"/>.
    /// </summary>
    public static int WriteBlockStatus(
        Span<byte> destination, NbdChunkFlags flags, ulong cookie, uint contextId, int extentCount)
    {
        int at = WriteChunkHeader(
            destination, flags, NbdChunkType.BlockStatus, cookie, 4 + (ExtentLength * extentCount));
        BinaryPrimitives.WriteUInt32BigEndian(destination[at..], contextId);
        return at + 4;
    }

    /// <summary>Writes one extent of a block-status chunk.</summary>
    public static int WriteExtent(Span<byte> destination, uint length, uint status)
    {
        BinaryPrimitives.WriteUInt32BigEndian(destination, length);
        BinaryPrimitives.WriteUInt32BigEndian(destination[4..], status);
        return ExtentLength;
    }
}
