using Xnbd.Protocol;

namespace Xnbd.Fuzz.Targets;

/// <summary>
/// Data of options and of their replies, as both ends read them. The first byte of the input chooses the parser, the
/// rest is the data. What a
/// parser accepts is written again, and read again: nothing gets lost.
/// </summary>
public sealed class OptionTarget : FuzzTarget
{
    private const int Parsers = 7;

    /// <inheritdoc/>
    public override void Run(byte[] input)
    {
        if (input.Length == 0)
            return;
        ReadOnlySpan<byte> data = input.AsSpan(1);
        switch (input[0] % Parsers)
        {
            case 0:
                RunInfoRequest(data);
                break;
            case 1:
                RunMetaContextRequest(data);
                break;
            case 2:
                if (NbdString.TryRead(data, out string? text))
                    Check.That(
                        NbdString.GetBytes(text).AsSpan().SequenceEqual(data),
                        "a string is written as it was read");
                break;
            case 3:
                RunExportInfo(data);
                break;
            case 4:
                if (NbdClientHandshake.TryReadMetaContext(data, out uint id, out string? name))
                    Check.That(
                        NbdHandshake.MetaContext(id, name).AsSpan().SequenceEqual(data),
                        "a context is written as it was read");
                break;
            case 5:
                RunRequest(data);
                break;
            default:
                RunReplyHeaders(data);
                break;
        }
    }

    private static void RunInfoRequest(ReadOnlySpan<byte> data)
    {
        if (!NbdInfoRequest.TryRead(data, out NbdInfoRequest? request))
            return;
        var kinds = new List<int>();
        if (request.WantsName)
            kinds.Add((int)NbdInfo.Name);
        if (request.WantsDescription)
            kinds.Add((int)NbdInfo.Description);
        if (request.WantsBlockSize)
            kinds.Add((int)NbdInfo.BlockSize);
        byte[] name = NbdString.GetBytes(request.ExportName);
        Bytes again = new Bytes().U32((uint)name.Length).Raw(name).U16(kinds.Count);
        kinds.ForEach(kind => again.U16(kind));
        bool isRead = NbdInfoRequest.TryRead(again.ToArray(), out NbdInfoRequest? second);
        Check.That(isRead && request == second, "a request for information is read as it was written");
    }

    private static void RunMetaContextRequest(ReadOnlySpan<byte> data)
    {
        if (!NbdMetaContextRequest.TryRead(data, out NbdMetaContextRequest? request))
            return;
        byte[] name = NbdString.GetBytes(request.ExportName);
        Bytes again = new Bytes().U32((uint)name.Length).Raw(name).U32((uint)request.Queries.Count);
        foreach (string query in request.Queries)
        {
            byte[] bytes = NbdString.GetBytes(query);
            again.U32((uint)bytes.Length).Raw(bytes);
        }

        Check.That(again.ToArray().AsSpan().SequenceEqual(data), "a metadata query is written as it was read");
    }

    private static void RunExportInfo(ReadOnlySpan<byte> data)
    {
        var known = new NbdExportInfo(12345, NbdTransmissionFlags.HasFlags);
        if (!NbdExportInfo.TryRead(data, known, out NbdExportInfo? info))
            return;
        Check.That(info.MinimumBlock > 0 && info.MaximumPayload >= info.MinimumBlock, "block sizes are possible ones");
        if (info.Length != known.Length && info.Length <= long.MaxValue)
            Check.That(
                NbdHandshake.InfoExport((long)info.Length, info.Flags).AsSpan().SequenceEqual(data),
                "a size is written as it was read");
    }

    private static void RunRequest(ReadOnlySpan<byte> data)
    {
        if (data.Length < NbdSize.Request || !NbdRequest.TryRead(data, out NbdRequest request))
            return;
        byte[] again = new byte[NbdSize.Request];
        request.Write(again);
        Check.That(again.AsSpan().SequenceEqual(data[..NbdSize.Request]), "a request is written as it was read");
    }

    private static void RunReplyHeaders(ReadOnlySpan<byte> data)
    {
        if (data.Length >= NbdSize.OptionHeader && NbdOptionHeader.TryRead(data, out NbdOptionHeader option))
        {
            Bytes again = new Bytes().U64(NbdMagic.Option).U32((uint)option.Option).U32(option.Length);
            Check.That(
                again.ToArray().AsSpan().SequenceEqual(data[..NbdSize.OptionHeader]),
                "an option is written as it was read");
        }

        if (data.Length >= NbdSize.OptionReplyHeader)
            NbdOptionReplyHeader.TryRead(data, out _);
        int length = data.Length >= sizeof(uint) ? NbdReplyHeader.LengthOf(data) : 0;
        if (length == 0 || length > data.Length)
            return;
        NbdReplyHeader header = NbdReplyHeader.Read(data);
        Span<byte> written = stackalloc byte[NbdSize.StructuredReply];
        int count = header.IsStructured
            ? NbdReply.WriteChunkHeader(written, header.Flags, header.Type, header.Cookie, (int)header.Length)
            : NbdReply.WriteSimple(written, header.Error, header.Cookie);
        Check.That(written[..count].SequenceEqual(data[..length]), "a reply's header is written as it was read");
    }

    /// <inheritdoc/>
    public override IEnumerable<(string Name, byte[] Input)> Seeds()
    {
        yield return ("info", [0, .. HandshakeTarget.Info("disk", 1, 2, 3, 99)]);
        yield return ("info-default", [0, .. HandshakeTarget.Info("")]);
        yield return ("contexts", [1, .. HandshakeTarget.Contexts("disk", "base:allocation", "")]);
        yield return ("string", [2, .. "gr\u00fc\u00dfe \ud83d\ude00"u8]);
        yield return ("info-export", [3, .. NbdHandshake.InfoExport(1 << 30, NbdTransmissionFlags.HasFlags)]);
        yield return ("info-block-size", [3, .. NbdHandshake.InfoBlockSize(512, 4096, 1 << 25)]);
        yield return ("info-name", [3, .. NbdHandshake.InfoText(NbdInfo.Name, "disk")]);
        yield return ("meta-context", [4, .. NbdHandshake.MetaContext(1, "base:allocation")]);
        yield return ("request", [5, .. HandshakeTarget.Request(NbdCommand.Write, 4096, 512, NbdCommandFlags.Fua, 77)]);
        yield return ("option", [6, .. HandshakeTarget.Option(NbdOption.List, "1234"u8)]);
        yield return ("simple-reply", new Bytes().U8(6).U32(NbdMagic.SimpleReply).U32(5).U64(1).ToArray());
        yield return ("chunk", new Bytes().U8(6)
            .U32(NbdMagic.StructuredReply).U16(1).U16(1).U64(1).U32(9)
            .U64(0).U8(1)
            .ToArray());
    }
}
