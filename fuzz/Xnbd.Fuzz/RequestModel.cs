using Xnbd.Protocol;

namespace Xnbd.Fuzz;

/// <summary>What a connection has agreed on, as far as its replies show it.</summary>
/// <param name="IsStructured">Reads are answered with structured replies.</param>
/// <param name="ContextIds">The metadata contexts that were selected.</param>
/// <param name="IsInOrder">Replies have the order of the requests.</param>
internal sealed record ExpectedAgreement(bool IsStructured, IReadOnlyList<uint> ContextIds, bool IsInOrder = false);

/// <summary>A request that must be answered, and how.</summary>
/// <param name="Request">The request.</param>
/// <param name="Fails">It is answered with an error.</param>
/// <param name="Content">Of a read or a question for block status: the bytes of its range when it was served.</param>
internal sealed record ExpectedReply(NbdRequest Request, bool Fails, byte[] Content);

/// <summary>
/// What a server has to do with a stream of requests to a <see cref="FuzzDisk"/>, written down anew from the
/// specification:
/// which requests are answered, which fail, what is read, and what the disk holds in the end.
/// </summary>
internal sealed class RequestModel
{
    private readonly byte[] _disk = new byte[FuzzDisk.Bytes];
    private readonly ExpectedAgreement _agreement;
    private readonly bool _isReadOnly;

    /// <summary>Goes through all requests of a client.</summary>
    /// <param name="client">The stream, from the first request on.</param>
    /// <param name="agreement">What the handshake agreed on.</param>
    /// <param name="isReadOnly">The disk cannot be written.</param>
    public RequestModel(ByteReader client, ExpectedAgreement agreement, bool isReadOnly)
    {
        (_agreement, _isReadOnly) = (agreement, isReadOnly);
        FuzzDisk.FillInitial(_disk);
        while (client.TryTake(NbdSize.Request, out ReadOnlySpan<byte> header)
            && NbdRequest.TryRead(header, out NbdRequest request)
            && request.Command != NbdCommand.Disconnect)
        {
            ReadOnlySpan<byte> payload = default;
            if (request.Command == NbdCommand.Write && !client.TryTake(request.Length, out payload))
                return;
            Replies.Add(Serve(request, payload));
        }
    }

    /// <summary>The replies that are due, in the order of the requests.</summary>
    public List<ExpectedReply> Replies { get; } = [];

    /// <summary>The disk's content after the last request.</summary>
    public ReadOnlySpan<byte> Disk => _disk;

    /// <summary>How many changes have the FUA flag, and do not fail.</summary>
    public int DurableChanges { get; private set; }

    /// <summary>How often the client asks for a flush.</summary>
    public int Flushes { get; private set; }

    private ExpectedReply Serve(NbdRequest request, ReadOnlySpan<byte> payload)
    {
        if (IsRefused(request))
            return new ExpectedReply(request, Fails: true, []);
        if (request.Command == NbdCommand.Flush)
            Flushes++;
        if (request.Command == NbdCommand.Flush || request.Length == 0)
            return new ExpectedReply(request, Fails: false, []);

        long offset = (long)request.Offset;
        bool isFastOnly = request.Command == NbdCommand.WriteZeroes && (request.Flags & NbdCommandFlags.FastZero) != 0;
        if (FuzzDisk.IsBad(offset, request.Length) || (isFastOnly && FuzzDisk.IsSlow(offset, request.Length)))
            return new ExpectedReply(request, Fails: true, []);

        Span<byte> range = _disk.AsSpan((int)offset, (int)request.Length);
        switch (request.Command)
        {
            case NbdCommand.Write:
                payload.CopyTo(range);
                break;
            case NbdCommand.WriteZeroes or NbdCommand.Trim:
                range.Clear();
                break;
            default:
                break;
        }

        bool isChange = request.Command is NbdCommand.Write or NbdCommand.WriteZeroes or NbdCommand.Trim;
        if (isChange && (request.Flags & NbdCommandFlags.Fua) != 0)
            DurableChanges++;
        bool hasContent = request.Command is NbdCommand.Read or NbdCommand.BlockStatus;
        return new ExpectedReply(request, Fails: false, hasContent ? range.ToArray() : []);
    }

    private bool IsRefused(in NbdRequest request)
    {
        NbdCommandFlags allowed = NbdCommandFlags.Fua;
        switch (request.Command)
        {
            case NbdCommand.Read when _agreement.IsStructured:
                allowed |= NbdCommandFlags.Df;
                break;
            case NbdCommand.WriteZeroes:
                allowed |= NbdCommandFlags.NoHole | NbdCommandFlags.FastZero;
                break;
            case NbdCommand.BlockStatus:
                allowed |= NbdCommandFlags.ReqOne;
                break;
            case NbdCommand.Read or NbdCommand.Write or NbdCommand.Flush or NbdCommand.Trim or NbdCommand.Cache:
                break;
            default:
                return true; // an unknown command
        }

        if ((request.Flags & ~allowed) != 0)
            return true;
        if (request.Command == NbdCommand.Flush)
            return false; // its offset and length mean nothing
        if (_isReadOnly && request.Command is NbdCommand.Write or NbdCommand.WriteZeroes or NbdCommand.Trim)
            return true;
        if (request.Offset > FuzzDisk.Bytes || request.Length > FuzzDisk.Bytes - request.Offset)
            return true;
        return request.Command == NbdCommand.BlockStatus && (_agreement.ContextIds.Count == 0 || request.Length == 0);
    }
}
