using System.Buffers.Binary;
using Xnbd.Client;
using Xnbd.Protocol;
using Xnbd.Storage;

namespace Xnbd.Fuzz.Targets;

/// <summary>
/// All that a server can send in reply to our client's requests. The client has made three reads and, where the server
/// tells zeroes, one question for block status. The first byte of the input chooses the handshake: bit 0 structured
/// replies. The rest is the server's stream after the handshake.
/// </summary>
public sealed class RemoteReplyTarget : FuzzTarget
{
    private const byte Structured = 1;

    /// <summary>Bytes that the client sends in the handshake: its flags, and two or three options.</summary>
    private const int SimpleHandshakeBytes = 4 + 16 + 16 + 8;
    private const int StructuredHandshakeBytes = SimpleHandshakeBytes + 16 + 4 + 4 + 4 + 15;

    private const int QuestionLength = 1 << 20;

    private static readonly TimeSpan s_timeout = TimeSpan.FromSeconds(30);

    /// <summary>The second one is longer than what the client receives into its buffer.</summary>
    private static readonly (long Offset, int Length)[] s_reads = [(0, 1000), (4096, 70_000), (500, 3000)];

    private readonly LyingServer _server = new();

    /// <inheritdoc/>
    public override void Run(byte[] input)
    {
        if (input.Length == 0)
            return;
        bool isStructured = (input[0] & Structured) != 0;
        byte[] replies = input[1..];
        int requests = s_reads.Length + (isStructured ? 1 : 0);
        Task served = _server.Serve(
            isStructured ? RemoteHandshakeTarget.StructuredHandshake() : RemoteHandshakeTarget.SimpleHandshake(),
            (isStructured ? StructuredHandshakeBytes : SimpleHandshakeBytes) + (requests * NbdSize.Request),
            replies);

        using var broken = new ManualResetEventSlim();
        int freed = 0, handedBack = 0;
        RemoteConnection connection = RemoteConnection.Connect(
            _server.Address,
            s_timeout,
            () => freed++,
            (_, _, left) =>
            {
                handedBack = left.Count;
                left.ForEach(request => request.Fail(DiskError.Io, "handed back"));
                broken.Set();
            },
            TimeProvider.System);

        var buffers = new byte[s_reads.Length][];
        var tasks = new Task[requests];
        for (int i = 0; i < s_reads.Length; i++)
        {
            buffers[i] = new byte[s_reads[i].Length];
            tasks[i] = Submit(connection, RemoteRequest.Rent(s_reads[i].Offset, buffers[i], now: 0));
        }

        var extents = new ExtentList(100);
        if (isStructured)
            tasks[^1] = Submit(connection, RemoteRequest.RentQuestion(0, QuestionLength, extents, now: 0));
        broken.Wait();
        served.GetAwaiter().GetResult();
        Check.That(tasks.All(task => task.IsCompleted), "each request comes to an end");
        Check.That(freed + handedBack == requests, "each request is answered, or handed back");

        var model = new ReplyModel(isStructured, replies);
        for (int i = 0; i < s_reads.Length; i++)
        {
            if (tasks[i].IsCompletedSuccessfully)
                Check.That(
                    model.Find(i, s_reads[i]) is { } due && due.AsSpan().SequenceEqual(buffers[i]),
                    "a read has what the server has sent for it, all of it");
        }

        foreach (int number in model.FindSound())
            Check.That(tasks[number].IsCompletedSuccessfully, "a read with a sound reply succeeds");
        if (isStructured && tasks[^1].IsCompletedSuccessfully)
            Check.That(extents.Length is > 0 and <= QuestionLength, "an answer is of the range that was asked for");
    }

    private static Task Submit(RemoteConnection connection, RemoteRequest request)
    {
        Task task = request.Task.AsTask();
        if (!connection.TryAdd(request, out bool mustSend))
            throw new CheckException("broken: a new connection takes requests");
        if (mustSend)
            connection.SendSoon();
        return task;
    }

    /// <inheritdoc/>
    public override IEnumerable<(string Name, byte[] Input)> Seeds()
    {
        yield return ("simple", new Bytes().U8(0)
            .U32(NbdMagic.SimpleReply).U32(0).U64(Cookie(2)).Raw(new byte[3000])
            .U32(NbdMagic.SimpleReply).U32(5).U64(Cookie(1))
            .ToArray());
        yield return ("chunks", new Bytes().U8(Structured)
            .Raw(Chunk(0, NbdChunkType.OffsetData, 0, new Bytes().U64(600).Raw(new byte[400])))
            .Raw(Chunk(0, NbdChunkType.OffsetHole, 1, new Bytes().U64(4096).U32(70_000)))
            .Raw(Chunk(1, NbdChunkType.OffsetHole, 0, new Bytes().U64(0).U32(600)))
            .Raw(Chunk(1, NbdChunkType.None, 1, new Bytes()))
            .ToArray());
        yield return ("errors", new Bytes().U8(Structured)
            .Raw(Chunk(0, NbdChunkType.Error, 0, new Bytes().U32(5).U16(3).Text("bad")))
            .Raw(Chunk(1, NbdChunkType.ErrorOffset, 0, new Bytes().U32(5).U16(0).U64(0)))
            .ToArray());
        yield return ("status", new Bytes().U8(Structured)
            .Raw(Chunk(1, NbdChunkType.BlockStatus, 3, new Bytes().U32(5).U32(65536).U32(0).U32(1 << 21).U32(3)))
            .ToArray());
        yield return ("twice", new Bytes().U8(Structured)
            .Raw(Chunk(0, NbdChunkType.OffsetHole, 0, new Bytes().U64(0).U32(600)))
            .Raw(Chunk(1, NbdChunkType.OffsetHole, 0, new Bytes().U64(500).U32(500)))
            .ToArray());
        yield return ("unknown-cookie", [Structured, .. Chunk(1, NbdChunkType.None, 100, new Bytes())]);
    }

    /// <summary>The cookie of the client's request with this number: its slot, and how often that was used.</summary>
    internal static ulong Cookie(int number) => (1UL << 32) | (uint)number;

    private static byte[] Chunk(int flags, NbdChunkType type, int number, Bytes payload)
    {
        byte[] bytes = payload.ToArray();
        return new Bytes()
            .U32(NbdMagic.StructuredReply).U16(flags).U16((int)type).U64(Cookie(number)).U32((uint)bytes.Length)
            .Raw(bytes)
            .ToArray();
    }

    /// <summary>What a stream of replies says, read in the simplest way.</summary>
    /// <param name="isStructured">Structured replies were agreed on.</param>
    /// <param name="replies">The stream.</param>
    private sealed class ReplyModel(bool isStructured, byte[] replies)
    {
        /// <summary>The data that the first reply to a read holds.</summary>
        /// <param name="number">The read's number.</param>
        /// <param name="read">The read.</param>
        /// <returns>Null when the reply is absent or not whole, or is an error.</returns>
        public byte[]? Find(int number, (long Offset, int Length) read)
        {
            byte[] data = new byte[read.Length];
            int covered = 0;
            var reader = new ByteReader(replies);
            while (reader.TryPeek(sizeof(uint), out ReadOnlySpan<byte> magic)
                && NbdReplyHeader.LengthOf(magic) is var length and > 0
                && reader.TryTake(length, out ReadOnlySpan<byte> bytes))
            {
                NbdReplyHeader header = NbdReplyHeader.Read(bytes);
                bool isMine = header.Cookie == Cookie(number);
                if (!header.IsStructured)
                {
                    // Only a read's reply has data; the model knows the length of those it can meet.
                    bool hasData = header.Error == NbdError.None && !isStructured;
                    int other = (int)Math.Min((uint)header.Cookie, (uint)s_reads.Length - 1);
                    int dataLength = hasData ? s_reads[other].Length : 0;
                    if (!reader.TryTake(dataLength, out ReadOnlySpan<byte> simple) || (isMine && !hasData))
                        return null;
                    if (isMine)
                        return simple.ToArray();
                    continue;
                }

                if (!reader.TryTake(header.Length, out ReadOnlySpan<byte> payload))
                    return null;
                if (!isMine)
                    continue;
                if (header.IsErrorChunk)
                    return null;
                covered += Take(header.Type, payload, read, data);
                if ((header.Flags & NbdChunkFlags.Done) != 0)
                    return covered == read.Length ? data : null;
            }

            return null;
        }

        /// <summary>
        /// The reads whose replies are sound, up to the first message that is an error, breaks the protocol, or is no
        /// reply to a read.
        /// </summary>
        public List<int> FindSound()
        {
            List<int> answered = [];
            bool[][] covered = [.. s_reads.Select(read => new bool[read.Length])];
            var reader = new ByteReader(replies);
            while (TryTakeSound(reader, answered, covered))
            {
            }

            return answered;
        }

        private bool TryTakeSound(ByteReader reader, List<int> answered, bool[][] covered)
        {
            if (!reader.TryPeek(sizeof(uint), out ReadOnlySpan<byte> magic)
                || NbdReplyHeader.LengthOf(magic) is not (var length and > 0)
                || !reader.TryTake(length, out ReadOnlySpan<byte> bytes))
                return false;
            NbdReplyHeader header = NbdReplyHeader.Read(bytes);
            int number = Enumerable.Range(0, s_reads.Length).FirstOrDefault(i => Cookie(i) == header.Cookie, -1);
            if (number < 0 || answered.Contains(number) || header.IsStructured != isStructured)
                return false;
            bool isLast = !isStructured || (header.Flags & NbdChunkFlags.Done) != 0;
            bool isSound = isStructured
                ? (header.Flags & ~NbdChunkFlags.Done) == 0
                    && reader.TryTake(header.Length, out ReadOnlySpan<byte> payload)
                    && TryCover(header.Type, payload, isLast, s_reads[number].Offset, covered[number])
                : header.Error == NbdError.None && reader.TryTake(s_reads[number].Length, out _);
            if (!isSound || (isStructured && isLast && covered[number].Contains(false)))
                return false;
            if (isLast)
                answered.Add(number);
            return true;
        }

        /// <summary>Notes which bytes of a read a chunk has.</summary>
        /// <returns>False when the chunk breaks the protocol, or is an error.</returns>
        private static bool TryCover(
            NbdChunkType type, ReadOnlySpan<byte> payload, bool isLast, long start, Span<bool> covered)
        {
            if (type == NbdChunkType.None)
                return isLast && payload.IsEmpty;
            bool isData = type == NbdChunkType.OffsetData && payload.Length > NbdSize.OffsetDataPrefix;
            bool isHole = type == NbdChunkType.OffsetHole && payload.Length == NbdSize.OffsetHolePayload;
            if (!isData && !isHole)
                return false;
            long at = BinaryPrimitives.ReadInt64BigEndian(payload) - start;
            long length = isData
                ? payload.Length - NbdSize.OffsetDataPrefix
                : BinaryPrimitives.ReadUInt32BigEndian(payload[sizeof(ulong)..]);
            if (length == 0 || at < 0 || at > covered.Length - length)
                return false;
            Span<bool> part = covered.Slice((int)at, (int)length);
            if (part.Contains(true))
                return false;
            part.Fill(true);
            return true;
        }

        private static int Take(
            NbdChunkType type, ReadOnlySpan<byte> payload, (long Offset, int Length) read, byte[] data)
        {
            if (type is not (NbdChunkType.OffsetData or NbdChunkType.OffsetHole) || payload.Length < sizeof(ulong))
                return 0;
            long offset = BinaryPrimitives.ReadInt64BigEndian(payload);
            ReadOnlySpan<byte> content = payload[sizeof(ulong)..];
            if (type == NbdChunkType.OffsetHole)
            {
                uint length = content.Length == sizeof(uint) ? BinaryPrimitives.ReadUInt32BigEndian(content) : 0;
                content = new byte[Math.Min(length, (uint)read.Length)];
            }

            if (offset < read.Offset || offset - read.Offset > read.Length - content.Length)
                return 0;
            content.CopyTo(data.AsSpan((int)(offset - read.Offset)));
            return content.Length;
        }
    }
}
