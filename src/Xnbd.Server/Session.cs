using System.Diagnostics;
using Xnbd.Linux;
using Xnbd.Protocol;
using Xnbd.Storage;
using Xnbd.Storage.Threads;

namespace Xnbd.Server;

/// <summary>
/// The transmission phase of one connection. One thread, the session's own, receives; it answers at once what needs no
/// waiting, gathers the replies, and sends them with one call when its input is used up. What would wait for a disk
/// becomes a <see cref="SlowRequest"/>, completes on another thread, and is sent from there or, when the socket is
/// full, from here.
/// <para>
/// Owners: input, output and the poll's credit belong to the session's thread. The socket's sending side belongs to
/// whoever holds <c>_sending</c>; <c>_finished</c>, <c>_inFlight</c> are guarded by themselves. Locks in their order of
/// acquisition: <c>_sending</c>, then <c>_finished</c>.
/// </para>
/// <para>
/// A session that waits for bytes of the budget holds none; nothing but its own thread waits for its client. Hence no
/// client can hold up another.
/// </para>
/// The type's other files: <c>Session.Requests.cs</c> (what each request does), <c>Session.Sending.cs</c> (replies).
/// </summary>
internal sealed partial class Session
{
    private readonly Connection _connection;
    private readonly Agreement _agreement;
    private readonly Disk _disk;
    private readonly SessionServices _services;
    private readonly ReplyBuilder _replies;
    private readonly bool _structured;

    // Requests received and not yet handled: _input[_head.._tail].
    private NativeBuffer? _input;
    private int _head;
    private int _tail;
    private bool _expectsLargeWrite;

    private volatile bool _isStopping;

    /// <summary>How often a session looks for what others could not send, if they have no way to wake it.</summary>
    private const int LookAgainMilliseconds = 20;

    public Session(Connection connection, Agreement agreement, SessionServices services)
    {
        _connection = connection;
        _agreement = agreement;
        _disk = agreement.Export.Disk;
        _services = services;
        _replies = new ReplyBuilder(agreement, services.Failures, connection.Peer);
        _structured = agreement.StructuredReplies;
        _isInOrder = agreement.InOrder;
        _stall = new StallClock(services.Budget);
    }

    /// <summary>Requests answered so far.</summary>
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
            while (ServeBufferedRequests() && FlushReplies() && ReceiveMore())
            {
            }
        }
        catch (OutOfMemoryException)
        {
            _connection.End("out of memory");
        }
        finally
        {
            if (WaitUntilFinished(mostInFlight: 0))
                FlushReplies();
            AdaptivePoll.NoteBlocked();
            ReleaseBuffers();
            _wakeUp?.Dispose();
        }
    }

    /// <summary>
    /// Ends the session after the requests that have been received, from any thread. Who calls it signals
    /// <see cref="SessionServices.Stopping"/> afterwards.
    /// </summary>
    public void Stop() => _isStopping = true;

    /// <returns>False when the session is over.</returns>
    private bool ServeBufferedRequests()
    {
        Batch.Begin(); // each wait in it comes after FlushReplies, which does what was put off
        try
        {
            return ServeBatch();
        }
        finally
        {
            Batch.End();
        }
    }

    private bool ServeBatch()
    {
        while (_tail - _head >= NbdSize.Request)
        {
            if (!NbdRequest.TryRead(_input!.Slice(_head, NbdSize.Request), out NbdRequest request))
                return _connection.End("no request where one was due");

            bool isBatchedWrite = request.Command == NbdCommand.Write && request.Length <= ServerLimits.MaxBatchedWrite;
            if (isBatchedWrite && _tail - _head < NbdSize.Request + (int)request.Length)
                return true; // the rest of its payload is on its way

            _head += NbdSize.Request;
            RequestCount++;
            if (!Serve(request))
                return false;
        }

        return true;
    }

    /// <summary>
    /// Waits for more input: polls for a short time while that pays off; then blocks in the receive itself, the cheapest
    /// way to wait; after a while without input, or when slow requests may need this thread, gives its buffers back and
    /// waits for all that may happen.
    /// </summary>
    /// <returns>False when no more will come.</returns>
    private bool ReceiveMore()
    {
        bool isIdle = false;
        while (!_isStopping)
        {
            _input ??= _services.Buffers.Rent(ServerLimits.InputBuffer);
            CompactInput();

            // After a large write the next one is likely: its header alone first, so that its payload lands in place.
            int room = _expectsLargeWrite && _tail < NbdSize.Request ? NbdSize.Request - _tail : _input.Length - _tail;
            long count = Receive(_input.Slice(_tail, room), mayBlock: !isIdle && InFlight == 0);
            if (count > 0)
            {
                _tail += (int)count;
                return true;
            }

            if (count != -(long)Errno.EAGAIN)
                return _connection.End(count == 0 ? "closed by client" : ((Errno)(-count)).Describe());

            isIdle = true;
            _expectsLargeWrite = false;
            ReleaseIdleBuffers();
            if (!WaitForInput())
                return false;
        }

        return _connection.End("server is stopping");
    }

    /// <returns>As <see cref="LinuxSocket.ReceiveNow"/>.</returns>
    private long Receive(Span<byte> buffer, bool mayBlock)
    {
        if (_poll.IsWorthwhile)
        {
            long count = _poll.Poll(_connection.Handle, buffer);
            if (count != -(long)Errno.EAGAIN)
                return count;
        }

        if (!mayBlock)
            return LinuxSocket.ReceiveNow(_connection.Handle, buffer);
        long start = Stopwatch.GetTimestamp();
        AdaptivePoll.NoteBlocked();
        long received = LinuxSocket.Receive(_connection.Handle, buffer);
        AdaptivePoll.NoteAwake();
        _poll.NoteBlockedTime(Stopwatch.GetElapsedTime(start));
        return received;
    }

    /// <summary>Blocks until the client sends; meanwhile sends what other threads could not.</summary>
    private bool WaitForInput()
    {
        while (true)
        {
            bool canBeWoken = PrepareWakeUp();
            bool isBlocked = _isSendBlocked;
            AdaptivePoll.NoteBlocked();
            Readiness ready = LinuxSocket.Wait(
                _connection.Handle,
                forReading: true,
                forWriting: isBlocked,
                isBlocked ? 1000 : canBeWoken ? -1 : LookAgainMilliseconds,
                _wakeUp,
                _services.Stopping);
            AdaptivePoll.NoteAwake();
            if ((ready & Readiness.Woken) != 0)
                _wakeUp?.Reset();
            if ((ready & Readiness.Writable) != 0)
            {
                _isSendBlocked = false;
                SendFinished();
            }

            if (isBlocked && IsStalled())
                return false;

            if ((ready & (Readiness.Readable | Readiness.Broken)) != 0 || _isStopping)
                return true; // the next receive tells what it is
        }
    }

    /// <summary>Makes the event by which other threads wake this one if they may have to, else gives it back.</summary>
    /// <returns>False when they may have to, and there is no event: no descriptor was to be had.</returns>
    private bool PrepareWakeUp()
    {
        bool isNeeded = InFlight > 0;
        if (isNeeded && _wakeUp is null)
        {
            Volatile.Write(ref _wakeUp, LinuxEvent.TryCreate());
            Interlocked.MemoryBarrier(); // who did not see it has set _isSendBlocked before this thread looks
        }
        else if (!isNeeded && _wakeUp is { } idle)
        {
            lock (_sending)
                _wakeUp = null;
            idle.Dispose();
        }

        return !isNeeded || _wakeUp is not null;
    }

    private void CompactInput()
    {
        int length = _tail - _head;
        if (length > 0 && _head > 0)
            _input!.Slice(_head, length).CopyTo(_input.Slice(0, length));
        _head = 0;
        _tail = length;
    }

    private void ReleaseIdleBuffers()
    {
        if (_input is not null && _head == _tail)
        {
            _services.Buffers.Return(_input);
            _input = null;
            _head = _tail = 0;
        }

        if (_output is not null)
        {
            Debug.Assert(_outputLength == 0, "replies are sent before a session waits");
            _services.Buffers.Return(_output);
            _output = null;
            _gathered.Clear();
            _gathered.TrimExcess();
        }
    }

    private void ReleaseBuffers()
    {
        _head = _tail = 0;
        _outputLength = 0;
        ReleaseIdleBuffers();
    }

    /// <summary>Whether a client that hardly moves bytes keeps others from theirs; then the connection is ended.</summary>
    private bool IsStalled()
    {
        if (!_stall.IsStalled())
            return false;
        _isBroken = true;
        _connection.Abort("too slow, while others wait for the memory that it holds");
        return true;
    }
}

/// <summary>What all sessions of a server share.</summary>
/// <param name="Buffers">For requests and replies.</param>
/// <param name="Budget">What may be in flight.</param>
/// <param name="Failures">For requests that failed.</param>
/// <param name="Stopping">Signalled, once and for all, when sessions are to end.</param>
internal sealed record SessionServices(BufferPool Buffers, RequestBudget Budget, FailureLog Failures, LinuxEvent Stopping);
