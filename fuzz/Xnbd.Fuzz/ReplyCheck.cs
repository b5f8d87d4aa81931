using System.Buffers.Binary;
using Xnbd.Protocol;

namespace Xnbd.Fuzz;

/// <summary>
/// Checks what a server has sent in the transmission phase against a <see cref="RequestModel"/>: each request is
/// answered
/// once and rightly, in well-formed replies, and nothing else is sent.
/// </summary>
/// <param name="agreement">What the handshake agreed on.</param>
/// <param name="expected">The replies that are due, in the order of the requests.</param>
internal sealed class ReplyCheck(ExpectedAgreement agreement, IEnumerable<ExpectedReply> expected)
{
    private readonly List<Pending> _pending = [.. expected.Select(reply => new Pending(reply))];

    private sealed class Pending(ExpectedReply expected)
    {
        public ExpectedReply Expected { get; } = expected;

        public NbdRequest Request => Expected.Request;

        public bool HasError { get; set; }

        public bool[]? Covered { get; set; }

        public List<uint> Contexts { get; } = [];
    }

    /// <summary>Checks all of it.</summary>
    /// <param name="server">What the server has sent, from the end of the handshake on.</param>
    public void Run(ByteReader server)
    {
        while (server.TryPeek(sizeof(uint), out ReadOnlySpan<byte> magic))
        {
            int length = NbdReplyHeader.LengthOf(magic);
            Check.That(length > 0, "each reply begins with a magic number");
            Check.That(server.TryTake(length, out ReadOnlySpan<byte> bytes), "no reply breaks off");
            NbdReplyHeader header = NbdReplyHeader.Read(bytes);
            int place = _pending.FindIndex(p => p.Request.Cookie == header.Cookie);
            Check.That(place >= 0, "a reply answers a request that waits for it");
            Check.That(place == 0 || !agreement.IsInOrder, "replies of the old style have the order of the requests");
            Pending pending = _pending[place];
            if (header.IsStructured)
                TakeChunk(pending, header, server);
            else
                TakeSimple(pending, header, server);
            if (!header.IsStructured || (header.Flags & NbdChunkFlags.Done) != 0)
            {
                Finish(pending);
                _pending.RemoveAt(place);
            }
        }

        Check.That(server.Left == 0, "no reply breaks off");
        Check.That(_pending.Count == 0, "each request is answered");
    }

    private void TakeSimple(Pending pending, NbdReplyHeader header, ByteReader server)
    {
        NbdRequest request = pending.Request;
        Check.That(!agreement.IsStructured || request.Command != NbdCommand.Read, "reads are answered as agreed");
        Check.That(pending.Covered is null && pending.Contexts.Count == 0, "a reply has one form");
        pending.HasError = header.Error != NbdError.None;
        if (request.Command != NbdCommand.Read || pending.HasError)
            return;
        Check.That(server.TryTake(request.Length, out ReadOnlySpan<byte> data), "no reply breaks off");
        Check.That(
            !pending.Expected.Fails && data.SequenceEqual(pending.Expected.Content),
            "a read has what was written last");
        pending.Covered = new bool[request.Length];
        pending.Covered.AsSpan().Fill(true);
    }

    private void TakeChunk(Pending pending, NbdReplyHeader header, ByteReader server)
    {
        Check.That(agreement.IsStructured, "structured replies are sent only where they were agreed on");
        Check.That((header.Flags & ~NbdChunkFlags.Done) == 0, "chunks have no unknown flags");
        Check.That(!pending.HasError, "an error is a reply's last chunk");
        Check.That(server.TryTake(header.Length, out ReadOnlySpan<byte> payload), "no reply breaks off");
        bool isLast = (header.Flags & NbdChunkFlags.Done) != 0;
        NbdCommand command = pending.Request.Command;
        switch (header.Type)
        {
            case NbdChunkType.None:
                Check.That(isLast && payload.IsEmpty, "a chunk of no type is empty, and the last one");
                break;
            case NbdChunkType.Error:
                Check.That(isLast && payload.Length >= 6, "an error is whole, and the last chunk");
                Check.That(BinaryPrimitives.ReadUInt32BigEndian(payload) != 0, "an error has a number");
                int textLength = BinaryPrimitives.ReadUInt16BigEndian(payload[4..]);
                Check.That(textLength == payload.Length - 6, "an error's message has its length");
                Check.That(NbdString.TryRead(payload[6..], out _), "an error's message is a string");
                pending.HasError = true;
                break;
            case NbdChunkType.OffsetData when command == NbdCommand.Read:
                Check.That(payload.Length > NbdSize.OffsetDataPrefix, "a chunk of data is not empty");
                TakeData(pending, BinaryPrimitives.ReadUInt64BigEndian(payload), payload[NbdSize.OffsetDataPrefix..]);
                break;
            case NbdChunkType.OffsetHole when command == NbdCommand.Read:
                Check.That(payload.Length == NbdSize.OffsetHolePayload, "a hole has an offset and a length");
                uint length = BinaryPrimitives.ReadUInt32BigEndian(payload[sizeof(ulong)..]);
                Check.That(length is > 0 and <= FuzzDisk.Bytes, "a hole is of the range that was asked for");
                TakeData(pending, BinaryPrimitives.ReadUInt64BigEndian(payload), new byte[length]);
                break;
            case NbdChunkType.BlockStatus when command == NbdCommand.BlockStatus:
                TakeStatus(pending, payload);
                break;
            default:
                throw new CheckException($"broken: a chunk of type {header.Type} does not answer {command}");
        }
    }

    private static void TakeData(Pending pending, ulong offset, ReadOnlySpan<byte> data)
    {
        NbdRequest request = pending.Request;
        pending.Covered ??= new bool[request.Length];
        ulong at = offset - request.Offset;
        bool isInside = offset >= request.Offset && at <= request.Length && (ulong)data.Length <= request.Length - at;
        Check.That(isInside, "a chunk is of the range that was asked for");
        Span<bool> covered = pending.Covered.AsSpan((int)at, data.Length);
        Check.That(!covered.Contains(true), "chunks do not overlap");
        covered.Fill(true);
        bool isDone = pending.Covered.Length == data.Length;
        Check.That((request.Flags & NbdCommandFlags.Df) == 0 || isDone, "a read that may not be cut is one chunk");
        if (!pending.Expected.Fails)
        {
            ReadOnlySpan<byte> due = pending.Expected.Content.AsSpan((int)at, data.Length);
            Check.That(data.SequenceEqual(due), "a read has what was written last");
        }
    }

    private void TakeStatus(Pending pending, ReadOnlySpan<byte> payload)
    {
        Check.That(
            payload.Length > 4 && payload.Length % NbdReply.ExtentLength == 4,
            "block status is a list of extents");
        uint context = BinaryPrimitives.ReadUInt32BigEndian(payload);
        Check.That(agreement.ContextIds.Contains(context), "block status is of a context that was selected");
        Check.That(!pending.Contexts.Contains(context), "block status has one chunk for each context");
        pending.Contexts.Add(context);
        bool isOne = (pending.Request.Flags & NbdCommandFlags.ReqOne) != 0;
        Check.That(!isOne || payload.Length == 4 + NbdReply.ExtentLength, "one extent was asked for");
        long at = 0;
        for (ReadOnlySpan<byte> rest = payload[4..]; rest.Length > 0; rest = rest[NbdReply.ExtentLength..])
        {
            uint length = BinaryPrimitives.ReadUInt32BigEndian(rest);
            var status = (NbdAllocation)BinaryPrimitives.ReadUInt32BigEndian(rest[sizeof(uint)..]);
            Check.That(
                length > 0 && length <= pending.Request.Length - at,
                "an extent is of the range that was asked for");
            if (context == 1 && (status & NbdAllocation.Zero) != 0)
            {
                ReadOnlySpan<byte> bytes = pending.Expected.Content.AsSpan((int)at, (int)length);
                Check.That(!bytes.ContainsAnyExcept((byte)0), "what is called zero is zero");
            }

            at += length;
        }
    }

    private void Finish(Pending pending)
    {
        NbdRequest request = pending.Request;
        Check.That(pending.HasError == pending.Expected.Fails, $"{request} fails when it must, and only then");
        if (pending.HasError || request.Length == 0)
            return;
        if (request.Command == NbdCommand.Read)
            Check.That(pending.Covered?.Contains(false) == false, "a read is answered in whole");
        if (request.Command == NbdCommand.BlockStatus)
            Check.That(pending.Contexts.Count == agreement.ContextIds.Count, "block status tells of all contexts");
    }
}
