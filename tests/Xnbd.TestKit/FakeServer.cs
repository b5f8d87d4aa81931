using System.Buffers.Binary;
using System.Net.Sockets;
using Xnbd.Protocol;

namespace Xnbd.TestKit;

/// <summary>
/// An NBD server that misbehaves as a test says. By default it carries out the handshake and answers reads of an image
/// in memory. A test replaces the handshake or the answer to a read.
/// </summary>
public sealed class FakeServer : IDisposable
{
    private readonly Socket _listener = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
    private readonly byte[] _image;
    private readonly List<Socket> _connections = [];
    private int _count;

    /// <param name="path">The socket on which it listens.</param>
    /// <param name="image">The bytes that it serves.</param>
    public FakeServer(string path, byte[] image)
    {
        Path = path;
        _image = image;
        _listener.Bind(new UnixDomainSocketEndPoint(path));
        _listener.Listen();
    }

    public string Path { get; }

    /// <summary>It knows structured replies.</summary>
    public bool Structured { get; init; } = true;

    /// <summary>It knows <c>base:allocation</c>, with this id; blocks of 4096 zeroes are holes.</summary>
    public uint? AllocationId { get; init; }

    /// <summary>The transmission flags of the export.</summary>
    public NbdTransmissionFlags Flags { get; init; } = NbdTransmissionFlags.HasFlags | NbdTransmissionFlags.ReadOnly;

    /// <summary>What it says of its export; null for nothing.</summary>
    public string? Description { get; init; }

    /// <summary>
    /// In place of the handshake, of the connection with this number, from 0 on; null where it is polite.
    /// </summary>
    public Func<Peer, int, bool>? Handshake { get; init; }

    /// <summary>
    /// In place of the answer to a read, of the connection with this number, from 0 on; false where it is polite.
    /// </summary>
    public Func<Peer, int, NbdRequest, bool>? Answer { get; init; }

    /// <summary>Connections so far.</summary>
    public int Count => Volatile.Read(ref _count);

    public FakeServer Start()
    {
        Run(() =>
        {
            while (true)
            {
                Socket socket = _listener.Accept();
                int number = _count++;
                lock (_connections)
                    _connections.Add(socket);
                Run(() => Serve(new Peer(socket), number));
            }
        });
        return this;
    }

    public void Dispose()
    {
        _listener.Dispose();
        lock (_connections)
            _connections.ForEach(connection => connection.Dispose());
    }

    private static void Run(Action action) => new Thread(() =>
    {
        try
        {
            action();
        }
        catch (Exception failure) when (failure is SocketException or ObjectDisposedException or EndOfStreamException)
        {
            // The client has left, or the test has ended.
        }
    })
    { IsBackground = true }.Start();

    private void Serve(Peer peer, int number)
    {
        if (Handshake?.Invoke(peer, number) != true && !ShakeHands(peer))
            return;
        while (true)
        {
            if (!NbdRequest.TryRead(peer.Receive(NbdSize.Request), out NbdRequest request)
                || request.Command == NbdCommand.Disconnect)
                return;
            if (Answer?.Invoke(peer, number, request) != true)
                Reply(peer, request);
        }
    }

    private bool ShakeHands(Peer peer)
    {
        peer.Greet();
        while (true)
        {
            (NbdOption option, byte[] _) = peer.ReceiveOption();
            switch (option)
            {
                case NbdOption.StructuredReply:
                    peer.ReplyOption(option, Structured ? NbdOptionReplyType.Ack : NbdOptionReplyType.ErrUnsupported);
                    break;
                case NbdOption.Go:
                    peer.ReplyOption(option, NbdOptionReplyType.Info, NbdHandshake.InfoExport(_image.Length, Flags));
                    if (Description is not null)
                    {
                        peer.ReplyOption(
                            option,
                            NbdOptionReplyType.Info,
                            NbdHandshake.InfoText(NbdInfo.Description, Description));
                    }

                    peer.ReplyOption(option, NbdOptionReplyType.Ack);
                    return true;
                case NbdOption.SetMetaContext:
                    if (AllocationId is { } id)
                        peer.ReplyOption(
                            option, NbdOptionReplyType.MetaContext, NbdHandshake.MetaContext(id, "base:allocation"));
                    peer.ReplyOption(
                        option, AllocationId is null ? NbdOptionReplyType.ErrUnsupported : NbdOptionReplyType.Ack);
                    break;
                default:
                    return false;
            }
        }
    }

    /// <summary>The right answer.</summary>
    public void Reply(Peer peer, NbdRequest request)
    {
        if (request.Command == NbdCommand.BlockStatus)
        {
            var extents = new List<(uint Length, uint Status)>();
            for (ulong at = request.Offset; at < request.Offset + request.Length;)
            {
                int part = (int)Math.Min(4096, request.Offset + request.Length - at);
                extents.Add(((uint)part, _image.AsSpan((int)at, part).ContainsAnyExcept((byte)0) ? 0 : 3u));
                at += (uint)part;
            }

            peer.SendStatus(request.Cookie, AllocationId ?? 0, [.. extents]);
            return;
        }

        Span<byte> header = stackalloc byte[NbdSize.StructuredReply + NbdSize.OffsetDataPrefix];
        int length = Structured
            ? NbdReply.WriteOffsetData(header, NbdChunkFlags.Done, request.Cookie, request.Offset, (int)request.Length)
            : NbdReply.WriteSimple(header, NbdError.None, request.Cookie);
        peer.Send([.. header[..length], .. _image.AsSpan((int)request.Offset, (int)request.Length)]);
    }

    /// <summary>A connection of a client, to which a test sends anything.</summary>
    public sealed class Peer(Socket socket)
    {
        /// <summary>An error, in the last chunk of a reply.</summary>
        public void SendError(ulong cookie, NbdError error, string text)
        {
            byte[] chunk = new byte[NbdReply.MaxErrorChunk];
            Send(chunk.AsSpan(0, NbdReply.WriteErrorChunk(chunk, cookie, error, text)));
        }

        public void Send(ReadOnlySpan<byte> data)
        {
            while (data.Length > 0)
                data = data[socket.Send(data)..];
        }

        public byte[] Receive(int length)
        {
            byte[] data = new byte[length];
            for (int done = 0; done < length;)
            {
                int count = socket.Receive(data.AsSpan(done));
                done += count > 0 ? count : throw new EndOfStreamException();
            }

            return data;
        }

        public void Close() => socket.Dispose();

        /// <summary>The greeting, and the client's flags.</summary>
        public void Greet()
        {
            byte[] greeting = new byte[NbdSize.NewstyleGreeting];
            NbdHandshake.WriteNewstyleGreeting(greeting, NbdHandshakeFlags.FixedNewstyle | NbdHandshakeFlags.NoZeroes);
            Send(greeting);
            Receive(NbdSize.ClientFlags);
        }

        public (NbdOption Option, byte[] Data) ReceiveOption()
        {
            NbdOptionHeader.TryRead(Receive(NbdSize.OptionHeader), out NbdOptionHeader header);
            return (header.Option, Receive((int)header.Length));
        }

        public void ReplyOption(NbdOption option, NbdOptionReplyType type, byte[]? data = null)
        {
            byte[] reply = new byte[NbdSize.OptionReplyHeader + (data?.Length ?? 0)];
            NbdHandshake.WriteOptionReply(reply, option, type, data);
            Send(reply);
        }

        /// <summary>A chunk of a structured reply.</summary>
        public void SendChunk(NbdChunkFlags flags, NbdChunkType type, ulong cookie, ReadOnlySpan<byte> payload)
        {
            Span<byte> header = stackalloc byte[NbdSize.StructuredReply];
            NbdReply.WriteChunkHeader(header, flags, type, cookie, payload.Length);
            Send([.. header, .. payload]);
        }

        /// <summary>The status of blocks, in the last chunk.</summary>
        public void SendStatus(ulong cookie, uint contextId, params (uint Length, uint Status)[] extents)
        {
            byte[] reply = new byte[NbdReply.BlockStatusLength(extents.Length)];
            int at = NbdReply.WriteBlockStatus(reply, NbdChunkFlags.Done, cookie, contextId, extents.Length);
            foreach ((uint length, uint status) in extents)
                at += NbdReply.WriteExtent(reply.AsSpan(at), length, status);
            Send(reply);
        }

        /// <summary>A chunk of data.</summary>
        public void SendData(NbdChunkFlags flags, ulong cookie, ulong offset, int length)
        {
            byte[] payload = new byte[NbdSize.OffsetDataPrefix + length];
            BinaryPrimitives.WriteUInt64BigEndian(payload, offset);
            SendChunk(flags, NbdChunkType.OffsetData, cookie, payload);
        }
    }
}
