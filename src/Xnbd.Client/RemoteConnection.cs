using System.Buffers.Binary;
using System.Net.Sockets;
using Xnbd.Linux;
using Xnbd.Protocol;
using Xnbd.Storage.Threads;

namespace Xnbd.Client;

/// <summary>
/// One connection to a remote server, with many reads (and questions where zeroes are) under way, whose replies may come in any order. A thread of its own
/// receives. Requests are sent by whoever makes them; what is made while somebody is sending goes out with the next call.
/// <para>
/// States: open; broken, once and for all, for the first reason. A broken connection hands the reads that were under way back
/// to its owner: reading again does no harm. Locks: <c>_sending</c> guards the output and the slots.
/// </para>
/// </summary>
internal sealed class RemoteConnection : IDisposable
{
    /// <summary>Reads under way at once: enough for a line of 100 MB/s and 100 ms with reads of 128 KiB and more.</summary>
    public const int MaxUnderWay = 128;

    /// <summary>
    /// Reads that go out with one call, while other connections are free: a part of what a busy client asks for at once. So
    /// a server that answers one connection's reads one after the other works at several, too.
    /// </summary>
    private const int MostGathered = 16;

    private const int InputBytes = 256 * 1024;

    /// <summary>Of an answer where zeroes are, in bytes: two million extents.</summary>
    private const int MaxStatusPayload = 16 << 20;

    private readonly Socket _socket;
    private readonly RemoteAddress _address;
    private readonly RemoteAgreement _agreement;
    private readonly Action<RemoteConnection> _freed;
    private readonly Action<RemoteConnection, string, List<RemoteRequest>> _broken;
    private readonly Action _sendAll;
    private readonly object _sending = new();
    private readonly RemoteRequest?[] _slots = new RemoteRequest?[MaxUnderWay];
    private readonly uint[] _generations = new uint[MaxUnderWay]; // a cookie is a slot and how often it was used
    private readonly long[] _numbers = new long[MaxUnderWay]; // of the requests under way, in order of sending; else 0
    private long _lastNumber;
    private long _answeredNumber; // the highest,
    private long _passedNumber; // and what it was
    private long _passedAt = Environment.TickCount64; // at this time
    private readonly Stack<int> _free = new(Enumerable.Range(0, MaxUnderWay).Reverse());
    private byte[] _output = new byte[MaxUnderWay * NbdSize.Request];
    private byte[] _outputBeingSent = new byte[MaxUnderWay * NbdSize.Request];
    private int _outputLength;
    private bool _isSending;
    private string? _reason; // why it is broken

    // The receiver's own.
    private readonly NativeBuffer _input = new(InputBytes);
    private int _head;
    private int _tail;

    private RemoteConnection(
        Socket socket,
        RemoteAddress address,
        RemoteAgreement agreement,
        Action<RemoteConnection> freed,
        Action<RemoteConnection, string, List<RemoteRequest>> broken)
    {
        (_socket, _address, _agreement, _freed, _broken) = (socket, address, agreement, freed, broken);
        _sendAll = SendAll;
    }

    /// <summary>What is read.</summary>
    public NbdExportInfo Export => _agreement.Export;

    /// <summary>It can be asked where zeroes are.</summary>
    public bool TellsZeroes => _agreement.AllocationId is not null;

    /// <summary>It can be used no more.</summary>
    public bool IsBroken => Volatile.Read(ref _reason) is not null;

    /// <summary>
    /// Breaks it, if reads are under way and nothing has arrived for so long, or if a read was not answered although younger ones
    /// were, so long ago. (A slow line alone makes reads wait in order.) To be called now and then, by one thread.
    /// </summary>
    public void BreakIfSilent(TimeSpan time)
    {
        if (Environment.TickCount64 - _passedAt > time.TotalMilliseconds)
        {
            bool isPassed;
            lock (_sending)
                isPassed = Array.Exists(_numbers, number => number != 0 && number < _passedNumber);
            if (isPassed)
            {
                Break($"{_address}: the server has not answered a read for {time.TotalSeconds:0} seconds, and others since: this is a fault of that server");
                return;
            }

            (_passedAt, _passedNumber) = (Environment.TickCount64, Volatile.Read(ref _answeredNumber));
        }

        if (UnderWay > 0 && Environment.TickCount64 - Math.Max(Volatile.Read(ref _waitsSince), Volatile.Read(ref _busySince)) > time.TotalMilliseconds)
        {
            IsSilent = true;
            Break($"{_address}: the server has been silent for {time.TotalSeconds:0} seconds");
        }
    }

    /// <summary>Breaks it, if nothing has arrived for so long, whether reads are under way or not.</summary>
    public void BreakIfQuiet(TimeSpan time)
    {
        if (Environment.TickCount64 - Volatile.Read(ref _waitsSince) > time.TotalMilliseconds)
            Break($"{_address}: quiet, as the connection that has timed out");
    }

    /// <summary>What was sent was not even acknowledged by the other end's kernel: the fault may be the line's.</summary>
    public bool IsTimedOut { get; private set; }

    /// <summary>It was broken because nothing arrived: its reads have waited long enough.</summary>
    public bool IsSilent { get; private set; }

    private long _waitsSince = long.MaxValue; // when the receiver began to wait for the server; not while it has other work
    private long _busySince = Environment.TickCount64; // when the first of the reads under way was made

    /// <summary>Reads under way.</summary>
    public int UnderWay => MaxUnderWay - Volatile.Read(ref _freeCount);

    /// <summary>It is about to send reads, and another one may go out with the same call.</summary>
    public bool IsGathering => Volatile.Read(ref _outputLength) is > 0 and < MostGathered * NbdSize.Request;

    private int _freeCount = MaxUnderWay;

    /// <summary>Connects and shakes hands.</summary>
    /// <param name="address">The server.</param>
    /// <param name="timeout">For all of it.</param>
    /// <param name="freed">Called when a read has ended: another one has room.</param>
    /// <param name="broken">Called once if the connection breaks, with the reason and the reads that were under way.</param>
    /// <exception cref="RemoteException">It cannot be used.</exception>
    public static RemoteConnection Connect(
        RemoteAddress address, TimeSpan timeout, Action<RemoteConnection> freed, Action<RemoteConnection, string, List<RemoteRequest>> broken)
    {
        Socket socket;
        try
        {
            socket = address.Connect(timeout);
        }
        catch (SocketException failure)
        {
            bool isMissing = address.UnixPath is { } path && !Path.Exists(path); // for which the BCL has words that mislead
            throw new RemoteException($"{address}: cannot connect: {(isMissing ? "there is no such socket" : failure.Message)}");
        }

        try
        {
            RemoteAgreement agreement = RemoteHandshake.Run(socket, address, timeout);
            RemoteConnection connection;
            try
            {
                connection = new RemoteConnection(socket, address, agreement, freed, broken);
            }
            catch (OutOfMemoryException failure)
            {
                throw new RemoteException($"{address}: cannot connect: {failure.Message}");
            }

            if (LinuxThread.TryStart("remote", connection.ReceiveAll) is null)
            {
                connection._input.Free();
                throw new RemoteException($"{address}: cannot connect: the system has no thread to spare");
            }

            return connection;
        }
        catch
        {
            socket.Dispose();
            throw;
        }
    }

    /// <summary>Sends a read, or a question to a server that tells zeroes.</summary>
    /// <returns>False when there is no room, or the connection is broken; the request is still the caller's.</returns>
    public bool TrySubmit(RemoteRequest request)
    {
        lock (_sending)
        {
            if (_reason is not null || _outputLength + NbdSize.Request > _output.Length || !_free.TryPop(out int slot))
                return false;
            if (_freeCount == MaxUnderWay)
                Volatile.Write(ref _busySince, Environment.TickCount64);
            _freeCount = _free.Count;
            _slots[slot] = request;
            _numbers[slot] = ++_lastNumber;
            ulong cookie = ((ulong)++_generations[slot] << 32) | (uint)slot;
            NbdCommand command = request.Extents is null ? NbdCommand.Read : NbdCommand.BlockStatus;
            new NbdRequest(NbdCommandFlags.None, command, cookie, (ulong)request.Offset, (uint)request.Length)
                .Write(_output.AsSpan(_outputLength));
            _outputLength += NbdSize.Request;
            if (_isSending)
                return true; // it goes with the next call of who is sending
            _isSending = true; // this thread, at the end of its batch
        }

        if (!DeferredWork.TryDefer(WorkPhase.Send, _sendAll))
            SendAll();
        return true;
    }

    /// <summary>Ends it; reads that are under way go back to the owner.</summary>
    public void Dispose() => Break("closed");

    private void SendAll()
    {
        while (true)
        {
            int length;
            lock (_sending)
            {
                (_output, _outputBeingSent) = (_outputBeingSent, _output);
                (length, _outputLength) = (_outputLength, 0);
                if (length == 0 || _reason is not null)
                {
                    _isSending = false;
                    Monitor.PulseAll(_sending);
                    return;
                }
            }

            ReadOnlySpan<byte> left = _outputBeingSent.AsSpan(0, length);
            while (left.Length > 0)
            {
                long count = LinuxSocket.Send(_socket.SafeHandle, left, more: false);
                if (count <= 0)
                {
                    Break(Errno.Of(count).Describe());
                    lock (_sending)
                    {
                        _isSending = false;
                        Monitor.PulseAll(_sending);
                    }

                    return;
                }

                left = left[(int)count..];
            }
        }
    }

    private void ReceiveAll()
    {
        string reason;
        DeferredWork.Begin(); // of the replies that one receive brings
        try
        {
            while (true)
                ReceiveReply();
        }
        catch (RemoteException failure)
        {
            reason = failure.Message;
        }

        DeferredWork.End();
        Break(reason);
        _input.Free();
        var left = new List<RemoteRequest>();
        lock (_sending)
        {
            while (_isSending)
                Monitor.Wait(_sending); // it uses the socket
            left.AddRange(_slots.OfType<RemoteRequest>());
            Array.Clear(_slots);
            _socket.Dispose();
        }

        _broken(this, _reason!, left);
    }

    private void ReceiveReply()
    {
        Fill(sizeof(uint));
        int length = NbdReplyHeader.LengthOf(_input.Slice(_head, sizeof(uint)));
        if (length == 0)
            throw RemoteHandshake.Broken(_address, "no reply where one was due");
        Fill(length);
        NbdReplyHeader header = NbdReplyHeader.Read(_input.Slice(_head, length));
        _head += length;

        int slot = (int)(uint)header.Cookie;
        RemoteRequest request = (uint)slot < MaxUnderWay && _generations[slot] == header.Cookie >> 32 && _slots[slot] is { } found
            ? found
            : throw RemoteHandshake.Broken(_address, "a reply to a request that was never made");
        bool isLast = header.IsStructured ? TakeChunk(request, header) : TakeSimple(request, header);
        if (!isLast)
            return;

        lock (_sending)
        {
            _slots[slot] = null;
            Volatile.Write(ref _answeredNumber, Math.Max(_answeredNumber, _numbers[slot]));
            _numbers[slot] = 0;
            _free.Push(slot);
            _freeCount = _free.Count;
        }

        if (request.Failure is { } failure)
            request.Fail($"{_address}: {(request.Extents is null ? "read" : "block status")} of {request.Length} bytes at {request.Offset}: {failure}");
        else
            request.Succeed();
        _freed(this);
    }

    private bool TakeSimple(RemoteRequest request, NbdReplyHeader header)
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
    private bool TakeChunk(RemoteRequest request, NbdReplyHeader header)
    {
        const int mostErrorPayload = 6 + NbdSize.MaxString + 8;
        const int maxErrors = 64; // real servers send one or two; without a bound, a reply might never end
        if (!_agreement.IsStructured)
            throw RemoteHandshake.Broken(_address, "a structured reply that was not agreed on");
        bool isLast = (header.Flags & NbdChunkFlags.Done) != 0;
        if (header.IsErrorChunk)
        {
            if (header.Length is < 6 or > mostErrorPayload)
                throw RemoteHandshake.Broken(_address, $"an error of {header.Length} bytes");
            if (++request.ErrorChunks > maxErrors)
                throw RemoteHandshake.Broken(_address, $"more than {maxErrors} errors in one reply");
            byte[] payload = new byte[header.Length];
            Receive(payload);
            int textLength = Math.Min(BinaryPrimitives.ReadUInt16BigEndian(payload.AsSpan(4)), payload.Length - 6);
            string text = NbdString.TryRead(payload.AsSpan(6, textLength), out string? message) ? message : "";
            request.Failure = $"the server says {(NbdError)BinaryPrimitives.ReadUInt32BigEndian(payload)} {text}".TrimEnd();
            return isLast;
        }

        Span<byte> prefix = stackalloc byte[NbdSize.OffsetHolePayload];
        switch (header.Type)
        {
            case NbdChunkType.None when header.Length == 0 && isLast:
                break;
            case NbdChunkType.BlockStatus when request.Extents is not null && header.Length is > 4 and <= MaxStatusPayload && header.Length % NbdReply.ExtentLength == 4:
                TakeStatus(request, (int)(header.Length - 4) / NbdReply.ExtentLength);
                break;
            case NbdChunkType.OffsetData when header.Length > NbdSize.OffsetDataPrefix:
                {
                    prefix = prefix[..NbdSize.OffsetDataPrefix];
                    Receive(prefix);
                    ulong offset = BinaryPrimitives.ReadUInt64BigEndian(prefix);
                    uint length = header.Length - NbdSize.OffsetDataPrefix;
                    if (!request.TryCover(offset, length))
                        throw RemoteHandshake.Broken(_address, "data that was not asked for, or twice");
                    Receive(request.Buffer.Span.Slice((int)(offset - (ulong)request.Offset), (int)length));
                    break;
                }

            case NbdChunkType.OffsetHole when header.Length == NbdSize.OffsetHolePayload:
                {
                    Receive(prefix);
                    ulong offset = BinaryPrimitives.ReadUInt64BigEndian(prefix);
                    uint length = BinaryPrimitives.ReadUInt32BigEndian(prefix[8..]);
                    if (!request.TryCover(offset, length))
                        throw RemoteHandshake.Broken(_address, "a hole that was not asked for, or twice");
                    request.Buffer.Span.Slice((int)(offset - (ulong)request.Offset), (int)length).Clear();
                    break;
                }

            default:
                throw RemoteHandshake.Broken(_address, $"a chunk of type {(ushort)header.Type} with {header.Length} bytes");
        }

        if (isLast && request.Failure is null && !request.IsComplete)
            throw RemoteHandshake.Broken(_address, "fewer data than were asked for");
        return isLast;
    }

    /// <summary>Takes what a server says of zeroes: as much of it as was asked for, and as there is room for.</summary>
    private void TakeStatus(RemoteRequest request, int count)
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
            bool isZero = ((NbdAllocation)BinaryPrimitives.ReadUInt32BigEndian(bytes[sizeof(uint)..]) & NbdAllocation.Zero) != 0;
            if (length == 0)
                throw RemoteHandshake.Broken(_address, "an extent of no length");
            long taken = Math.Min(length, request.Length - request.Extents.Length); // the last one may reach further
            isWanted = isWanted && taken > 0 && request.Extents.Add(taken, isZero);
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

    /// <summary>Takes payload: what the input holds of it, then the rest, straight into its place if it is large.</summary>
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
        DeferredWork.Run();
        Volatile.Write(ref _waitsSince, Environment.TickCount64);
        long count = LinuxSocket.Receive(_socket.SafeHandle, buffer);
        Volatile.Write(ref _waitsSince, long.MaxValue);
        IsTimedOut = Errno.Of(count) == Errno.ETIMEDOUT;
        return count > 0
            ? (int)count
            : throw new RemoteException($"{_address}: {(count == 0 ? "the server has closed the connection" : Errno.Of(count).Describe())}");
    }

    /// <summary>
    /// Breaks it, for the first reason. The receiver alone hands the reads back, when it has come to its end: until then it may
    /// be writing into one of their buffers.
    /// </summary>
    private void Break(string reason)
    {
        lock (_sending)
        {
            if (_reason is not null)
                return;
            _reason = reason;
            try
            {
                _socket.Shutdown(SocketShutdown.Both); // the receiver and who is sending come back; it disposes of the socket under this lock
            }
            catch (SocketException)
            {
                // The peer has closed it already.
            }
        }
    }
}
