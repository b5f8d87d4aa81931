using System.Net.Sockets;
using Xnbd.Linux;
using Xnbd.Protocol;
using Xnbd.Storage;
using Xnbd.Storage.Threads;

namespace Xnbd.Client;

/// <summary>
/// One connection to a remote server, with many requests under way (reads, and questions where zeroes are), whose
/// replies may come in any order. A thread of its own receives (<see cref="RemoteReplyReader"/>). Requests are sent by
/// whoever makes them; what is added while somebody sends goes out with the next call.
/// <para>
/// States: open; broken, once and for all, for the first reason. A broken connection hands the requests that were under
/// way back to its owner: reading again does no harm. Its receiving thread alone does so, when it has come to its end
/// and nobody sends any more: until then it may be writing into a request's buffer.
/// </para>
/// <para>
/// Invariants: a request is in a slot from when it is added until it is answered or handed back. If there is output,
/// then <c>_isSending</c> is set, and one thread is about to send.
/// </para>
/// Lock: <c>_lock</c> guards slots and output. Nothing is sent while it is held, nobody is called, and no other lock is
/// taken, so that it may be taken while the owner's lock is held.
/// </summary>
internal sealed class RemoteConnection : IDisposable
{
    /// <summary>Requests under way at once: enough for 100 MB/s and 100 ms with reads of 128 KiB and more.</summary>
    public const int MaxUnderWay = 128;

    /// <summary>
    /// How many requests go out with one call, while other connections are free: a part of what a busy client asks for
    /// at once. So a server that answers the requests of one connection one after the other works at several, too.
    /// </summary>
    private const int MaxGathered = 16;

    private static int s_lastId;

    private readonly int _id = Interlocked.Increment(ref s_lastId);
    private readonly Socket _socket;
    private readonly RemoteAddress _address;
    private readonly RemoteAgreement _agreement;
    private readonly TimeProvider _time;
    private readonly Action _freed;
    private readonly Action<RemoteConnection, string, List<RemoteRequest>> _broken;
    private readonly RemoteReplyReader _replies;
    private readonly Action _send;

    private readonly object _lock = new(); // pulsed when nobody sends any more
    private readonly RemoteRequest?[] _slots = new RemoteRequest?[MaxUnderWay];
    private readonly uint[] _generations = new uint[MaxUnderWay]; // a cookie is a slot, and how often it was used
    private readonly long[] _numbers = new long[MaxUnderWay]; // of requests under way, in order of sending; else 0
    private readonly Stack<int> _free = new(Enumerable.Range(0, MaxUnderWay).Reverse());
    private int _freeCount = MaxUnderWay; // as above, read without the lock
    private long _busySince; // when the first of the requests under way was added
    private byte[] _output = new byte[MaxUnderWay * NbdSize.Request];
    private byte[] _outputBeingSent = new byte[MaxUnderWay * NbdSize.Request];
    private int _outputLength;
    private bool _isSending; // a thread sends, or has promised to
    private string? _reason; // why it is broken; it begins with the server's name

    private long _lastNumber;
    private long _answeredNumber; // the highest number that was answered
    private long _passedNumber; // what that was, at _passedAt; both belong to the thread that calls BreakIfSilent
    private long _passedAt;

    private RemoteConnection(
        Socket socket,
        RemoteAddress address,
        RemoteAgreement agreement,
        Action freed,
        Action<RemoteConnection, string, List<RemoteRequest>> broken,
        TimeProvider time)
    {
        (_socket, _address, _agreement, _freed, _broken, _time) = (socket, address, agreement, freed, broken, time);
        _replies = new RemoteReplyReader(socket, address, agreement, time);
        _send = Send;
        _busySince = _passedAt = time.GetTimestamp();
    }

    /// <summary>The export.</summary>
    public NbdExportInfo Export => _agreement.Export;

    /// <summary>It can be asked where zeroes are.</summary>
    public bool TellsZeroes => _agreement.AllocationId is not null;

    /// <summary>It cannot be used any more.</summary>
    public bool IsBroken => Volatile.Read(ref _reason) is not null;

    /// <summary>It broke because the line is dead; see <see cref="RemoteReplyReader.HasTimedOut"/>.</summary>
    public bool HasTimedOut => _replies.HasTimedOut;

    /// <summary>It was broken because nothing arrived: its requests have waited long enough.</summary>
    public bool IsSilent { get; private set; }

    /// <summary>Requests under way.</summary>
    public int UnderWay => MaxUnderWay - Volatile.Read(ref _freeCount);

    /// <summary>How it is at this moment.</summary>
    public RemoteConnectionState State
    {
        get
        {
            int requests = UnderWay;
            TimeSpan silence = TimeSpan.Zero;
            if (requests > 0 && _replies.WaitsSince is var since and not RemoteReplyReader.Never)
                silence = _time.GetElapsedTime(Math.Max(since, Volatile.Read(ref _busySince)));
            return new RemoteConnectionState(_id, requests, silence, _replies.ReceivedBytes);
        }
    }

    /// <summary>A thread is about to send requests, and another one may go out with the same call.</summary>
    public bool IsGathering => Volatile.Read(ref _outputLength) is > 0 and < MaxGathered * NbdSize.Request;

    /// <summary>Connects and negotiates.</summary>
    /// <param name="address">The server.</param>
    /// <param name="timeout">Time for all of it.</param>
    /// <param name="freed">Called when a request has ended: another one has room.</param>
    /// <param name="broken">Called once when it breaks, with the reason and the requests that were under way.</param>
    /// <param name="time">Tells how long the server has been silent.</param>
    /// <exception cref="RemoteException">The server cannot be used.</exception>
    public static RemoteConnection Connect(
        RemoteAddress address,
        TimeSpan timeout,
        Action freed,
        Action<RemoteConnection, string, List<RemoteRequest>> broken,
        TimeProvider time)
    {
        Socket socket;
        try
        {
            socket = address.Connect(timeout);
        }
        catch (SocketException failure)
        {
            bool isMissing = address.UnixPath is { } path && !Path.Exists(path); // the BCL's words for it mislead
            string reason = isMissing ? "there is no such socket" : failure.Message;
            throw new RemoteException($"{address}: cannot connect: {reason}");
        }

        try
        {
            RemoteAgreement agreement = RemoteHandshake.Run(socket, address, timeout);
            RemoteConnection connection;
            try
            {
                connection = new RemoteConnection(socket, address, agreement, freed, broken, time);
            }
            catch (OutOfMemoryException failure)
            {
                throw new RemoteException($"{address}: cannot connect: {failure.Message}");
            }

            if (LinuxThread.TryStart("remote", connection.ReceiveAll) is null)
            {
                connection._replies.Dispose();
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

    /// <summary>Adds a read, or a question to a server that tells zeroes. Nothing is sent yet.</summary>
    /// <param name="request">The request; the connection's from now on, if it is added.</param>
    /// <param name="mustSend">
    /// The caller must call <see cref="SendSoon"/> when it holds no lock any more: no other thread sends.
    /// </param>
    /// <returns>False when there is no room, or the connection is broken.</returns>
    public bool TryAdd(RemoteRequest request, out bool mustSend)
    {
        lock (_lock)
        {
            mustSend = false;
            if (_reason is not null || _outputLength + NbdSize.Request > _output.Length || !_free.TryPop(out int slot))
                return false;
            if (_freeCount == MaxUnderWay)
                Volatile.Write(ref _busySince, _time.GetTimestamp());
            Volatile.Write(ref _freeCount, _free.Count);
            _slots[slot] = request;
            _numbers[slot] = ++_lastNumber;
            ulong cookie = ((ulong)++_generations[slot] << 32) | (uint)slot;
            NbdCommand command = request.Extents is null ? NbdCommand.Read : NbdCommand.BlockStatus;
            new NbdRequest(NbdCommandFlags.None, command, cookie, (ulong)request.Offset, (uint)request.Length)
                .Write(_output.AsSpan(_outputLength));
            Volatile.Write(ref _outputLength, _outputLength + NbdSize.Request);
            mustSend = !_isSending;
            _isSending = true;
            return true;
        }
    }

    /// <summary>Sends what was added, at the end of this thread's batch, or now.</summary>
    public void SendSoon()
    {
        if (!DeferredWork.TryDefer(WorkPhase.Send, _send))
            Send();
    }

    private void Send()
    {
        while (true)
        {
            int length;
            lock (_lock)
            {
                (_output, _outputBeingSent) = (_outputBeingSent, _output);
                length = _outputLength;
                Volatile.Write(ref _outputLength, 0);
                if (length == 0 || _reason is not null)
                {
                    _isSending = false;
                    Monitor.PulseAll(_lock);
                    return;
                }
            }

            ReadOnlySpan<byte> left = _outputBeingSent.AsSpan(0, length);
            while (left.Length > 0)
            {
                long count = LinuxSocket.Send(_socket.SafeHandle, left, more: false);
                if (count <= 0)
                {
                    Break($"{_address}: {Errno.Of(count).Describe()}");
                    break; // the next round ends the sending
                }

                left = left[(int)count..];
            }
        }
    }

    /// <summary>Ends it; requests that are under way go back to the owner.</summary>
    public void Dispose() => Break($"{_address}: the connection is not needed any more");

    /// <summary>The receiving thread.</summary>
    private void ReceiveAll()
    {
        string reason;
        DeferredWork.Begin(); // a batch is what one receive brings
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
        _replies.Dispose();
        var left = new List<RemoteRequest>();
        lock (_lock)
        {
            while (_isSending)
                Monitor.Wait(_lock); // the sender uses the socket
            left.AddRange(_slots.OfType<RemoteRequest>());
            Array.Clear(_slots);
            _socket.Dispose();
        }

        _broken(this, _reason!, left);
    }

    private void ReceiveReply()
    {
        NbdReplyHeader header = _replies.ReceiveHeader();
        int slot = (int)(uint)header.Cookie;
        bool isKnown = (uint)slot < MaxUnderWay && _generations[slot] == header.Cookie >> 32;
        RemoteRequest request = (isKnown ? _slots[slot] : null)
            ?? throw RemoteHandshake.Broken(_address, "a reply to a request that was never made");
        if (!_replies.ReceiveBody(request, header))
            return;

        lock (_lock)
        {
            _slots[slot] = null;
            Volatile.Write(ref _answeredNumber, Math.Max(_answeredNumber, _numbers[slot]));
            _numbers[slot] = 0;
            _free.Push(slot);
            Volatile.Write(ref _freeCount, _free.Count);
        }

        if (request.Failure is { } failure)
        {
            string operation = request.Extents is null ? "read" : "block status";
            request.Fail(
                DiskError.Io, $"{_address}: {operation} of {request.Length} bytes at {request.Offset}: {failure}");
        }
        else
        {
            request.Succeed();
        }

        _freed();
    }

    /// <summary>
    /// Breaks the connection if requests are under way and nothing has arrived for this time, or if a request has
    /// waited for this time while younger ones were answered. (A slow line alone makes requests wait in order.)
    /// To be called now and then, by one thread.
    /// </summary>
    public void BreakIfSilent(TimeSpan time)
    {
        if (_time.GetElapsedTime(_passedAt) > time)
        {
            bool isPassed;
            lock (_lock)
                isPassed = Array.Exists(_numbers, number => number != 0 && number < _passedNumber);
            if (isPassed)
            {
                Break($"{_address}: the server has not answered a read for {time.TotalSeconds:0} seconds, and others"
                    + " since: this is a fault of that server");
                return;
            }

            (_passedAt, _passedNumber) = (_time.GetTimestamp(), Volatile.Read(ref _answeredNumber));
        }

        if (UnderWay > 0 && IsQuiet(time) && _time.GetElapsedTime(Volatile.Read(ref _busySince)) > time)
        {
            IsSilent = true;
            Break($"{_address}: the server has been silent for {time.TotalSeconds:0} seconds");
        }
    }

    /// <summary>Breaks it, if nothing has arrived for so long, whether requests are under way or not.</summary>
    public void BreakIfQuiet(TimeSpan time)
    {
        if (IsQuiet(time))
            Break($"{_address}: quiet, like the connection that has timed out");
    }

    private bool IsQuiet(TimeSpan time)
        => _replies.WaitsSince is var since and not RemoteReplyReader.Never && _time.GetElapsedTime(since) > time;

    /// <summary>Breaks it, if it is not broken yet.</summary>
    private void Break(string reason)
    {
        lock (_lock)
        {
            if (_reason is not null)
                return;
            Volatile.Write(ref _reason, reason);
            try
            {
                // Waits for nobody. The receiver and the sender come back; the receiver disposes of the socket later.
                _socket.Shutdown(SocketShutdown.Both);
            }
            catch (SocketException)
            {
                // The peer has closed it already.
            }
        }
    }
}
