using System.Buffers.Binary;
using System.Diagnostics.CodeAnalysis;

namespace Xnbd.Protocol;

/// <summary>The header of an option, sent by the client (section "Newstyle negotiation").</summary>
/// <param name="Option">The option; unknown values are kept, so that they can be refused.</param>
/// <param name="Length">Bytes of data that follow. It is what the peer says: never allocate it.</param>
public readonly record struct NbdOptionHeader(NbdOption Option, uint Length)
{
    /// <summary>Reads an option's header.</summary>
    /// <param name="source">At least <see cref="NbdSize.OptionHeader"/> bytes.</param>
    /// <param name="header">The header read.</param>
    /// <returns>False when the magic is not <see cref="NbdMagic.Option"/>.</returns>
    public static bool TryRead(ReadOnlySpan<byte> source, out NbdOptionHeader header)
    {
        header = new NbdOptionHeader(
            (NbdOption)BinaryPrimitives.ReadUInt32BigEndian(source[8..]),
            BinaryPrimitives.ReadUInt32BigEndian(source[12..]));
        return BinaryPrimitives.ReadUInt64BigEndian(source) == NbdMagic.Option;
    }
}

/// <summary>The data of <c>NBD_OPT_INFO</c> and <c>NBD_OPT_GO</c> (section "Option types").</summary>
/// <param name="ExportName">The export asked for; empty for the default one.</param>
/// <param name="WantsName"><c>NBD_INFO_NAME</c> was asked for.</param>
/// <param name="WantsDescription"><c>NBD_INFO_DESCRIPTION</c> was asked for.</param>
/// <param name="WantsBlockSize"><c>NBD_INFO_BLOCK_SIZE</c> was asked for.</param>
public sealed record NbdInfoRequest(string ExportName, bool WantsName, bool WantsDescription, bool WantsBlockSize)
{
    /// <summary>Reads the option's data; information requests that are unknown are passed over.</summary>
    /// <returns>False when the lengths do not add up or the name is no string of the protocol.</returns>
    public static bool TryRead(ReadOnlySpan<byte> data, [NotNullWhen(true)] out NbdInfoRequest? request)
    {
        request = null;
        if (data.Length < 6)
            return false;
        uint nameLength = BinaryPrimitives.ReadUInt32BigEndian(data);
        if (nameLength > data.Length - 6 || !NbdString.TryRead(data.Slice(4, (int)nameLength), out string? name))
            return false;
        ReadOnlySpan<byte> rest = data[(4 + (int)nameLength)..];
        int count = BinaryPrimitives.ReadUInt16BigEndian(rest);
        rest = rest[2..];
        if (rest.Length != count * 2)
            return false;

        bool wantsName = false, wantsDescription = false, wantsBlockSize = false;
        for (; rest.Length > 0; rest = rest[2..])
        {
            switch ((NbdInfo)BinaryPrimitives.ReadUInt16BigEndian(rest))
            {
                case NbdInfo.Name: wantsName = true; break;
                case NbdInfo.Description: wantsDescription = true; break;
                case NbdInfo.BlockSize: wantsBlockSize = true; break;
                default: break; // NBD_INFO_EXPORT is always sent; others are unknown and ignored.
            }
        }

        request = new NbdInfoRequest(name, wantsName, wantsDescription, wantsBlockSize);
        return true;
    }
}

/// <summary>
/// The data of <c>NBD_OPT_LIST_META_CONTEXT</c> and <c>NBD_OPT_SET_META_CONTEXT</c> (section "Option types").
/// </summary>
/// <param name="ExportName">The export concerned; empty for the default one.</param>
/// <param name="Queries">The queries, each with its namespace, in the order sent; may be empty.</param>
public sealed record NbdMetaContextRequest(string ExportName, IReadOnlyList<string> Queries)
{
    /// <summary>Reads the option's data.</summary>
    /// <returns>False when the lengths do not add up, or a name or query is no string of the protocol.</returns>
    public static bool TryRead(ReadOnlySpan<byte> data, [NotNullWhen(true)] out NbdMetaContextRequest? request)
    {
        request = null;
        if (!TryTakeString(ref data, out string? name) || data.Length < 4)
            return false;
        uint count = BinaryPrimitives.ReadUInt32BigEndian(data);
        data = data[4..];
        if (count > data.Length / 4) // each query needs its length at least
            return false;

        var queries = new List<string>((int)count);
        for (uint i = 0; i < count; i++)
        {
            if (!TryTakeString(ref data, out string? query))
                return false;
            queries.Add(query);
        }

        request = new NbdMetaContextRequest(name, queries);
        return data.IsEmpty;
    }

    private static bool TryTakeString(ref ReadOnlySpan<byte> data, [NotNullWhen(true)] out string? text)
    {
        text = null;
        if (data.Length < 4)
            return false;
        uint length = BinaryPrimitives.ReadUInt32BigEndian(data);
        if (length > data.Length - 4 || !NbdString.TryRead(data.Slice(4, (int)length), out text))
            return false;
        data = data[(4 + (int)length)..];
        return true;
    }
}
