using System.Diagnostics;
using System.Numerics;
using Xnbd.Linux;
using Xnbd.Protocol;
using Xnbd.Storage;
using Xnbd.Storage.Threads;

namespace Xnbd.Server;

/// <summary>
/// The transmission phase of one connection. One thread, the session's own, runs everything here. It receives requests
/// (<see cref="SessionInput"/>), answers at once what needs no waiting, gathers those replies
/// (<see cref="ReplyOutput"/>), and sends them with one call when its input is used up. A request that would wait for a
/// disk becomes a <see cref="PendingRequest"/>. It completes on another thread, and its reply is sent from there
/// (<see cref="ReplySender"/>).
/// <para>
/// A session that waits for bytes of the budget holds none, and only its own thread waits for its client. Hence no
/// client can hold up another.
/// </para>
/// </summary>
internal sealed class Session
{
    private readonly Connection _connection;
    private readonly Agreement _agreement;
    private readonly Disk _disk;
    private readonly SessionServices _services;
    private readonly ReplySender _sender;
    private readonly ReplyOutput _output;
    private readonly SessionInput _input;
    private readonly FastReads _fastReads;

    public Session(Connection connection, Agreement agreement, SessionServices services, DateTimeOffset since)
    {
        Since = since;
        _connection = connection;
        _agreement = agreement;
        _disk = agreement.Export.Disk;
        _services = services;
        var builder = new ReplyBuilder(agreement, services.Failures, connection.Peer);
        _sender = new ReplySender(connection, services, builder, agreement.InOrder);
        _output = new ReplyOutput(_sender, builder, services.Buffers, agreement.StructuredReplies);
        _input = new SessionInput(connection, services, _output, _sender);
        _fastReads = new FastReads(
            _disk, services.Budget, _output, agreement.StructuredReplies, connection.SendsFiles);
    }

    /// <summary>When the session began.</summary>
    public DateTimeOffset Since { get; }

    /// <summary>Requests whose replies have not been sent completely.</summary>
    public int InFlight => _sender.Pending.Count;

    /// <summary>Requests received so far.</summary>
    public long RequestCount { get; private set; }

    /// <summary>Bytes of data that the client has asked for so far.</summary>
    public long BytesRead { get; private set; }

    /// <summary>Bytes of data that the client has sent so far.</summary>
    public long BytesWritten { get; private set; }

    /// <summary>Serves the client until it leaves, breaks the protocol, or the session is stopped.</summary>
    public void Run()
    {
        AdaptivePoll.NoteAwake();
        try
        {
            while (ServeReceived() && _output.Flush() && _input.ReceiveMore())
            {
            }
        }
        catch (OutOfMemoryException)
        {
            _connection.End("out of memory");
        }
        finally
        {
            if (_sender.WaitUntilFinished(maxInFlight: 0))
                _output.Flush();
            AdaptivePoll.NoteBlocked();
            _input.Release();
            _output.Release();
            _sender.Dispose();
        }
    }

    /// <summary>
    /// Ends the session after the requests that have been received. Any thread may call it, and signals
    /// <see cref="SessionServices.Stopping"/> afterwards.
    /// </summary>
    public void Stop() => _input.Stop();

    /// <summary>Serves the requests that have been received completely.</summary>
    /// <returns>False when the session is over.</returns>
    private bool ServeReceived()
    {
        DeferredWork.Begin(); // each wait in it comes after a flush of the output, which runs what was deferred
        try
        {
            return ServeBatch();
        }
        finally
        {
            DeferredWork.End();
        }
    }

    private bool ServeBatch()
    {
        while (_input.Length >= NbdSize.Request)
        {
            if (!NbdRequest.TryRead(_input.Peek(NbdSize.Request), out NbdRequest request))
                return _connection.End("bytes that are no request");

            bool isBatchedWrite = request.Command == NbdCommand.Write && request.Length <= ServerLimits.MaxBatchedWrite;
            if (isBatchedWrite && _input.Length < NbdSize.Request + (int)request.Length)
                return true; // the rest of its payload is on its way

            _input.Take(NbdSize.Request);
            RequestCount++;
            if (!Serve(request))
                return false;
        }

        return true;
    }

    /// <returns>False when the session is over.</returns>
    private bool Serve(in NbdRequest request)
    {
        if (request.Command == NbdCommand.Disconnect)
            return _connection.End("disconnected");
        if (!_output.BeginRequest(request.Cookie))
            return false;

        NbdError error = RequestRules.Validate(request, _agreement, out string message);
        if (error != NbdError.None)
        {
            return (request.Command != NbdCommand.Write || _input.DrainPayload(request.Length))
                && _output.ReplyError(request, error, message);
        }

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
                    return TryClaim(request, 0, out PendingRequest? flush) && Begin(flush, _disk.FlushAsync());
                case NbdCommand.BlockStatus:
                    return ServeBlockStatus(request);
                default:
                    break;
            }

            if (request.Length == 0)
                return _output.ReplySuccess(request);
            if (!TryClaim(request, 0, out PendingRequest? pending))
                return false;
            long offset = (long)request.Offset;
            return Begin(pending, request.Command switch
            {
                NbdCommand.Trim => _disk.TrimAsync(offset, request.Length, isDurable, _sender.Gone),
                NbdCommand.WriteZeroes => _disk.ZeroAsync(
                    offset, request.Length, ZeroModeOf(request.Flags), isDurable, _sender.Gone),
                NbdCommand.Cache => _disk.PrefetchAsync(offset, request.Length, _sender.Gone),
                _ => throw new UnreachableException($"command {request.Command} passed the rules"),
            });
        }
        catch (DiskException failure)
        {
            return _output.ReplyFailure(request, failure);
        }
    }

    private static ZeroMode ZeroModeOf(NbdCommandFlags flags)
        => ((flags & NbdCommandFlags.NoHole) == 0 ? ZeroMode.MayPunch : ZeroMode.None)
            | ((flags & NbdCommandFlags.FastZero) != 0 ? ZeroMode.FastOnly : ZeroMode.None);

    private bool ServeRead(NbdRequest request)
    {
        if (request.Length == 0)
            return _output.ReplySuccess(request);

        BytesRead += request.Length;
        FastReadResult result = _output.MustQueue ? FastReadResult.MustWait : _fastReads.TryAnswer(ref request);
        if (result is FastReadResult.Answered or FastReadResult.Broken)
            return result == FastReadResult.Answered;

        // Its data will stand behind room for the headers of as many chunks as it may be cut into.
        int length = (int)request.Length, headers = ReadChunks.HeaderRoom(length);
        bool hasBytes = result == FastReadResult.ReadElsewhere;
        if (!TryClaim(request, headers + length, out PendingRequest? pending, hasBytes))
            return false;
        Memory<byte> data = pending.Buffer!.Memory.Slice(headers, length);
        return Begin(pending, _disk.ReadAsync((long)request.Offset, data, _sender.Gone));
    }

    private bool ServeWrite(in NbdRequest request, bool isDurable)
    {
        int length = (int)request.Length;
        if (length == 0)
            return _output.ReplySuccess(request);

        bool isFast = !isDurable && !_output.MustQueue;
        return length <= ServerLimits.MaxBatchedWrite
            ? ServeBatchedWrite(request, length, isFast, isDurable)
            : ServeLargeWrite(request, length, isFast, isDurable);
    }

    /// <summary>A write whose payload is in the input already.</summary>
    private bool ServeBatchedWrite(in NbdRequest request, int length, bool isFast, bool isDurable)
    {
        long offset = (long)request.Offset;
        Span<byte> payload = _input.Take(length);
        BytesWritten += length;
        if (isFast && _disk.TryWrite(offset, payload))
            return _output.ReplySuccess(request);
        if (!TryClaim(request, length, out PendingRequest? pending))
            return false;
        payload.CopyTo(pending.Buffer!.GetSpan());
        return Begin(pending, _disk.WriteAsync(offset, pending.Buffer.Memory[..length], isDurable, _sender.Gone));
    }

    /// <summary>A write whose payload is received into a buffer of its own.</summary>
    private bool ServeLargeWrite(in NbdRequest request, int length, bool isFast, bool isDurable)
    {
        long offset = (long)request.Offset;
        if (!TryClaim(request, length, out PendingRequest? pending))
            return false;
        try
        {
            NativeBuffer buffer = pending.Buffer!;
            if (!_input.ReceivePayload(buffer.Slice(0, length)))
            {
                pending.Return(_services);
                return false;
            }

            BytesWritten += length;
            if (!isFast || !_disk.TryWrite(offset, buffer.Slice(0, length)))
                return Begin(pending, _disk.WriteAsync(offset, buffer.Memory[..length], isDurable, _sender.Gone));
        }
        catch (DiskException)
        {
            pending.Return(_services);
            throw;
        }

        pending.Return(_services);
        return _output.ReplySuccess(request);
    }

    private bool ServeBlockStatus(in NbdRequest request)
    {
        int maxExtents = (request.Flags & NbdCommandFlags.ReqOne) != 0 ? 1 : ServerLimits.MaxExtents;
        int chunks = BitOperations.PopCount((uint)_agreement.Contexts);
        if (!TryClaim(request, chunks * NbdReply.BlockStatusLength(maxExtents), out PendingRequest? pending))
            return false;
        pending.Extents = new ExtentList(maxExtents);
        return Begin(pending, _disk.GetExtentsAsync((long)request.Offset, request.Length, pending.Extents));
    }

    /// <summary>
    /// Makes a pending request. Waits until the bounds on requests and bytes allow it. Then it is begun
    /// (<see cref="Begin"/>), or given back.
    /// </summary>
    /// <param name="request">The request's header.</param>
    /// <param name="bufferLength">Length of its buffer in bytes; 0 when it needs none.</param>
    /// <param name="pending">The pending request.</param>
    /// <param name="hasBytes">The bytes have been taken from the budget already.</param>
    /// <returns>False when the connection broke meanwhile.</returns>
    private bool TryClaim(in NbdRequest request, int bufferLength, out PendingRequest pending, bool hasBytes = false)
    {
        pending = null!;
        Debug.Assert(!hasBytes || !_output.IsOrdered(request.Cookie), "who holds bytes does not wait for its client");
        if (!_output.BeginPending(request.Cookie))
            return false;
        if (_sender.Pending.Count >= ServerLimits.MaxInFlight && !_output.Finish(ServerLimits.MaxInFlight - 1))
            return false;

        NativeBuffer? buffer = null;
        bool isFar = false;
        if (bufferLength > 0)
        {
            if (!hasBytes)
            {
                isFar = _disk.IsFar((long)request.Offset, request.Length, request.Command == NbdCommand.Write);
                // Who waits must hold nothing: first all that is under way here is finished and sent.
                if (!_services.Budget.TryAcquire(bufferLength, isFar)
                    && (!_output.FinishAll() || !_services.Budget.Acquire(bufferLength, isFar, _sender.EndIfGone)))
                {
                    return false;
                }
            }

            try
            {
                buffer = _services.Buffers.Rent(bufferLength);
            }
            catch (OutOfMemoryException)
            {
                _services.Budget.Release(bufferLength, isFar);
                throw;
            }
        }

        pending = PendingRequest.Rent(_sender, request, buffer, bufferLength, isFar);
        return true;
    }

    /// <summary>The request is in flight from now on. When its operation has ended, it is answered.</summary>
    /// <returns>True.</returns>
    private bool Begin(PendingRequest pending, ValueTask operation)
    {
        _sender.Pending.Add(pending);
        pending.Await(operation);
        return true;
    }
}
