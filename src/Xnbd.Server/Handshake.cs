using System.Buffers.Binary;
using Xnbd.Protocol;

namespace Xnbd.Server;

/// <summary>How a client is greeted.</summary>
public enum HandshakeStyle
{
    /// <summary>Fixed newstyle: options are negotiated.</summary>
    FixedNewstyle,

    /// <summary>Oldstyle: one greeting, no options; for clients from before 2013.</summary>
    Oldstyle,

    /// <summary>Not at all: another program has carried out the handshake.</summary>
    None,
}

/// <summary>What a handshake agreed on.</summary>
/// <param name="Export">What the client chose.</param>
/// <param name="StructuredReplies">Reads are answered with structured replies.</param>
/// <param name="Contexts">The metadata contexts that were selected.</param>
/// <param name="InOrder">Replies go out in the order of the requests: clients of the old style rely on it.</param>
internal sealed record Agreement(Export Export, bool StructuredReplies, MetaContexts Contexts, bool InOrder = false);

/// <summary>Metadata contexts; each one's value is also its id in replies.</summary>
[Flags]
internal enum MetaContexts
{
    /// <summary>None.</summary>
    None = 0,

    /// <summary><c>base:allocation</c>: data or hole (section "base:allocation metadata context").</summary>
    BaseAllocation = 1,

    /// <summary><c>qemu:allocation-depth</c>: which layer holds a block; only of disks that have layers.</summary>
    AllocationDepth = 2,
}

/// <summary>
/// The server's side of the handshake (section "Handshake"): greet, then answer options one by one until the client
/// enters the transmission phase or leaves. Each option is read in full before it is validated, and nothing beyond it
/// is read, so a later change of the stream (TLS) finds no leftovers.
/// </summary>
internal sealed class Handshake
{
    private static readonly (MetaContexts Context, string Namespace, string Name)[] s_contexts =
    [
        (MetaContexts.BaseAllocation, "base:", "base:allocation"),
        (MetaContexts.AllocationDepth, "qemu:", "qemu:allocation-depth"),
    ];

    private readonly Connection _connection;
    private readonly ExportTable _exports;
    private readonly Deadline _deadline;

    // What has been negotiated so far. STARTTLS would reset it.
    private bool _noZeroes;
    private bool _structuredReplies;
    private MetaContexts _contexts; // the selected ones
    private string? _contextsExport; // the export for which they are selected; null for none
    private Agreement? _agreement;
    private string? _refusedName; // the last export that the client wanted to enter and that does not exist

    private Handshake(Connection connection, ExportTable exports, TimeProvider time)
    {
        _deadline = new Deadline(time, ServerLimits.HandshakeTime);
        _connection = connection;
        _exports = exports;
    }

    /// <summary>Runs the handshake.</summary>
    /// <returns>What was agreed on; null when the connection is to be closed (its end reason says why).</returns>
    public static Agreement? Run(Connection connection, ExportTable exports, HandshakeStyle style, TimeProvider time)
    {
        var handshake = new Handshake(connection, exports, time);
        switch (style)
        {
            case HandshakeStyle.None:
                return handshake.Agree(exports.Default!);
            case HandshakeStyle.Oldstyle:
                Export export = exports.Default!;
                byte[] greeting = new byte[NbdSize.OldstyleGreeting];
                NbdHandshake.WriteOldstyleGreeting(
                    greeting, export.Disk.Length, export.TransmissionFlags(structuredReplies: false));
                return connection.SendExactly(greeting, handshake._deadline)
                    ? handshake.Agree(export) with { InOrder = true }
                    : null;
            default:
                Agreement? agreement = handshake.Greet() && handshake.Negotiate() ? handshake._agreement : null;
                if (agreement is null && handshake._refusedName is { } name)
                    connection.AddToEndReason($"it asked for the export '{name}', which does not exist");
                return agreement;
        }
    }

    private Agreement Agree(Export export, string? name = null)
        => _agreement = new Agreement(
            export, _structuredReplies, name is not null && name == _contextsExport ? _contexts : MetaContexts.None);

    private bool Greet()
    {
        Span<byte> greeting = stackalloc byte[NbdSize.NewstyleGreeting];
        NbdHandshake.WriteNewstyleGreeting(greeting, NbdHandshakeFlags.FixedNewstyle | NbdHandshakeFlags.NoZeroes);
        Span<byte> answer = stackalloc byte[NbdSize.ClientFlags];
        if (!_connection.SendExactly(greeting, _deadline) || !_connection.ReceiveExactly(answer, _deadline))
            return false;

        var flags = (NbdClientFlags)BinaryPrimitives.ReadUInt32BigEndian(answer);
        if ((flags & ~NbdClientFlags.Known) != 0)
            return _connection.End($"unknown client flags 0x{(uint)flags:x}");
        _noZeroes = (flags & NbdClientFlags.NoZeroes) != 0;
        return true;
    }

    /// <returns>True when a client has entered the transmission phase.</returns>
    private bool Negotiate()
    {
        Span<byte> headerBytes = stackalloc byte[NbdSize.OptionHeader];
        long maxOptions = ServerLimits.MaxOptions + ((long)ServerLimits.MaxOptionsPerExport * _exports.All.Count);
        for (long count = 0; count < maxOptions; count++)
        {
            if (!_connection.ReceiveExactly(headerBytes, _deadline))
                return false;
            if (!NbdOptionHeader.TryRead(headerBytes, out NbdOptionHeader header))
                return _connection.End("bytes that are no option");
            if (header.Length > ServerLimits.MaxOptionData)
            {
                if (!DrainOversize(header))
                    return false;
                continue;
            }

            byte[] data = header.Length == 0 ? [] : new byte[header.Length];
            if (!_connection.ReceiveExactly(data, _deadline) || !Answer(header.Option, data))
                return false;
            if (_agreement is not null)
                return true;
        }

        return _connection.End("too many options");
    }

    private bool DrainOversize(NbdOptionHeader header)
    {
        if (header.Option == NbdOption.ExportName || header.Length > ServerLimits.MaxDrainedOptionData)
            return _connection.End($"option with {header.Length} bytes of data");
        if (header.Option == NbdOption.SetMetaContext)
            _contextsExport = null; // a failed selection replaces the former one, too
        Span<byte> scratch = stackalloc byte[4096];
        for (uint left = header.Length; left > 0;)
        {
            Span<byte> part = scratch[..(int)Math.Min(left, (uint)scratch.Length)];
            if (!_connection.ReceiveExactly(part, _deadline))
                return false;
            left -= (uint)part.Length;
        }

        return Reply(header.Option, NbdOptionReplyType.ErrTooBig, "too much option data");
    }

    /// <returns>False when the connection is to be closed.</returns>
    private bool Answer(NbdOption option, byte[] data)
    {
        switch (option)
        {
            case NbdOption.ExportName:
                return AnswerExportName(data);
            case NbdOption.Abort:
                return Reply(option, NbdOptionReplyType.Ack) && _connection.End("handshake aborted by client");
            case NbdOption.Info or NbdOption.Go:
                return AnswerInfo(option, data);
            case NbdOption.SetMetaContext or NbdOption.ListMetaContext:
                return AnswerMetaContext(option, data);
            case NbdOption.List or NbdOption.StructuredReply or NbdOption.StartTls or NbdOption.ExtendedHeaders
                when data.Length > 0:
                return Reply(option, NbdOptionReplyType.ErrInvalid, "this option takes no data");
            case NbdOption.List:
                foreach (Export export in _exports.All)
                {
                    byte[] entry = NbdHandshake.ServerEntry(export.Name, export.Description);
                    if (!Reply(option, NbdOptionReplyType.Server, entry))
                        return false;
                }

                return Reply(option, NbdOptionReplyType.Ack);
            case NbdOption.StructuredReply:
                _structuredReplies = true;
                return Reply(option, NbdOptionReplyType.Ack);
            default:
                return Reply(option, NbdOptionReplyType.ErrUnsupported, "this server does not know this option");
        }
    }

    private bool AnswerExportName(byte[] data)
    {
        if (!NbdString.TryRead(data, out string? name))
            return _connection.End("export name that is no valid string");
        if (_exports.Find(name) is not { } export)
            return _connection.End($"unknown export '{Printable(name)}'");
        Agree(export, name);
        Span<byte> answer = stackalloc byte[10 + NbdSize.ReservedZeroes];
        int length = NbdHandshake.WriteExportNameAnswer(
            answer, export.Disk.Length, export.TransmissionFlags(_structuredReplies), _noZeroes);
        return _connection.SendExactly(answer[..length], _deadline);
    }

    private bool AnswerInfo(NbdOption option, byte[] data)
    {
        if (!NbdInfoRequest.TryRead(data, out NbdInfoRequest? request))
            return Reply(option, NbdOptionReplyType.ErrInvalid, "malformed request for information");
        if (_exports.Find(request.ExportName) is not { } export)
        {
            if (option == NbdOption.Go)
                _refusedName = Printable(request.ExportName);
            return Reply(option, NbdOptionReplyType.ErrUnknown, NoExport(request.ExportName));
        }

        bool sent = Reply(
            option,
            NbdOptionReplyType.Info,
            NbdHandshake.InfoExport(export.Disk.Length, export.TransmissionFlags(_structuredReplies)));
        if (request.WantsName)
            sent = sent && Reply(option, NbdOptionReplyType.Info, NbdHandshake.InfoText(NbdInfo.Name, export.Name));
        if (request.WantsDescription)
        {
            sent = sent && Reply(
                option,
                NbdOptionReplyType.Info,
                NbdHandshake.InfoText(NbdInfo.Description, export.DescriptionAndTrail));
        }

        if (request.WantsBlockSize)
        {
            sent = sent && Reply(
                option,
                NbdOptionReplyType.Info,
                NbdHandshake.InfoBlockSize(1, ServerLimits.PreferredBlockSize, ServerLimits.MaxPayload));
        }

        if (!sent || !Reply(option, NbdOptionReplyType.Ack))
            return false;
        if (option == NbdOption.Go)
            Agree(export, request.ExportName);
        return true;
    }

    private bool AnswerMetaContext(NbdOption option, byte[] data)
    {
        bool isSelection = option == NbdOption.SetMetaContext;
        if (isSelection)
            _contextsExport = null; // the selection replaces the former one, even if it fails
        if (!_structuredReplies)
            return Reply(option, NbdOptionReplyType.ErrInvalid, "structured replies must be negotiated first");
        if (!NbdMetaContextRequest.TryRead(data, out NbdMetaContextRequest? request))
            return Reply(option, NbdOptionReplyType.ErrInvalid, "malformed metadata query");
        if (_exports.Find(request.ExportName) is not { } export)
            return Reply(option, NbdOptionReplyType.ErrUnknown, NoExport(request.ExportName));

        MetaContexts found = MetaContexts.None;
        foreach ((MetaContexts context, string space, string name) in s_contexts)
        {
            bool isAsked = request.Queries.Contains(name)
                || (!isSelection && (request.Queries.Count == 0 || request.Queries.Contains(space)));
            if (!isAsked || (context == MetaContexts.AllocationDepth && !export.HasLayers))
                continue;
            byte[] answer = NbdHandshake.MetaContext(isSelection ? (uint)context : 0, name);
            if (!Reply(option, NbdOptionReplyType.MetaContext, answer))
                return false;
            found |= context;
        }

        if (isSelection)
            (_contexts, _contextsExport) = (found, request.ExportName);
        return Reply(option, NbdOptionReplyType.Ack);
    }

    private static string NoExport(string name)
        => name.Length > 0
            ? $"no export named '{Printable(name)}'"
            : "there is no default export: choose one by its name (they can be listed)";

    private bool Reply(NbdOption option, NbdOptionReplyType type, string message)
        => Reply(option, type, NbdString.GetBytes(message));

    private bool Reply(NbdOption option, NbdOptionReplyType type, ReadOnlySpan<byte> data = default)
    {
        byte[] reply = new byte[NbdSize.OptionReplyHeader + data.Length];
        NbdHandshake.WriteOptionReply(reply, option, type, data);
        return _connection.SendExactly(reply, _deadline);
    }

    /// <summary>Makes a client's text fit for a log line or a message.</summary>
    private static string Printable(string text)
    {
        const int maxLength = 64;
        string cut = text.Length > maxLength ? text[..maxLength] + "..." : text;
        return string.Concat(cut.Select(c => char.IsControl(c) || char.IsSurrogate(c) ? '?' : c));
    }
}
