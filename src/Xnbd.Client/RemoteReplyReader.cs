using System.Buffers.Binary;
using System.Net.Sockets;
using Xnbd.Linux;
using Xnbd.Protocol;
using Xnbd.Storage.Threads;

namespace Xnbd.Client;

/// <summary>
/// Receives the replies of one connection, and puts their data into the buffers of the requests. It believes nothing
/// that a server says: whatever breaks the protocol is a <see cref="RemoteException"/> that names the server.
/// <para>
/// All of it belongs to the connection's receiving thread. Other threads read only <see cref="WaitsSince"/> and
/// <see cref="ReceivedBytes"/>.
/// </para>
/// </summary>
internal sealed class RemoteReplyReader : IDisposable
{
    /// <summary>The value of <see cref="WaitsSince"/> while the receiver does not wait.</summary>
    public const long Never = long.MaxValue;

    private const int InputBytes = 256 * 1024;

    /// <summary>The largest answer to a question where zeroes are, in bytes: two million extents.</summary>
    private const int MaxStatusPayload = 16 << 20;

    /// <summary>How many error chunks a reply has at most. Real servers send one or two.</summary>
    private const int MaxErrors = 64;

    /// <summary>The largest error chunk, in bytes: its number, a message, and an offset.</summary>
    private const int MaxErrorPayload = 6 + NbdSize.MaxString + 8;

    private readonly Socket _socket;
    private readonly RemoteAddress _address;
    private readonly RemoteAgreement _agreement;
    private readonly TimeProvider _time;
    private readonly NativeBuffer _input = new(InputBytes); // received and not used: from _head to _tail
    private int _head;
    private int _tail;
    private long _waitsSince = Never;
    private long _receivedBytes;

    public RemoteReplyReader(Socket socket, RemoteAddress address, RemoteAgreement agreement, TimeProvider time)
        => (_socket, _address, _agreement, _time) = (socket, address, agreement, time);

    /// <summary>The time stamp at which the receiver began to wait for the server, or <see cref="Never"/>.</summary>
    public long WaitsSince => Volatile.Read(ref _waitsSince);

    /// <summary>Bytes that were received since the handshake.</summary>
    public long ReceivedBytes => Volatile.Read(ref _receivedBytes);

    /// <summary>
    /// The connection broke because the other end's kernel did not even acknowledge what was sent: the fault may be the
    /// line's.
    /// </summary>
    public bool HasTimedOut { get; private set; }

    /// <summary>Frees the input; the receiving thread has ended.</summary>
    public void Dispose() => _input.Free();

    /// <summary>Receives the header of the next reply, or chunk of a reply.</summary>
    public NbdReplyHeader ReceiveHeader()
    {
        Fill(sizeof(uint));
        int length = NbdReplyHeader.LengthOf(_input.Slice(_head, sizeof(uint)));
        if (length == 0)
            throw RemoteHandshake.Broken(_address, "no reply where one was due");
        Fill(length);
        NbdReplyHeader header = NbdReplyHeader.Read(_input.Slice(_head, length));
        _head += length;
        return header;
    }

    /// <summary>Receives what follows a header.</summary>
    /// <returns>True when the request has been answered.</returns>
    public bool ReceiveBody(RemoteRequest request, NbdReplyHeader header)
        => header.IsStructured ? ReceiveChunk(request, header) : ReceiveSimple(request, header);

    private bool ReceiveSimple(RemoteRequest request, NbdReplyHeader header)
    {
        if (header.Error != NbdError.None)
        {
            request.Failure = $"the server says {header.Error}";
            return true;
        }

        if (_agreement.IsStructured)
            throw RemoteHandshake.Broken(_address, "a simple reply to a read where structured ones were agreed on");
        Receive(request.Buffer.Span);
        return true;
    }

    /// <returns>True when it is the reply's last chunk.</returns>
    private bool ReceiveChunk(RemoteRequest request, NbdReplyHeader header)
    {
        if (!_agreement.IsStructured)
            throw RemoteHandshake.Broken(_address, "a structured reply that was not agreed on");
        bool isLast = (header.Flags & NbdChunkFlags.Done) != 0;
        if (header.IsErrorChunk)
        {
            ReceiveError(request, header);
            return isLast;
        }

        bool isStatus = header.Type == NbdChunkType.BlockStatus && request.Extents is not null
            && header.Length is > 4 and <= MaxStatusPayload && header.Length % NbdReply.ExtentLength == 4;
        if (isStatus)
            ReceiveStatus(request, (int)(header.Length - 4) / NbdReply.ExtentLength);
        else if (header.Type == NbdChunkType.OffsetData && header.Length > NbdSize.OffsetDataPrefix)
            ReceiveData(request, header.Length - NbdSize.OffsetDataPrefix);
        else if (header.Type == NbdChunkType.OffsetHole && header.Length == NbdSize.OffsetHolePayload)
            ReceiveHole(request);
        else if (header.Type != NbdChunkType.None || header.Length != 0 || !isLast)
            throw RemoteHandshake.Broken(_address, $"a chunk of type {(ushort)header.Type} with {header.Length} bytes");

        if (isLast && request.Failure is null && !request.IsComplete)
            throw RemoteHandshake.Broken(_address, "fewer data than were asked for");
        return isLast;
    }

    private void ReceiveError(RemoteRequest request, NbdReplyHeader header)
    {
        if (header.Length is < 6 or > MaxErrorPayload)
            throw RemoteHandshake.Broken(_address, $"an error of {header.Length} bytes");
        if (++request.ErrorChunks > MaxErrors) // without a bound, a reply might never end
            throw RemoteHandshake.Broken(_address, $"more than {MaxErrors} errors in one reply");
        byte[] payload = new byte[header.Length];
        Receive(payload);
        int textLength = Math.Min(BinaryPrimitives.ReadUInt16BigEndian(payload.AsSpan(4)), payload.Length - 6);
        string text = NbdString.TryRead(payload.AsSpan(6, textLength), out string? message) ? message : "";
        request.Failure = $"the server says {(NbdError)BinaryPrimitives.ReadUInt32BigEndian(payload)} {text}".TrimEnd();
    }

    private void ReceiveData(RemoteRequest request, uint length)
    {
        Span<byte> prefix = stackalloc byte[NbdSize.OffsetDataPrefix];
        Receive(prefix);
        ulong offset = BinaryPrimitives.ReadUInt64BigEndian(prefix);
        if (!request.TryCover(offset, length))
            throw RemoteHandshake.Broken(_address, "data that was not asked for, or twice");
        Receive(request.Buffer.Span.Slice((int)(offset - (ulong)request.Offset), (int)length));
    }

    private void ReceiveHole(RemoteRequest request)
    {
        Span<byte> payload = stackalloc byte[NbdSize.OffsetHolePayload];
        Receive(payload);
        ulong offset = BinaryPrimitives.ReadUInt64BigEndian(payload);
        uint length = BinaryPrimitives.ReadUInt32BigEndian(payload[8..]);
        if (!request.TryCover(offset, length))
            throw RemoteHandshake.Broken(_address, "a hole that was not asked for, or twice");
        request.Buffer.Span.Slice((int)(offset - (ulong)request.Offset), (int)length).Clear();
    }

    /// <summary>Takes what a server says of zeroes: as much as was asked for, and as there is room for.</summary>
    private void ReceiveStatus(RemoteRequest request, int count)
    {
        Span<byte> bytes = stackalloc byte[NbdReply.ExtentLength];
        Receive(bytes[..sizeof(uint)]);
        if (BinaryPrimitives.ReadUInt32BigEndian(bytes) != _agreement.AllocationId || request.Extents!.Length > 0)
            throw RemoteHandshake.Broken(_address, "a metadata context that was not asked for, or twice");
        bool isWanted = true;
        for (int i = 0; i < count; i++)
        {
            Receive(bytes);
            uint length = BinaryPrimitives.ReadUInt32BigEndian(bytes);
            var status = (NbdAllocation)BinaryPrimitives.ReadUInt32BigEndian(bytes[sizeof(uint)..]);
            if (length == 0)
                throw RemoteHandshake.Broken(_address, "an extent of no length");
            long taken = Math.Min(length, request.Length - request.Extents.Length); // the last one may reach further
            isWanted = isWanted && taken > 0 && request.Extents.Add(taken, (status & NbdAllocation.Zero) != 0);
        }
    }

    /// <summary>Receives until the input holds so many bytes from its head on.</summary>
    private void Fill(int length)
    {
        if (_tail - _head >= length)
            return;
        if (_head > 0)
        {
            _input.Slice(_head, _tail - _head).CopyTo(_input.GetSpan());
            (_head, _tail) = (0, _tail - _head);
        }

        while (_tail < length)
            _tail += ReceiveSome(_input.Slice(_tail, InputBytes - _tail));
    }

    /// <summary>
    /// Takes payload: what the input holds of it, then the rest, straight into its place if it is large.
    /// </summary>
    private void Receive(Span<byte> payload)
    {
        while (payload.Length > 0)
        {
            int buffered = Math.Min(_tail - _head, payload.Length);
            _input.Slice(_head, buffered).CopyTo(payload);
            _head += buffered;
            payload = payload[buffered..];
            if (payload.Length >= InputBytes / 4)
                payload = payload[ReceiveSome(payload)..];
            else if (payload.Length > 0)
                Fill(1);
        }
    }

    private int ReceiveSome(Span<byte> buffer)
    {
        DeferredWork.Run(); // this thread may wait now
        Volatile.Write(ref _waitsSince, _time.GetTimestamp());
        long count = LinuxSocket.Receive(_socket.SafeHandle, buffer);
        Volatile.Write(ref _waitsSince, Never);
        if (count > 0)
        {
            Volatile.Write(ref _receivedBytes, _receivedBytes + count);
            return (int)count;
        }

        HasTimedOut = Errno.Of(count) == Errno.ETIMEDOUT;
        string reason = count == 0 ? "the server has closed the connection" : Errno.Of(count).Describe();
        throw new RemoteException($"{_address}: {reason}");
    }
}
