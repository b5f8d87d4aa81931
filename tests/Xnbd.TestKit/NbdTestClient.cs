using System.Buffers.Binary;
using System.Net;
using System.Net.Sockets;
using System.Text;
using Xnbd.Protocol;

namespace Xnbd.TestKit;

/// <summary>A reply to an option.</summary>
public sealed record OptionReply(NbdOption Option, NbdOptionReplyType Type, byte[] Data);

/// <summary>A simple reply (then <see cref="ChunkType"/> is null) or a chunk of a structured one.</summary>
public sealed record Reply(ulong Cookie, NbdError Error, NbdChunkType? ChunkType, NbdChunkFlags Flags, byte[] Payload)
{
    /// <summary>This is the last chunk for the request.</summary>
    public bool IsLast => ChunkType is null || (Flags & NbdChunkFlags.Done) != 0;
}

/// <summary>
/// A client that does exactly what a test says, even what no real client would do. All receiving has a deadline, so
/// that a server that hangs fails the test.
/// </summary>
public sealed class NbdTestClient : IDisposable
{
    private readonly Dictionary<ulong, int> _readLengths = [];
    private readonly Socket _socket;

    private NbdTestClient(Socket socket)
    {
        _socket = socket;
        _socket.ReceiveTimeout = _socket.SendTimeout = 30_000;
    }

    public Socket Socket => _socket;

    public bool Structured { get; private set; }

    public ulong Size { get; private set; }

    public NbdTransmissionFlags Flags { get; private set; }

    /// <summary>The next request's cookie.</summary>
    public ulong NextCookie { get; set; } = 1;

    public static NbdTestClient Connect(string unixPath) => Connect(new UnixDomainSocketEndPoint(unixPath));

    public static NbdTestClient Connect(EndPoint remote)
    {
        bool isUnix = remote is UnixDomainSocketEndPoint;
        var socket = new Socket(
            remote.AddressFamily, SocketType.Stream, isUnix ? ProtocolType.Unspecified : ProtocolType.Tcp);
        try
        {
            if (!isUnix)
                socket.NoDelay = true;
            socket.Connect(remote);
            return new NbdTestClient(socket);
        }
        catch
        {
            socket.Dispose();
            throw;
        }
    }

    public static NbdTestClient Connect(int port)
    {
        var socket = new Socket(SocketType.Stream, ProtocolType.Tcp) { NoDelay = true };
        socket.Connect("localhost", port);
        return new NbdTestClient(socket);
    }

    /// <summary>Connects and enters the transmission phase.</summary>
    public static NbdTestClient Open(
        string unixPath, bool structured = true, string name = "", params string[] contexts)
        => Open(new UnixDomainSocketEndPoint(unixPath), structured, name, contexts);

    /// <summary>The same, to any address.</summary>
    public static NbdTestClient Open(
        EndPoint remote, bool structured = true, string name = "", params string[] contexts)
    {
        NbdTestClient client = Connect(remote);
        try
        {
            client.Start();
            client.Enter(structured, name, contexts);
            return client;
        }
        catch
        {
            client.Dispose();
            throw;
        }
    }

    public void Send(ReadOnlySpan<byte> data)
    {
        while (data.Length > 0)
            data = data[_socket.Send(data)..];
    }

    public byte[] Receive(int length)
    {
        byte[] data = new byte[length];
        for (int at = 0; at < length;)
        {
            int count = _socket.Receive(data.AsSpan(at));
            if (count == 0)
                throw new EndOfStreamException($"the server closed after {at} of {length} bytes");
            at += count;
        }

        return data;
    }

    /// <summary>Waits until the server has closed the connection.</summary>
    public bool IsClosed()
    {
        try
        {
            return _socket.Receive(new byte[1]) == 0;
        }
        catch (SocketException failure) when (failure.SocketErrorCode == SocketError.ConnectionReset)
        {
            return true;
        }
    }

    /// <summary>Takes the greeting and sends the client's flags.</summary>
    public NbdHandshakeFlags Start(NbdClientFlags flags = NbdClientFlags.FixedNewstyle | NbdClientFlags.NoZeroes)
    {
        byte[] greeting = Receive(NbdSize.NewstyleGreeting);
        if (BinaryPrimitives.ReadUInt64BigEndian(greeting) != NbdMagic.Init
            || BinaryPrimitives.ReadUInt64BigEndian(greeting.AsSpan(8)) != NbdMagic.Option)
            throw new InvalidDataException("no newstyle greeting");
        Send(Bytes(b => b.U32((uint)flags)));
        return (NbdHandshakeFlags)BinaryPrimitives.ReadUInt16BigEndian(greeting.AsSpan(16));
    }

    /// <summary>Negotiates and enters the transmission phase.</summary>
    public void Enter(bool structured = true, string name = "", params string[] contexts)
    {
        if (structured)
        {
            Expect(Ask(NbdOption.StructuredReply)[^1], NbdOptionReplyType.Ack);
            Structured = true;
        }

        if (contexts.Length > 0)
            Expect(Ask(NbdOption.SetMetaContext, MetaQuery(name, contexts))[^1], NbdOptionReplyType.Ack);
        List<OptionReply> replies = Ask(NbdOption.Go, InfoQuery(name));
        Expect(replies[^1], NbdOptionReplyType.Ack);
        ReadExportInfo(replies);
    }

    public void SendOption(NbdOption option, ReadOnlySpan<byte> data = default)
    {
        byte[] copy = data.ToArray();
        Send(Bytes(b => b.U64(NbdMagic.Option).U32((uint)option).U32((uint)copy.Length).Raw(copy)));
    }

    public OptionReply ReceiveOptionReply()
    {
        byte[] header = Receive(NbdSize.OptionReplyHeader);
        if (BinaryPrimitives.ReadUInt64BigEndian(header) != NbdMagic.OptionReply)
            throw new InvalidDataException("no option reply");
        int length = BinaryPrimitives.ReadInt32BigEndian(header.AsSpan(16));
        return new OptionReply(
            (NbdOption)BinaryPrimitives.ReadUInt32BigEndian(header.AsSpan(8)),
            (NbdOptionReplyType)BinaryPrimitives.ReadUInt32BigEndian(header.AsSpan(12)),
            Receive(length));
    }

    /// <summary>Sends an option and receives all its replies; the last one is an ACK or an error.</summary>
    public List<OptionReply> Ask(NbdOption option, ReadOnlySpan<byte> data = default)
    {
        SendOption(option, data);
        var replies = new List<OptionReply>();
        do
        {
            replies.Add(ReceiveOptionReply());
            if (replies[^1].Option != option)
                throw new InvalidDataException($"a reply to {replies[^1].Option}, not to {option}");
        }
        while (replies[^1].Type != NbdOptionReplyType.Ack && (uint)replies[^1].Type < 1u << 31);
        return replies;
    }

    public void ReadExportInfo(IEnumerable<OptionReply> replies)
    {
        byte[] info = replies.Single(r => r.Type == NbdOptionReplyType.Info && r.Data[0] == 0 && r.Data[1] == 0).Data;
        Size = BinaryPrimitives.ReadUInt64BigEndian(info.AsSpan(2));
        Flags = (NbdTransmissionFlags)BinaryPrimitives.ReadUInt16BigEndian(info.AsSpan(10));
    }

    public static byte[] InfoQuery(string name, params NbdInfo[] infos) => Bytes(b =>
    {
        b.Text(name).U16((ushort)infos.Length);
        foreach (NbdInfo info in infos)
            b.U16((ushort)info);
    });

    public static byte[] MetaQuery(string name, params string[] queries) => Bytes(b =>
    {
        b.Text(name).U32((uint)queries.Length);
        foreach (string query in queries)
            b.Text(query);
    });

    /// <summary>Sends a request.</summary>
    /// <returns>Its cookie.</returns>
    public ulong SendRequest(
        NbdCommand command, ulong offset = 0, uint length = 0, NbdCommandFlags flags = 0, byte[]? payload = null)
    {
        var request = new NbdRequest(flags, command, NextCookie++, offset, length);
        byte[] header = new byte[NbdSize.Request];
        request.Write(header);
        if (command == NbdCommand.Read)
        {
            lock (_readLengths)
                _readLengths[request.Cookie] = (int)length;
        }

        Send(payload is null ? header : [.. header, .. payload]);
        return request.Cookie;
    }

    public Reply ReceiveReply()
    {
        byte[] start = Receive(NbdSize.SimpleReply);
        uint magic = BinaryPrimitives.ReadUInt32BigEndian(start);
        ulong cookie = BinaryPrimitives.ReadUInt64BigEndian(start.AsSpan(8));
        if (magic == NbdMagic.SimpleReply)
        {
            var error = (NbdError)BinaryPrimitives.ReadUInt32BigEndian(start.AsSpan(4));
            int length;
            lock (_readLengths)
                _readLengths.Remove(cookie, out length);
            if (length > 0 && Structured)
                throw new InvalidDataException("a simple reply to a read, though structured replies were negotiated");
            return new Reply(cookie, error, null, NbdChunkFlags.Done, error == NbdError.None ? Receive(length) : []);
        }

        if (magic != NbdMagic.StructuredReply)
            throw new InvalidDataException($"no reply: magic {magic:x}");
        var flags = (NbdChunkFlags)BinaryPrimitives.ReadUInt16BigEndian(start.AsSpan(4));
        var type = (NbdChunkType)BinaryPrimitives.ReadUInt16BigEndian(start.AsSpan(6));
        byte[] payload = Receive(BinaryPrimitives.ReadInt32BigEndian(Receive(4)));
        NbdError chunkError = type is NbdChunkType.Error or NbdChunkType.ErrorOffset
            ? (NbdError)BinaryPrimitives.ReadUInt32BigEndian(payload)
            : NbdError.None;
        if ((flags & NbdChunkFlags.Done) != 0)
        {
            lock (_readLengths)
                _readLengths.Remove(cookie);
        }

        return new Reply(cookie, chunkError, type, flags, payload);
    }

    /// <summary>Sends a request and receives its whole reply, which must be the only one under way.</summary>
    public List<Reply> Call(
        NbdCommand command, ulong offset = 0, uint length = 0, NbdCommandFlags flags = 0, byte[]? payload = null)
    {
        ulong cookie = SendRequest(command, offset, length, flags, payload);
        var replies = new List<Reply>();
        do
        {
            replies.Add(ReceiveReply());
            if (replies[^1].Cookie != cookie)
                throw new InvalidDataException("a reply with another request's cookie");
        }
        while (!replies[^1].IsLast);
        return replies;
    }

    /// <summary>The same, but returns only the error.</summary>
    public NbdError Try(
        NbdCommand command, ulong offset = 0, uint length = 0, NbdCommandFlags flags = 0, byte[]? payload = null)
        => Call(command, offset, length, flags, payload).Select(r => r.Error).FirstOrDefault(e => e != NbdError.None);

    public NbdError Write(ulong offset, byte[] data, NbdCommandFlags flags = 0)
        => Try(NbdCommand.Write, offset, (uint)data.Length, flags, data);

    public byte[] Read(ulong offset, uint length, NbdCommandFlags flags = 0)
        => Assemble(Call(NbdCommand.Read, offset, length, flags), offset, length);

    /// <summary>Puts a read's reply together, and checks the rules for its chunks.</summary>
    public static byte[] Assemble(IReadOnlyList<Reply> replies, ulong offset, uint length)
    {
        if (replies.FirstOrDefault(r => r.Error != NbdError.None) is { } failed)
            throw new IOException($"read at {offset}: {failed.Error}");
        if (replies[0].ChunkType is null)
            return replies[0].Payload;

        byte[] data = new byte[length];
        bool[] isCovered = new bool[length];
        foreach (Reply chunk in replies.Where(r => r.ChunkType != NbdChunkType.None))
        {
            ulong at = BinaryPrimitives.ReadUInt64BigEndian(chunk.Payload) - offset;
            int count = chunk.ChunkType == NbdChunkType.OffsetHole
                ? BinaryPrimitives.ReadInt32BigEndian(chunk.Payload.AsSpan(8))
                : chunk.Payload.Length - 8;
            if (count == 0 || at + (ulong)count > length)
                throw new InvalidDataException("a chunk that is empty or lies outside the request");
            if (isCovered.AsSpan((int)at, count).Contains(true))
                throw new InvalidDataException("chunks overlap");
            isCovered.AsSpan((int)at, count).Fill(true);
            if (chunk.ChunkType == NbdChunkType.OffsetData)
                chunk.Payload.AsSpan(8).CopyTo(data.AsSpan((int)at));
        }

        if (isCovered.Contains(false))
            throw new InvalidDataException("chunks do not cover the request");
        return data;
    }

    /// <summary>The extents of a block status: length and flags.</summary>
    public List<(uint Length, uint Flags)> BlockStatus(ulong offset, uint length, NbdCommandFlags flags = 0)
    {
        List<Reply> replies = Call(NbdCommand.BlockStatus, offset, length, flags);
        if (replies.Count != 1 || replies[0].ChunkType != NbdChunkType.BlockStatus)
            throw new IOException($"block status: {replies[0].ChunkType} {replies[0].Error}");
        byte[] payload = replies[0].Payload;
        var extents = new List<(uint, uint)>();
        for (int at = 4; at < payload.Length; at += 8)
        {
            extents.Add((
                BinaryPrimitives.ReadUInt32BigEndian(payload.AsSpan(at)),
                BinaryPrimitives.ReadUInt32BigEndian(payload.AsSpan(at + 4))));
        }

        return extents;
    }

    public void Disconnect() => SendRequest(NbdCommand.Disconnect);

    public void Dispose() => _socket.Dispose();

    /// <summary>Bytes of a message, in network order.</summary>
    public static byte[] Bytes(Action<MessageBuilder> build)
    {
        var builder = new MessageBuilder();
        build(builder);
        return builder.ToArray();
    }

    private static void Expect(OptionReply reply, NbdOptionReplyType type)
    {
        if (reply.Type != type)
            throw new InvalidDataException($"{reply.Option}: {reply.Type} {Encoding.UTF8.GetString(reply.Data)}");
    }
}

/// <summary>Builds messages, also malformed ones.</summary>
public sealed class MessageBuilder
{
    private readonly List<byte> _bytes = [];

    public MessageBuilder U16(ushort value) => Raw([(byte)(value >> 8), (byte)value]);

    public MessageBuilder U32(uint value) => U16((ushort)(value >> 16)).U16((ushort)value);

    public MessageBuilder U64(ulong value) => U32((uint)(value >> 32)).U32((uint)value);

    public MessageBuilder Text(string text)
        => U32((uint)Encoding.UTF8.GetByteCount(text)).Raw(Encoding.UTF8.GetBytes(text));

    public MessageBuilder Raw(ReadOnlySpan<byte> data)
    {
        _bytes.AddRange(data);
        return this;
    }

    public byte[] ToArray() => [.. _bytes];
}
