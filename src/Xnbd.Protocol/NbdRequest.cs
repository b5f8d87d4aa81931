using System.Buffers.Binary;

namespace Xnbd.Protocol;

/// <summary>
/// The header of a request of the transmission phase (section "Request message"). The cookie is opaque: it is
/// sent back as it came, and it may repeat: then the client tells the replies by their order.
/// </summary>
/// <param name="Flags">Command flags; unknown bits are kept, so that they can be refused.</param>
/// <param name="Command">The request's type; unknown values are kept, so that they can be refused.</param>
/// <param name="Cookie">Opaque to the server.</param>
/// <param name="Offset">First byte concerned, in bytes from the start of the export.</param>
/// <param name="Length">Bytes concerned. A write is followed by as many bytes of payload.</param>
public readonly record struct NbdRequest(
    NbdCommandFlags Flags, NbdCommand Command, ulong Cookie, ulong Offset, uint Length)
{
    /// <summary>Reads a request's header.</summary>
    /// <param name="source">At least <see cref="NbdSize.Request"/> bytes.</param>
    /// <param name="request">The request read.</param>
    /// <returns>
    /// False when the magic is not <see cref="NbdMagic.Request"/>: the stream is out of step, and only a disconnect can
    /// follow.
    /// </returns>
    public static bool TryRead(ReadOnlySpan<byte> source, out NbdRequest request)
    {
        if (BinaryPrimitives.ReadUInt32BigEndian(source) != NbdMagic.Request)
        {
            request = default;
            return false;
        }

        request = new NbdRequest(
            (NbdCommandFlags)BinaryPrimitives.ReadUInt16BigEndian(source[4..]),
            (NbdCommand)BinaryPrimitives.ReadUInt16BigEndian(source[6..]),
            BinaryPrimitives.ReadUInt64BigEndian(source[8..]),
            BinaryPrimitives.ReadUInt64BigEndian(source[16..]),
            BinaryPrimitives.ReadUInt32BigEndian(source[24..]));
        return true;
    }

    /// <summary>Writes the request's header.</summary>
    /// <param name="destination">At least <see cref="NbdSize.Request"/> bytes.</param>
    public void Write(Span<byte> destination)
    {
        BinaryPrimitives.WriteUInt32BigEndian(destination, NbdMagic.Request);
        BinaryPrimitives.WriteUInt16BigEndian(destination[4..], (ushort)Flags);
        BinaryPrimitives.WriteUInt16BigEndian(destination[6..], (ushort)Command);
        BinaryPrimitives.WriteUInt64BigEndian(destination[8..], Cookie);
        BinaryPrimitives.WriteUInt64BigEndian(destination[16..], Offset);
        BinaryPrimitives.WriteUInt32BigEndian(destination[24..], Length);
    }
}
