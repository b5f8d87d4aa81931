using System.Buffers.Binary;
using System.Diagnostics.CodeAnalysis;

namespace Xnbd.Protocol;

/// <summary>The start of a server's greeting, which tells the styles apart (section "Handshake").</summary>
public static class NbdGreeting
{
    /// <summary>Bytes that both styles begin with: two magic numbers.</summary>
    public const int Start = 16;

    /// <summary>Reads the two magic numbers.</summary>
    /// <param name="source">At least <see cref="Start"/> bytes.</param>
    /// <param name="isNewstyle">Options follow; otherwise the size of the only export.</param>
    /// <returns>False when this is no NBD server.</returns>
    public static bool TryRead(ReadOnlySpan<byte> source, out bool isNewstyle)
    {
        ulong second = BinaryPrimitives.ReadUInt64BigEndian(source[8..]);
        isNewstyle = second == NbdMagic.Option;
        return BinaryPrimitives.ReadUInt64BigEndian(source) == NbdMagic.Init
            && (isNewstyle || second == NbdMagic.Oldstyle);
    }
}

/// <summary>The header of a server's reply to an option (section "Fixed newstyle negotiation").</summary>
/// <param name="Option">The option replied to.</param>
/// <param name="Type">What kind of reply.</param>
/// <param name="Length">Bytes of data that follow. It is what the peer says: never allocate it.</param>
public readonly record struct NbdOptionReplyHeader(NbdOption Option, NbdOptionReplyType Type, uint Length)
{
    /// <summary>The reply says that the option failed.</summary>
    public bool IsError => ((uint)Type & 0x8000_0000) != 0;

    /// <summary>Reads a header.</summary>
    /// <param name="source">At least <see cref="NbdSize.OptionReplyHeader"/> bytes.</param>
    /// <param name="header">The header read.</param>
    /// <returns>False when the magic is wrong.</returns>
    public static bool TryRead(ReadOnlySpan<byte> source, out NbdOptionReplyHeader header)
    {
        header = new NbdOptionReplyHeader(
            (NbdOption)BinaryPrimitives.ReadUInt32BigEndian(source[8..]),
            (NbdOptionReplyType)BinaryPrimitives.ReadUInt32BigEndian(source[12..]),
            BinaryPrimitives.ReadUInt32BigEndian(source[16..]));
        return BinaryPrimitives.ReadUInt64BigEndian(source) == NbdMagic.OptionReply;
    }
}

/// <summary>Writes what a client sends during the handshake.</summary>
public static class NbdClientHandshake
{
    /// <summary>An option with its data.</summary>
    public static byte[] Option(NbdOption option, ReadOnlySpan<byte> data = default)
    {
        byte[] message = new byte[NbdSize.OptionHeader + data.Length];
        BinaryPrimitives.WriteUInt64BigEndian(message, NbdMagic.Option);
        BinaryPrimitives.WriteUInt32BigEndian(message.AsSpan(8), (uint)option);
        BinaryPrimitives.WriteUInt32BigEndian(message.AsSpan(12), (uint)data.Length);
        data.CopyTo(message.AsSpan(NbdSize.OptionHeader));
        return message;
    }

    /// <summary>
    /// The data of <c>NBD_OPT_GO</c> and <c>NBD_OPT_INFO</c>, asking for the block sizes and the description as well.
    /// </summary>
    public static byte[] InfoRequest(string exportName)
    {
        byte[] name = NbdString.GetBytes(exportName);
        byte[] data = new byte[4 + name.Length + 6];
        BinaryPrimitives.WriteUInt32BigEndian(data, (uint)name.Length);
        name.CopyTo(data, 4);
        BinaryPrimitives.WriteUInt16BigEndian(data.AsSpan(4 + name.Length), 2);
        BinaryPrimitives.WriteUInt16BigEndian(data.AsSpan(6 + name.Length), (ushort)NbdInfo.BlockSize);
        BinaryPrimitives.WriteUInt16BigEndian(data.AsSpan(8 + name.Length), (ushort)NbdInfo.Description);
        return data;
    }

    /// <summary>The data of <c>NBD_OPT_SET_META_CONTEXT</c> with one query.</summary>
    public static byte[] MetaContextRequest(string exportName, string query)
    {
        byte[] name = NbdString.GetBytes(exportName), text = NbdString.GetBytes(query);
        byte[] data = new byte[4 + name.Length + 4 + 4 + text.Length];
        BinaryPrimitives.WriteUInt32BigEndian(data, (uint)name.Length);
        name.CopyTo(data, 4);
        BinaryPrimitives.WriteUInt32BigEndian(data.AsSpan(4 + name.Length), 1);
        BinaryPrimitives.WriteUInt32BigEndian(data.AsSpan(8 + name.Length), (uint)text.Length);
        text.CopyTo(data, 12 + name.Length);
        return data;
    }

    /// <summary>Reads the data of an <c>NBD_REP_META_CONTEXT</c> reply.</summary>
    /// <returns>False when it is malformed.</returns>
    public static bool TryReadMetaContext(
        ReadOnlySpan<byte> data, out uint contextId, [NotNullWhen(true)] out string? name)
    {
        (contextId, name) = (0, null);
        if (data.Length < 4)
            return false;
        contextId = BinaryPrimitives.ReadUInt32BigEndian(data);
        return NbdString.TryRead(data[4..], out name);
    }
}

/// <summary>What a client has learnt of an export.</summary>
/// <param name="Length">Length in bytes.</param>
/// <param name="Flags">What it can do.</param>
/// <param name="MinimumBlock">Requests are to be multiples of this, in bytes.</param>
/// <param name="MaximumPayload">The largest payload of a read or write in bytes.</param>
/// <param name="Description">What the server says of the export, for people.</param>
public sealed record NbdExportInfo(
    ulong Length,
    NbdTransmissionFlags Flags,
    uint MinimumBlock = 1,
    uint MaximumPayload = 32 << 20,
    string Description = "")
{
    /// <summary>
    /// Takes in the data of an <c>NBD_REP_INFO</c> reply; information that is unknown is passed over.
    /// </summary>
    /// <returns>False when it is malformed.</returns>
    public static bool TryRead(
        ReadOnlySpan<byte> data, NbdExportInfo known, [NotNullWhen(true)] out NbdExportInfo? info)
    {
        info = known;
        if (data.Length < 2)
            return false;
        switch ((NbdInfo)BinaryPrimitives.ReadUInt16BigEndian(data))
        {
            case NbdInfo.Export:
                if (data.Length != 12)
                    return false;
                info = known with
                {
                    Length = BinaryPrimitives.ReadUInt64BigEndian(data[2..]),
                    Flags = (NbdTransmissionFlags)BinaryPrimitives.ReadUInt16BigEndian(data[10..]),
                };
                return true;
            case NbdInfo.BlockSize:
                if (data.Length != 14)
                    return false;
                uint minimum = BinaryPrimitives.ReadUInt32BigEndian(data[2..]);
                uint maximum = BinaryPrimitives.ReadUInt32BigEndian(data[10..]);
                info = known with { MinimumBlock = minimum, MaximumPayload = maximum };
                return minimum > 0 && maximum >= minimum;
            case NbdInfo.Description:
                if (NbdString.TryRead(data[2..], out string? description))
                    info = known with { Description = description };
                return true; // nobody relies on it
            default:
                return true;
        }
    }
}

/// <summary>The header of a reply, simple or structured, as a client reads it.</summary>
/// <param name="IsStructured">It is one chunk of a structured reply.</param>
/// <param name="Error">The error of a simple reply.</param>
/// <param name="Flags">Flags of a chunk.</param>
/// <param name="Type">Type of a chunk.</param>
/// <param name="Cookie">The request's.</param>
/// <param name="Length">Of a chunk: bytes of payload that follow. It is what the peer says.</param>
public readonly record struct NbdReplyHeader(
    bool IsStructured, NbdError Error, NbdChunkFlags Flags, NbdChunkType Type, ulong Cookie, uint Length)
{
    /// <summary>The chunk says that the request failed.</summary>
    public bool IsErrorChunk => ((ushort)Type & 0x8000) != 0;

    /// <summary>How many bytes the header has that begins with these four.</summary>
    /// <returns>0 when it is no reply.</returns>
    public static int LengthOf(ReadOnlySpan<byte> magic) => BinaryPrimitives.ReadUInt32BigEndian(magic) switch
    {
        NbdMagic.SimpleReply => NbdSize.SimpleReply,
        NbdMagic.StructuredReply => NbdSize.StructuredReply,
        _ => 0,
    };

    /// <summary>Reads a header, all of whose bytes are there.</summary>
    public static NbdReplyHeader Read(ReadOnlySpan<byte> source)
    {
        bool isStructured = BinaryPrimitives.ReadUInt32BigEndian(source) == NbdMagic.StructuredReply;
        ulong cookie = BinaryPrimitives.ReadUInt64BigEndian(source[8..]);
        return isStructured
            ? new NbdReplyHeader(
                true,
                NbdError.None,
                (NbdChunkFlags)BinaryPrimitives.ReadUInt16BigEndian(source[4..]),
                (NbdChunkType)BinaryPrimitives.ReadUInt16BigEndian(source[6..]),
                cookie,
                BinaryPrimitives.ReadUInt32BigEndian(source[16..]))
            : new NbdReplyHeader(
                false,
                (NbdError)BinaryPrimitives.ReadUInt32BigEndian(source[4..]),
                NbdChunkFlags.Done,
                NbdChunkType.None,
                cookie,
                0);
    }
}
