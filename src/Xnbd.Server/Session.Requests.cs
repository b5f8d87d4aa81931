using System.Diagnostics;
using System.Numerics;
using Xnbd.Linux;
using Xnbd.Protocol;
using Xnbd.Storage;

namespace Xnbd.Server;

/// <content>What each request does (section "Request types").</content>
internal sealed partial class Session
{
    private const int DataHeader = NbdSize.StructuredReply + NbdSize.OffsetDataPrefix;
    private const int HoleChunk = NbdSize.StructuredReply + NbdSize.OffsetHolePayload; // longer than a data chunk of 3 bytes

    private readonly FileRange[] _ranges = new FileRange[ServerLimits.MaxReadChunks];

    /// <returns>False when the session is over.</returns>
    private bool Serve(in NbdRequest request)
    {
        if (request.Command == NbdCommand.Disconnect)
            return _connection.End("disconnected");

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
                    return TryStart(request, 0, out SlowRequest? flush) && Begin(flush, _disk.FlushAsync());
                case NbdCommand.BlockStatus:
                    return ServeBlockStatus(request);
                default:
                    break;
            }

            if (request.Length == 0)
                return ReplySuccess(request);
            if (!TryStart(request, 0, out SlowRequest? slow))
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

    private bool ServeRead(in NbdRequest request)
    {
        int length = (int)request.Length;
        if (length == 0)
            return ReplySuccess(request);

        bool? sent = length <= ServerLimits.MaxBatchedRead ? TryReadCopied(request) : TryReadLocated(request);
        if (sent is { } answer)
            return answer;

        // Its data will stand behind room for the headers of as many chunks as it may be cut into.
        int headers = HeaderRoom(length);
        if (!TryStart(request, headers + length, out SlowRequest? slow))
            return false;
        return Begin(slow, _disk.ReadAsync((long)request.Offset, slow.Buffer!.Memory.Slice(headers, length)));
    }

    /// <summary>A small read: straight into the output, behind its header.</summary>
    /// <returns>Null when it would wait for the disk.</returns>
    private bool? TryReadCopied(in NbdRequest request)
    {
        int length = (int)request.Length;
        int header = _structured ? DataHeader : NbdSize.SimpleReply;
        if (!TryReserve(Math.Max(header + length, HoleChunk), out Span<byte> room))
            return false;
        Span<byte> data = room.Slice(header, length);
        if (!_disk.TryRead((long)request.Offset, data))
            return null;

        if (!_structured)
            _outputLength += NbdReply.WriteSimple(room, NbdError.None, request.Cookie) + length;
        else if (!data.ContainsAnyExcept((byte)0))
            _outputLength += NbdReply.WriteOffsetHole(room, NbdChunkFlags.Done, request.Cookie, request.Offset, request.Length);
        else
            _outputLength += NbdReply.WriteOffsetData(room, NbdChunkFlags.Done, request.Cookie, request.Offset, length) + length;
        return true;
    }

    /// <summary>A large read: from the file to the socket, without a copy through this process; holes as holes.</summary>
    /// <returns>Null when it would wait for the disk, or no one file holds the data.</returns>
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
            if (!TryReserve(HoleChunk, out Span<byte> header))
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

        long offset = (long)request.Offset;
        if (length <= ServerLimits.MaxBatchedWrite)
        {
            // Its payload is in the input already.
            Span<byte> payload = _input!.Slice(_head, length);
            _head += length;
            if (!isDurable && _disk.TryWrite(offset, payload))
                return ReplySuccess(request);
            if (!TryStart(request, length, out SlowRequest? slow))
                return false;
            payload.CopyTo(slow.Buffer!.GetSpan());
            return Begin(slow, _disk.WriteAsync(offset, slow.Buffer.Memory[..length], isDurable));
        }

        if (!TryStart(request, length, out SlowRequest? large))
            return false;
        try
        {
            if (!ReceivePayload(large.Buffer!.Slice(0, length)))
            {
                Release(large);
                return false;
            }

            _expectsLargeWrite = true;
            if (isDurable || !_disk.TryWrite(offset, large.Buffer.Slice(0, length)))
                return Begin(large, _disk.WriteAsync(offset, large.Buffer.Memory[..length], isDurable));
        }
        catch (DiskException)
        {
            Release(large);
            throw;
        }

        Release(large);
        return ReplySuccess(request);
    }

    private bool ServeBlockStatus(in NbdRequest request)
    {
        int most = (request.Flags & NbdCommandFlags.ReqOne) != 0 ? 1 : ServerLimits.MaxExtents;
        int chunks = BitOperations.PopCount((uint)_agreement.Contexts);
        if (!TryStart(request, chunks * NbdReply.BlockStatusLength(most), out SlowRequest? slow))
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
            if (payload.Length > 0 && !MayGoOnReceiving(count))
                return false;
        }

        if (!_isSendBlocked)
            _stall.Stop();
        return true;
    }

    /// <summary>After a receive that did not bring all that is due: whether to wait for the rest.</summary>
    private bool MayGoOnReceiving(long count)
    {
        if (count == 0 || (count < 0 && count != -(long)Errno.EAGAIN))
            return _connection.End(count == 0 ? "closed by client amid a write" : ((Errno)(-count)).Describe());
        if (_isStopping)
            return _connection.End("server is stopping");
        _stall.Moved(Math.Max(0, count));
        if (InFlight > 0 && IsStalled())
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
            if (count < scratch.Length && !MayGoOnReceiving(count))
                return false;
        }

        if (!_isSendBlocked)
            _stall.Stop();
        return true;
    }

    /// <summary>
    /// Makes a slow request, with a buffer of <paramref name="bufferLength"/> bytes if that is more than 0. Waits until
    /// the bounds on requests and bytes allow it.
    /// </summary>
    /// <returns>False when the connection broke meanwhile.</returns>
    private bool TryStart(in NbdRequest request, int bufferLength, out SlowRequest slow)
    {
        slow = null!;
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
        lock (_finished)
            _inFlight++;
        return true;
    }

    private static bool Begin(SlowRequest slow, ValueTask operation)
    {
        slow.Await(operation);
        return true;
    }

    /// <summary>Builds the reply of a slow request whose disk operation has ended, and hands it to be sent. On any thread.</summary>
    public void Finish(SlowRequest slow)
    {
        NbdRequest request = slow.Request;
        try
        {
            slow.GetResult();
            switch (request.Command)
            {
                case NbdCommand.Read:
                    BuildReadReply(slow);
                    break;
                case NbdCommand.BlockStatus:
                    BuildBlockStatusReply(slow);
                    break;
                default:
                    slow.ReplySmall(NbdReply.WriteSimple(slow.SmallReply, NbdError.None, request.Cookie));
                    break;
            }
        }
        catch (Exception failure)
        {
            NbdError error = LogFailure(request, failure);
            slow.ReplySmall(WriteError(slow.SmallReply, request, error, ErrorMap.Describe(error)));
        }

        Enqueue(slow);
    }

    private void BuildReadReply(SlowRequest slow)
    {
        NbdRequest request = slow.Request;
        int length = (int)request.Length;
        int headers = HeaderRoom(length);
        Span<byte> buffer = slow.Buffer!.GetSpan();
        Span<byte> data = buffer.Slice(headers, length);
        if (!_structured)
        {
            int start = headers - NbdSize.SimpleReply;
            NbdReply.WriteSimple(buffer[start..], NbdError.None, request.Cookie);
            slow.ReplyFromBuffer(start, NbdSize.SimpleReply + length);
            return;
        }

        // All data, all hole, or (unless it may not be cut) a piece for each run of data or zeroes. Chunks are laid
        // down from the front; their data moves forward, past headers that are no longer than the room for them.
        bool mayCut = (request.Flags & NbdCommandFlags.Df) == 0;
        int at = 0;
        for (int done = 0; done < length;)
        {
            int run = RunLength(data[done..], request.Offset + (ulong)done, mayCut, out bool isHole);
            NbdChunkFlags flags = done + run == length ? NbdChunkFlags.Done : NbdChunkFlags.None;
            ulong offset = request.Offset + (ulong)done;
            if (isHole)
            {
                at += NbdReply.WriteOffsetHole(buffer[at..], flags, request.Cookie, offset, (uint)run);
            }
            else if (done == 0 && run == length)
            {
                at = headers - DataHeader; // the common case: nothing moves
                NbdReply.WriteOffsetData(buffer[at..], flags, request.Cookie, offset, run);
                slow.ReplyFromBuffer(at, DataHeader + run);
                return;
            }
            else
            {
                data.Slice(done, run).CopyTo(buffer[(at + DataHeader)..]);
                at += NbdReply.WriteOffsetData(buffer[at..], flags, request.Cookie, offset, run) + run;
            }

            done += run;
        }

        slow.ReplyFromBuffer(0, at);
    }

    /// <summary>Data that is all zeroes over a whole aligned part of this size, in bytes, is sent as a hole.</summary>
    private const int HoleGrain = 64 * 1024;

    /// <summary>Room for the headers of all chunks that a read may be cut into.</summary>
    private static int HeaderRoom(int length) => HoleChunk * ((length / HoleGrain) + 2);

    /// <summary>How long the data from here on is of one kind.</summary>
    private static int RunLength(ReadOnlySpan<byte> data, ulong offset, bool mayCut, out bool isHole)
    {
        int run = mayCut ? NextPart(0, data.Length, offset) : data.Length;
        isHole = !data[..run].ContainsAnyExcept((byte)0);
        while (run < data.Length)
        {
            int part = NextPart(run, data.Length, offset);
            if (!data.Slice(run, part).ContainsAnyExcept((byte)0) != isHole)
                break;
            run += part;
        }

        return run;

        static int NextPart(int at, int length, ulong offset)
            => (int)Math.Min(length - at, HoleGrain - (long)((offset + (ulong)at) % HoleGrain));
    }

    /// <summary>One chunk for each context; in each, neighbours of equal status are one extent.</summary>
    private void BuildBlockStatusReply(SlowRequest slow)
    {
        Span<byte> buffer = slow.Buffer!.GetSpan();
        int at = 0;
        for (MetaContexts left = _agreement.Contexts; left != MetaContexts.None;)
        {
            MetaContexts context = left & ~(left - 1); // the lowest bit
            left &= ~context;
            int chunk = at, count = 0;
            at += NbdReply.BlockStatusLength(0);
            uint lastStatus = 0, lastLength = 0;
            foreach (Extent extent in slow.Extents!.Extents)
            {
                uint status = context == MetaContexts.AllocationDepth ? (uint)extent.Depth
                    : (uint)(extent.IsHole ? NbdAllocation.Hole | NbdAllocation.Zero : NbdAllocation.Data);
                bool joins = count > 0 && status == lastStatus;
                lastLength = (uint)extent.Length + (joins ? lastLength : 0);
                lastStatus = status;
                if (joins)
                    at -= NbdReply.ExtentLength;
                else
                    count++;
                at += NbdReply.WriteExtent(buffer[at..], lastLength, status);
            }

            NbdChunkFlags flags = left == MetaContexts.None ? NbdChunkFlags.Done : NbdChunkFlags.None;
            NbdReply.WriteBlockStatus(buffer[chunk..], flags, slow.Request.Cookie, (uint)context, count);
        }

        slow.ReplyFromBuffer(0, at);
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
        NbdError error = LogFailure(request, failure);
        return ReplyError(request, error, ErrorMap.Describe(error));
    }

    private bool ReplyError(in NbdRequest request, NbdError error, string message)
    {
        if (!TryReserve(NbdReply.MaxErrorChunk, out Span<byte> room))
            return false;
        _outputLength += WriteError(room, request, error, message);
        return true;
    }

    private int WriteError(Span<byte> destination, in NbdRequest request, NbdError error, string message)
        => _structured
            ? NbdReply.WriteErrorChunk(destination, request.Cookie, error, message)
            : NbdReply.WriteSimple(destination, error, request.Cookie);

    /// <summary>Logs why a request failed, and says what the client is told.</summary>
    private NbdError LogFailure(in NbdRequest request, Exception failure)
    {
        if (failure is DiskException { Error: DiskError.NotSupported })
            return NbdError.NotSupported; // the usual answer to a fast zero: nothing went wrong
        _services.Failures.Log(_connection.Peer, request.Command, failure.Message);
        return failure is DiskException known ? ErrorMap.ToNbd(known.Error) : NbdError.Io;
    }
}
