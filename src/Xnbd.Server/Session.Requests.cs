using System.Diagnostics;
using System.Numerics;
using System.Runtime.InteropServices;
using Xnbd.Linux;
using Xnbd.Protocol;
using Xnbd.Storage;

namespace Xnbd.Server;

/// <content>What each request does (section "Request types").</content>
internal sealed partial class Session
{
    private readonly FileRange[] _ranges = new FileRange[ServerLimits.MaxReadChunks];

    /// <returns>False when the session is over.</returns>
    private bool Serve(in NbdRequest request)
    {
        if (request.Command == NbdCommand.Disconnect)
            return _connection.End("disconnected");
        if (!KeepOrder(request.Cookie))
            return false;

        NbdError error = RequestRules.Judge(request, _agreement, out string message);
        if (error != NbdError.None)
            return (request.Command != NbdCommand.Write || DrainPayload(request.Length)) && ReplyError(request, error, message);

        bool isDurable = (request.Flags & NbdCommandFlags.Fua) != 0;
        try
        {
            switch (request.Command)
            {
                case NbdCommand.Read:
                    return ServeRead(request);
                case NbdCommand.Write:
                    return ServeWrite(request, isDurable);
                case NbdCommand.Flush:
                    return TryClaim(request, 0, out SlowRequest? flush) && Begin(flush, _disk.FlushAsync());
                case NbdCommand.BlockStatus:
                    return ServeBlockStatus(request);
                default:
                    break;
            }

            if (request.Length == 0)
                return ReplySuccess(request);
            if (!TryClaim(request, 0, out SlowRequest? slow))
                return false;
            long offset = (long)request.Offset;
            return Begin(slow, request.Command switch
            {
                NbdCommand.Trim => _disk.TrimAsync(offset, request.Length, isDurable),
                NbdCommand.WriteZeroes => _disk.ZeroAsync(offset, request.Length, ZeroModeOf(request.Flags), isDurable),
                NbdCommand.Cache => _disk.PrefetchAsync(offset, request.Length),
                _ => throw new UnreachableException($"command {request.Command} passed the rules"),
            });
        }
        catch (DiskException failure)
        {
            return ReplyFailure(request, failure);
        }
    }

    private static ZeroMode ZeroModeOf(NbdCommandFlags flags)
        => ((flags & NbdCommandFlags.NoHole) == 0 ? ZeroMode.MayPunch : ZeroMode.None)
            | ((flags & NbdCommandFlags.FastZero) != 0 ? ZeroMode.FastOnly : ZeroMode.None);

    /// <summary>
    /// Sees to it that a request is not answered before those on which its client relies: in the old style all that came
    /// before it, as such clients know replies by their order; otherwise those with the same cookie. (A client that
    /// gives two requests the same cookie relies on their order, too: from then on it gets its replies in order.)
    /// </summary>
    /// <returns>False when the connection is broken.</returns>
    private bool KeepOrder(ulong cookie)
    {
        _mustQueue = false;
        if (_outputLength == 0)
            _gathered.Clear();
        _gathered.Add(cookie);
        if (Volatile.Read(ref _inFlight) == 0)
            return true;
        if (!_isInOrder && IsInFlight(cookie))
        {
            if (!FlushReplies() || !WaitUntilFinished(0))
                return false;
            lock (_finished)
                _isInOrder = true;
        }

        _mustQueue = _isInOrder && InFlight > 0;
        return true;
    }

    /// <summary>
    /// Whether the reply to an earlier request with this cookie may still wait to be sent. A slow request may be answered by
    /// another thread, before this one sends what it has gathered.
    /// </summary>
    private bool IsGathered(ulong cookie)
        => _outputLength > 0 && CollectionsMarshal.AsSpan(_gathered)[..^1].Contains(cookie); // the last one is that of the request at hand

    private bool ServeRead(in NbdRequest request)
    {
        int length = (int)request.Length;
        if (length == 0)
            return ReplySuccess(request);

        BytesRead += length;
        if (!_mustQueue)
        {
            bool? sent = length > ServerLimits.MaxUncutRead ? TryReadLocated(request) : null;
            sent ??= TryReadCopied(request);
            if (sent is { } answer)
                return answer;
        }

        return StartRead(request);
    }

    /// <summary>A read that may wait for the disk.</summary>
    private bool StartRead(in NbdRequest request)
    {
        // Its data will stand behind room for the headers of as many chunks as it may be cut into.
        int length = (int)request.Length, headers = ReadChunks.HeaderRoom(length);
        if (!TryClaim(request, headers + length, out SlowRequest? slow))
            return false;
        return Begin(slow, _disk.ReadAsync((long)request.Offset, slow.Buffer!.Memory.Slice(headers, length)));
    }

    /// <summary>
    /// A read whose data are in memory: straight into the output, behind its header. A long one goes piece by piece, if
    /// it may be cut; otherwise all of its data must be in hand before its header goes out.
    /// </summary>
    /// <returns>Null when it would wait for the disk, or is too long to be gathered in the output.</returns>
    private bool? TryReadCopied(in NbdRequest request)
    {
        int length = (int)request.Length;
        bool mayCut = _structured && (request.Flags & NbdCommandFlags.Df) == 0 && length > ServerLimits.MaxUncutRead;
        int most = mayCut ? ServerLimits.ReadPiece : ServerLimits.MaxCopiedRead;
        if (length > most && !mayCut)
            return null;
        for (int done = 0; done < length;)
        {
            int piece = Math.Min(length - done, most);
            var part = request with { Offset = request.Offset + (ulong)done, Length = (uint)piece };
            if (!TryReserve(ReadChunks.HeaderRoom(piece) + piece, out Span<byte> room))
                return false;
            if (TryReadPiece(part, room, mayCut, isLast: done + piece == length))
            {
                done += piece;
                continue;
            }

            // The rest waits for the disk. What is gathered goes out first: the last chunk must not overtake it.
            return done == 0 ? null : FlushReplies() && StartRead(request with { Offset = part.Offset, Length = (uint)(length - done) });
        }

        return true;
    }

    /// <summary>Reads a part of a reply into the output.</summary>
    /// <returns>False when it would wait for the disk.</returns>
    private bool TryReadPiece(in NbdRequest part, Span<byte> room, bool mayCut, bool isLast)
    {
        int length = (int)part.Length, header = _structured ? ReadChunks.DataHeader : NbdSize.SimpleReply;
        Span<byte> data = room.Slice(header, length);
        if (!_disk.TryRead((long)part.Offset, data))
            return false;
        if (!_structured)
        {
            _outputLength += NbdReply.WriteSimple(room, NbdError.None, part.Cookie) + length;
            return true;
        }

        NbdChunkFlags flags = isLast ? NbdChunkFlags.Done : NbdChunkFlags.None;
        if (ReadChunks.RunLength(data, part.Offset, mayCut, out bool isHole) < length)
        {
            int headers = ReadChunks.HeaderRoom(length);
            data.CopyTo(room[headers..]);
            _outputLength += ReadChunks.Write(room, headers, length, part.Offset, part.Cookie, mayCut, isLast).Length;
        }
        else if (isHole)
        {
            _outputLength += NbdReply.WriteOffsetHole(room, flags, part.Cookie, part.Offset, part.Length);
        }
        else
        {
            _outputLength += NbdReply.WriteOffsetData(room, flags, part.Cookie, part.Offset, length) + length;
        }

        return true;
    }

    /// <summary>
    /// A large read of a file that nobody changes: to the socket, without a copy through this process; holes as holes.
    /// </summary>
    /// <returns>Null when it would wait for the disk, or no such file holds the data.</returns>
    private bool? TryReadLocated(in NbdRequest request)
    {
        int length = (int)request.Length;
        int count = Locate((long)request.Offset, length, findHoles: _structured && (request.Flags & NbdCommandFlags.Df) == 0);
        if (count == 0)
            return null;

        if (!_structured)
        {
            if (!TryReserve(NbdSize.SimpleReply, out Span<byte> header))
                return false;
            _outputLength += NbdReply.WriteSimple(header, NbdError.None, request.Cookie);
            return FlushRepliesAndFile(_ranges[0].File!, _ranges[0].FileOffset, length, out _);
        }

        ulong offset = request.Offset;
        for (int i = 0; i < count; i++)
        {
            FileRange range = _ranges[i];
            if (!TryReserve(ReadChunks.HoleChunk, out Span<byte> header))
                return false;
            if (range.IsHole)
            {
                _outputLength += NbdReply.WriteOffsetHole(
                    header, NbdChunkFlags.None, request.Cookie, offset, (uint)range.Length);
            }
            else
            {
                _outputLength += NbdReply.WriteOffsetData(header, NbdChunkFlags.None, request.Cookie, offset, range.Length);
                if (!FlushRepliesAndFile(range.File!, range.FileOffset, range.Length, out int padded))
                    return false;
                if (padded > 0)
                    return ReplyFailure(request, new DiskException(DiskError.Io, $"reading {padded} bytes of {length} at {request.Offset} failed"));
            }

            offset += (uint)range.Length;
        }

        // DONE stands in a chunk of its own: until the data was out, it could still have failed.
        if (!TryReserve(NbdSize.StructuredReply, out Span<byte> done))
            return false;
        _outputLength += NbdReply.WriteChunkHeader(done, NbdChunkFlags.Done, NbdChunkType.None, request.Cookie, 0);
        return true;
    }

    /// <summary>Finds where all bytes of a range stand.</summary>
    /// <returns>How many of <c>_ranges</c> hold the answer; 0 when they are to be read.</returns>
    private int Locate(long offset, int length, bool findHoles)
    {
        int count = 0;
        while (length > 0)
        {
            bool isLast = count == _ranges.Length - 1;
            FileRange range = _disk.TryLocate(offset, length, findHoles && !isLast);
            if (range.Length == 0 || (isLast && range.Length < length) || (!findHoles && range.Length < length))
                return 0;
            _ranges[count++] = range;
            offset += range.Length;
            length -= range.Length;
        }

        return count;
    }

    private bool ServeWrite(in NbdRequest request, bool isDurable)
    {
        int length = (int)request.Length;
        if (length == 0)
            return ReplySuccess(request);

        bool isFast = !isDurable && !_mustQueue;
        long offset = (long)request.Offset;
        if (length <= ServerLimits.MaxBatchedWrite)
        {
            // Its payload is in the input already.
            Span<byte> payload = _input!.Slice(_head, length);
            _head += length;
            BytesWritten += length;
            if (isFast && _disk.TryWrite(offset, payload))
                return ReplySuccess(request);
            if (!TryClaim(request, length, out SlowRequest? slow))
                return false;
            payload.CopyTo(slow.Buffer!.GetSpan());
            return Begin(slow, _disk.WriteAsync(offset, slow.Buffer.Memory[..length], isDurable));
        }

        if (!TryClaim(request, length, out SlowRequest? large))
            return false;
        try
        {
            if (!ReceivePayload(large.Buffer!.Slice(0, length)))
            {
                GiveBack(large);
                return false;
            }

            BytesWritten += length;
            _expectsLargeWrite = true;
            if (!isFast || !_disk.TryWrite(offset, large.Buffer.Slice(0, length)))
                return Begin(large, _disk.WriteAsync(offset, large.Buffer.Memory[..length], isDurable));
        }
        catch (DiskException)
        {
            GiveBack(large);
            throw;
        }

        GiveBack(large);
        return ReplySuccess(request);
    }

    private bool ServeBlockStatus(in NbdRequest request)
    {
        int most = (request.Flags & NbdCommandFlags.ReqOne) != 0 ? 1 : ServerLimits.MaxExtents;
        int chunks = BitOperations.PopCount((uint)_agreement.Contexts);
        if (!TryClaim(request, chunks * NbdReply.BlockStatusLength(most), out SlowRequest? slow))
            return false;
        slow.Extents = new ExtentList(most);
        return Begin(slow, _disk.GetExtentsAsync((long)request.Offset, request.Length, slow.Extents));
    }

    /// <summary>Receives the payload of a large write: what the input holds of it, then the rest straight in place.</summary>
    private bool ReceivePayload(Span<byte> payload)
    {
        int buffered = Math.Min(_tail - _head, payload.Length);
        _input!.Slice(_head, buffered).CopyTo(payload);
        _head += buffered;
        payload = payload[buffered..];

        // The client may wait for earlier replies before it sends on.
        if (payload.Length > 0 && !FlushReplies())
            return false;
        while (payload.Length > 0)
        {
            long count = Receive(payload, mayBlock: true);
            if (count > 0)
                payload = payload[(int)count..];
            if (payload.Length > 0 && !MayGoOnReceiving(count, holdsBytes: true))
                return false;
        }

        if (!_isSendBlocked)
            _stall.Stop();
        return true;
    }

    /// <summary>After a receive that did not bring all that is due: whether to wait for the rest.</summary>
    /// <param name="count">What the receive answered.</param>
    /// <param name="holdsBytes">The session holds bytes of the budget.</param>
    private bool MayGoOnReceiving(long count, bool holdsBytes)
    {
        if (count == 0 || (count < 0 && count != -(long)Errno.EAGAIN))
            return _connection.End(count == 0 ? "closed by client amid a write" : ((Errno)(-count)).Describe());
        if (_isStopping)
            return _connection.End("server is stopping");
        _stall.Moved(Math.Max(0, count));
        if (holdsBytes && IsStalled())
            return false;

        // The client may not send on before it has what other threads could not send.
        if (_isSendBlocked)
        {
            _isSendBlocked = false;
            SendFinished();
        }

        return !_isBroken;
    }

    /// <summary>Passes over a payload that nobody will use.</summary>
    private bool DrainPayload(uint length)
    {
        int buffered = (int)Math.Min(_tail - _head, length);
        _head += buffered;
        long left = length - buffered;
        if (left == 0)
            return true;
        if (!FlushReplies())
            return false;

        Debug.Assert(_head == _tail, "what is left of the payload is not in the input");
        _head = _tail = 0;
        while (left > 0)
        {
            Span<byte> scratch = _input!.Slice(0, (int)Math.Min(left, _input.Length));
            long count = Receive(scratch, mayBlock: true);
            left -= Math.Max(0, count);
            if (count < scratch.Length && !MayGoOnReceiving(count, holdsBytes: InFlight > 0))
                return false;
        }

        if (!_isSendBlocked)
            _stall.Stop();
        return true;
    }

    /// <summary>
    /// Makes a slow request, with a buffer of <paramref name="bufferLength"/> bytes if that is more than 0. Waits until
    /// the bounds on requests and bytes allow it. Then it is begun (<see cref="Begin"/>), or given back.
    /// </summary>
    /// <returns>False when the connection broke meanwhile.</returns>
    private bool TryClaim(in NbdRequest request, int bufferLength, out SlowRequest slow)
    {
        slow = null!;
        if ((_isInOrder || IsGathered(request.Cookie)) && !FlushReplies())
            return false; // another thread will send its reply, behind these
        if (InFlight >= ServerLimits.MaxInFlight
            && !(FlushReplies() && WaitUntilFinished(ServerLimits.MaxInFlight - 1)))
            return false;

        if (bufferLength > 0 && !_services.Budget.TryAcquire(bufferLength))
        {
            // Who waits must hold nothing: first all that is under way here is finished and sent.
            if (!FlushReplies() || !WaitUntilFinished(0))
                return false;
            _services.Budget.Acquire(bufferLength);
        }

        NativeBuffer? buffer = null;
        try
        {
            if (bufferLength > 0)
                buffer = _services.Buffers.Rent(bufferLength);
        }
        catch (OutOfMemoryException)
        {
            _services.Budget.Release(bufferLength);
            throw;
        }

        slow = SlowRequest.Rent(this, request);
        slow.ClaimedBytes = bufferLength;
        slow.Buffer = buffer;
        return true;
    }

    /// <summary>A slow request is under way from now on; when its operation has ended, it is answered.</summary>
    private bool Begin(SlowRequest slow, ValueTask operation)
    {
        lock (_finished)
        {
            _inFlight++;
            if (_isInOrder)
                _order.Enqueue(slow);
            else
                _cookies.Add(slow.Request.Cookie);
        }

        slow.Await(operation);
        return true;
    }

    /// <summary>A reply without data, from the session's thread.</summary>
    private bool ReplySuccess(in NbdRequest request)
    {
        if (!TryReserve(NbdSize.StructuredReply, out Span<byte> room))
            return false;
        _outputLength += request.Command == NbdCommand.Read && _structured
            ? NbdReply.WriteChunkHeader(room, NbdChunkFlags.Done, NbdChunkType.None, request.Cookie, 0)
            : NbdReply.WriteSimple(room, NbdError.None, request.Cookie);
        return true;
    }

    private bool ReplyFailure(in NbdRequest request, DiskException failure)
    {
        NbdError error = _replies.LogFailure(request, failure);
        return ReplyError(request, error, ErrorMap.Describe(error));
    }

    private bool ReplyError(in NbdRequest request, NbdError error, string message)
    {
        if (!TryReserve(NbdReply.MaxErrorChunk, out Span<byte> room))
            return false;
        _outputLength += _replies.WriteError(room, request, error, message);
        return true;
    }
}
