using System.Buffers.Binary;
using Xnbd.Protocol;
using Xnbd.Server;

namespace Xnbd.Fuzz;

/// <summary>Follows a handshake on both sides' bytes: the server answers each option once, in good form, and agrees on
/// what it has said.</summary>
/// <param name="client">What the client has sent; afterwards it stands at the first request.</param>
/// <param name="server">What the server has sent; afterwards it stands at the first reply.</param>
internal sealed class HandshakeCheck(ByteReader client, ByteReader server)
{
    private bool _isStructured;
    private List<uint> _contexts = [];
    private string? _contextsExport;

    /// <summary>Checks an oldstyle greeting.</summary>
    public ExpectedAgreement RunOldstyle()
    {
        Check.That(server.TryTake(NbdSize.OldstyleGreeting, out ReadOnlySpan<byte> greeting), "the greeting is whole");
        Check.That(
            NbdGreeting.TryRead(greeting, out bool isNewstyle) && !isNewstyle,
            "the greeting is of the old style");
        Check.That(
            BinaryPrimitives.ReadUInt64BigEndian(greeting[16..]) == FuzzDisk.Bytes,
            "the greeting tells the disk's length");
        return new ExpectedAgreement(IsStructured: false, [], IsInOrder: true);
    }

    /// <summary>Checks a newstyle handshake.</summary>
    /// <returns>Null when no transmission phase follows.</returns>
    public ExpectedAgreement? Run()
    {
        Check.That(server.TryTake(NbdSize.NewstyleGreeting, out ReadOnlySpan<byte> greeting), "the greeting is whole");
        Check.That(
            NbdGreeting.TryRead(greeting, out bool isNewstyle) && isNewstyle,
            "the greeting is of the new style");
        ExpectedAgreement? agreement = null;
        if (client.TryTake(NbdSize.ClientFlags, out ReadOnlySpan<byte> flagBytes))
        {
            var flags = (NbdClientFlags)BinaryPrimitives.ReadUInt32BigEndian(flagBytes);
            if ((flags & ~NbdClientFlags.Known) == 0)
                agreement = FollowOptions((flags & NbdClientFlags.NoZeroes) != 0);
        }

        if (agreement is null)
            Check.That(server.Left == 0, "nothing is sent that no option has asked for");
        return agreement;
    }

    private ExpectedAgreement? FollowOptions(bool noZeroes)
    {
        for (int count = 0; count < ServerLimits.MaxOptions; count++)
        {
            if (!client.TryTake(NbdSize.OptionHeader, out ReadOnlySpan<byte> headerBytes)
                || !NbdOptionHeader.TryRead(headerBytes, out NbdOptionHeader header))
                return null;
            bool isTooLong = header.Length > ServerLimits.MaxOptionData;
            bool isDrained = header.Length <= ServerLimits.MaxDrainedOptionData;
            if (isTooLong && (!isDrained || header.Option == NbdOption.ExportName))
                return null;
            if (!client.TryTake(header.Length, out ReadOnlySpan<byte> data))
                return null;
            if (header.Option == NbdOption.ExportName)
                return FollowExportName(data, noZeroes);

            NbdOptionReplyType last = TakeReplies(header.Option, out List<uint> contexts);
            Check.That(!isTooLong || last == NbdOptionReplyType.ErrTooBig, "an option with too much data is refused");
            switch (header.Option)
            {
                case NbdOption.Abort:
                    return null;
                case NbdOption.StructuredReply:
                    _isStructured |= last == NbdOptionReplyType.Ack;
                    break;
                case NbdOption.SetMetaContext:
                    bool isSet = last == NbdOptionReplyType.Ack;
                    _contextsExport = isSet && NbdMetaContextRequest.TryRead(data, out NbdMetaContextRequest? selection)
                        ? selection.ExportName
                        : null;
                    _contexts = contexts;
                    break;
                case NbdOption.Go when last == NbdOptionReplyType.Ack:
                    Check.That(
                        NbdInfoRequest.TryRead(data, out NbdInfoRequest? request),
                        "no malformed option is granted");
                    return Agree(request!.ExportName);
                default:
                    break;
            }
        }

        return null;
    }

    private ExpectedAgreement Agree(string name)
    {
        Check.That(name is "" or ServedConnection.ExportName, "only an export that exists can be entered");
        return new ExpectedAgreement(_isStructured, _contextsExport == name ? _contexts : []);
    }

    private ExpectedAgreement? FollowExportName(ReadOnlySpan<byte> data, bool noZeroes)
    {
        if (!NbdString.TryRead(data, out string? name) || name is not ("" or ServedConnection.ExportName))
            return null;
        int length = 10 + (noZeroes ? 0 : NbdSize.ReservedZeroes);
        Check.That(server.TryTake(length, out ReadOnlySpan<byte> answer), "the answer to an export's name is whole");
        Check.That(
            BinaryPrimitives.ReadUInt64BigEndian(answer) == FuzzDisk.Bytes,
            "the answer tells the disk's length");
        return Agree(name);
    }

    /// <summary>Takes all replies to one option.</summary>
    /// <returns>The last one's type: an acknowledgement or an error.</returns>
    private NbdOptionReplyType TakeReplies(NbdOption option, out List<uint> contexts)
    {
        contexts = [];
        while (true)
        {
            Check.That(
                server.TryTake(NbdSize.OptionReplyHeader, out ReadOnlySpan<byte> bytes),
                "each option is answered");
            Check.That(
                NbdOptionReplyHeader.TryRead(bytes, out NbdOptionReplyHeader header),
                "an option's reply has its magic");
            Check.That(header.Option == option, "a reply names the option that it answers");
            Check.That(server.TryTake(header.Length, out ReadOnlySpan<byte> data), "an option's reply is whole");
            if (header.IsError)
            {
                Check.That(NbdString.TryRead(data, out _), "an error's message is a string");
                return header.Type;
            }

            switch (header.Type)
            {
                case NbdOptionReplyType.Ack:
                    Check.That(data.IsEmpty, "an acknowledgement has no data");
                    return header.Type;
                case NbdOptionReplyType.Server:
                    Check.That(option == NbdOption.List, "exports are listed when that was asked for");
                    break;
                case NbdOptionReplyType.Info:
                    Check.That(option is NbdOption.Info or NbdOption.Go, "information is given when it was asked for");
                    Check.That(
                        NbdExportInfo.TryRead(data, new NbdExportInfo(0, 0), out _),
                        "information is well formed");
                    break;
                case NbdOptionReplyType.MetaContext:
                    Check.That(
                        option is NbdOption.SetMetaContext or NbdOption.ListMetaContext,
                        "contexts are named when that was asked for");
                    Check.That(
                        NbdClientHandshake.TryReadMetaContext(data, out uint id, out _),
                        "a context is well formed");
                    Check.That(
                        !contexts.Contains(id) || option == NbdOption.ListMetaContext,
                        "contexts have different ids");
                    contexts.Add(id);
                    break;
                default:
                    throw new CheckException($"broken: a reply of type {header.Type} is unknown");
            }
        }
    }
}
