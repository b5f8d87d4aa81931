using System.Buffers.Binary;

namespace Xnbd.Protocol;

/// <summary>
/// Writes what a server sends during the handshake (sections "Oldstyle negotiation", "Newstyle negotiation",
/// "Fixed newstyle negotiation"). Each method writes at the start of its destination and returns the number of
/// bytes written.
/// </summary>
public static class NbdHandshake
{
    /// <summary>Writes an oldstyle greeting; the transmission phase follows it at once.</summary>
    /// <param name="destination">At least <see cref="NbdSize.OldstyleGreeting"/> bytes.</param>
    /// <param name="exportLength">The export's size in bytes.</param>
    /// <param name="flags">What the export can do.</param>
    public static int WriteOldstyleGreeting(Span<byte> destination, long exportLength, NbdTransmissionFlags flags)
    {
        BinaryPrimitives.WriteUInt64BigEndian(destination, NbdMagic.Init);
        BinaryPrimitives.WriteUInt64BigEndian(destination[8..], NbdMagic.Oldstyle);
        BinaryPrimitives.WriteUInt64BigEndian(destination[16..], (ulong)exportLength);
        BinaryPrimitives.WriteUInt32BigEndian(destination[24..], (uint)flags);
        destination.Slice(28, NbdSize.ReservedZeroes).Clear();
        return NbdSize.OldstyleGreeting;
    }

    /// <summary>Writes a newstyle greeting; the client's flags are to come next.</summary>
    /// <param name="destination">At least <see cref="NbdSize.NewstyleGreeting"/> bytes.</param>
    /// <param name="flags">The server's handshake flags.</param>
    public static int WriteNewstyleGreeting(Span<byte> destination, NbdHandshakeFlags flags)
    {
        BinaryPrimitives.WriteUInt64BigEndian(destination, NbdMagic.Init);
        BinaryPrimitives.WriteUInt64BigEndian(destination[8..], NbdMagic.Option);
        BinaryPrimitives.WriteUInt16BigEndian(destination[16..], (ushort)flags);
        return NbdSize.NewstyleGreeting;
    }

    /// <summary>Writes the answer to <c>NBD_OPT_EXPORT_NAME</c>.</summary>
    /// <param name="destination">At least 134 bytes.</param>
    /// <param name="exportLength">The export's size in bytes.</param>
    /// <param name="flags">What the export can do.</param>
    /// <param name="noZeroes">The client set <see cref="NbdClientFlags.NoZeroes"/>.</param>
    public static int WriteExportNameAnswer(
        Span<byte> destination, long exportLength, NbdTransmissionFlags flags, bool noZeroes)
    {
        BinaryPrimitives.WriteUInt64BigEndian(destination, (ulong)exportLength);
        BinaryPrimitives.WriteUInt16BigEndian(destination[8..], (ushort)flags);
        if (noZeroes)
            return 10;
        destination.Slice(10, NbdSize.ReservedZeroes).Clear();
        return 10 + NbdSize.ReservedZeroes;
    }

    /// <summary>Writes a reply to an option: its header, then <paramref name="data"/>.</summary>
    /// <param name="destination">At least <see cref="NbdSize.OptionReplyHeader"/> bytes more than the data.</param>
    /// <param name="option">The option as the client sent it.</param>
    /// <param name="type">The reply's type.</param>
    /// <param name="data">Its data, or for an error an optional message for people.</param>
    public static int WriteOptionReply(
        Span<byte> destination, NbdOption option, NbdOptionReplyType type, ReadOnlySpan<byte> data)
    {
        BinaryPrimitives.WriteUInt64BigEndian(destination, NbdMagic.OptionReply);
        BinaryPrimitives.WriteUInt32BigEndian(destination[8..], (uint)option);
        BinaryPrimitives.WriteUInt32BigEndian(destination[12..], (uint)type);
        BinaryPrimitives.WriteUInt32BigEndian(destination[16..], (uint)data.Length);
        data.CopyTo(destination[NbdSize.OptionReplyHeader..]);
        return NbdSize.OptionReplyHeader + data.Length;
    }

    /// <summary>The data of an <c>NBD_INFO_EXPORT</c> reply.</summary>
    public static byte[] InfoExport(long exportLength, NbdTransmissionFlags flags)
    {
        byte[] data = new byte[12];
        BinaryPrimitives.WriteUInt16BigEndian(data, (ushort)NbdInfo.Export);
        BinaryPrimitives.WriteUInt64BigEndian(data.AsSpan(2), (ulong)exportLength);
        BinaryPrimitives.WriteUInt16BigEndian(data.AsSpan(10), (ushort)flags);
        return data;
    }

    /// <summary>The data of an <c>NBD_INFO_BLOCK_SIZE</c> reply; all sizes in bytes.</summary>
    public static byte[] InfoBlockSize(uint minimum, uint preferred, uint maximumPayload)
    {
        byte[] data = new byte[14];
        BinaryPrimitives.WriteUInt16BigEndian(data, (ushort)NbdInfo.BlockSize);
        BinaryPrimitives.WriteUInt32BigEndian(data.AsSpan(2), minimum);
        BinaryPrimitives.WriteUInt32BigEndian(data.AsSpan(6), preferred);
        BinaryPrimitives.WriteUInt32BigEndian(data.AsSpan(10), maximumPayload);
        return data;
    }

    /// <summary>The data of an <c>NBD_INFO_NAME</c> or <c>NBD_INFO_DESCRIPTION</c> reply.</summary>
    public static byte[] InfoText(NbdInfo type, string text)
    {
        byte[] bytes = NbdString.GetBytes(text);
        byte[] data = new byte[2 + bytes.Length];
        BinaryPrimitives.WriteUInt16BigEndian(data, (ushort)type);
        bytes.CopyTo(data, 2);
        return data;
    }

    /// <summary>The data of an <c>NBD_REP_SERVER</c> reply.</summary>
    public static byte[] ServerEntry(string exportName, string description)
    {
        byte[] name = NbdString.GetBytes(exportName);
        byte[] text = NbdString.GetBytes(description);
        byte[] data = new byte[4 + name.Length + text.Length];
        BinaryPrimitives.WriteUInt32BigEndian(data, (uint)name.Length);
        name.CopyTo(data, 4);
        text.CopyTo(data, 4 + name.Length);
        return data;
    }

    /// <summary>The data of an <c>NBD_REP_META_CONTEXT</c> reply.</summary>
    public static byte[] MetaContext(uint contextId, string name)
    {
        byte[] bytes = NbdString.GetBytes(name);
        byte[] data = new byte[4 + bytes.Length];
        BinaryPrimitives.WriteUInt32BigEndian(data, contextId);
        bytes.CopyTo(data, 4);
        return data;
    }
}
