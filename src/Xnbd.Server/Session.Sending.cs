using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;
using Xnbd.Storage.Threads;

namespace Xnbd.Server;

/// <content>
/// Replies: those of the session's thread are gathered in one buffer; those of slow requests queue up in
/// <c>_finished</c>, and are sent by whichever thread holds the sending side, without waiting. When the socket is full
/// the session's thread is woken, and waits for it as well.
/// </content>
internal sealed partial class Session
{
    private readonly object _sending = new();
    private readonly Queue<SlowRequest> _finished = new();
    private int _inFlight;
    private bool _awaitsFinished;
    private volatile bool _isSendBlocked;
    private volatile bool _isBroken; // nothing can be sent any more
    private readonly StallClock _stall;

    // Replies go out in the order of the requests. It changes only while nothing is in flight.
    private bool _isInOrder;
    private readonly Queue<SlowRequest> _order = new(); // then: those in flight; guarded by _finished, as all of these
    private readonly HashSet<ulong> _cookies = []; // else: the cookies of those whose reply is not ready to be sent
    private bool _mustQueue; // the request at hand must be answered after those in flight; the session's thread's own

    /// <summary>
    /// Lets other threads wake the session's one from its poll. There is one only while it may be needed: so an idle
    /// session takes one descriptor. Made by the session's thread; others use it while they hold <c>_sending</c>, and a
    /// slow request that is not sent yet.
    /// </summary>
    private LinuxEvent? _wakeUp;

    private NativeBuffer? _output;
    private int _outputLength;
    private readonly List<ulong> _gathered = []; // the cookies of all requests since the output was empty

    // Not readonly: a struct that changes.
    private AdaptivePoll _poll;

    /// <summary>Room for <paramref name="length"/> bytes of reply; what is gathered is sent first if need be.</summary>
    private bool TryReserve(int length, out Span<byte> room)
    {
        _output ??= _services.Buffers.Rent(ServerLimits.OutputBuffer);
        bool isFull = _outputLength > 0 && _outputLength + length > ServerLimits.GatheredReplies;
        if ((isFull && !FlushReplies()) || (_mustQueue && !WaitForTurn()))
        {
            room = default;
            return false;
        }

        room = _output.Slice(_outputLength, length);
        return true;
    }

    /// <summary>Waits until the replies of all that is in flight have gone out.</summary>
    /// <returns>False when the connection is broken.</returns>
    private bool WaitForTurn()
    {
        _mustQueue = false;
        return FlushReplies() && WaitUntilFinished(0);
    }

    /// <summary>Sends all gathered replies, waiting for the client as long as it takes.</summary>
    /// <returns>False when the connection is broken.</returns>
    private bool FlushReplies()
    {
        Batch.Flush();
        bool sent = true;
        if (_outputLength > 0)
        {
            lock (_sending)
                sent = SendFinishedWaiting() && SendOutput(more: false);
        }

        SendFinished(); // what others left while this thread was sending
        return sent;
    }

    /// <summary>Sends gathered replies, then a part of a file, with nothing in between.</summary>
    /// <param name="file">The file.</param>
    /// <param name="offset">Of the part, in bytes.</param>
    /// <param name="length">Of the part, in bytes.</param>
    /// <param name="padded">Bytes at the end that could not be had from the file: zeroes went out in their place.</param>
    private bool FlushRepliesAndFile(SafeFileHandle file, long offset, int length, out int padded)
    {
        bool sent;
        padded = 0;
        Batch.Flush();
        lock (_sending)
        {
            sent = SendFinishedWaiting() && SendOutput(more: true) && SendFile(file, offset, length, out padded);
            if (sent && padded > 0)
                sent = _structured ? SendZeroes(padded) : GiveUp();
        }

        SendFinished();
        return sent;

        bool GiveUp()
        {
            // A simple reply's header is out, and cannot become an error: only a disconnect says that its data failed.
            _isBroken = true;
            _connection.Abort("the image failed amid a reply");
            return false;
        }
    }

    private bool SendZeroes(int length)
    {
        while (length > 0)
        {
            int part = Math.Min(length, _output!.Length);
            _output.Slice(0, part).Clear();
            _outputLength = part;
            if (!SendOutput(more: true))
                return false;
            length -= part;
        }

        return true;
    }

    /// <summary>
    /// A slow request's disk operation has ended: its reply is built, and sent if nobody else is sending. On any thread.
    /// </summary>
    public void Finish(SlowRequest slow)
    {
        _replies.Build(slow);
        lock (_finished)
        {
            // Its cookie is free from now on, before the client can know that: all later replies go out behind this one.
            _cookies.Remove(slow.Request.Cookie);
            slow.IsFinished = true;
            if (!_isInOrder)
                _finished.Enqueue(slow);
            while (_order.TryPeek(out SlowRequest? oldest) && oldest.IsFinished)
                _finished.Enqueue(_order.Dequeue());
            if (_awaitsFinished)
                Monitor.Pulse(_finished);
        }

        if (!Batch.TryPutOff(_sendFinished ??= SendFinished))
            SendFinished();
    }

    /// <summary>Sends finished replies as far as the socket takes them at once. Whoever is sending already goes on with them.</summary>
    private void SendFinished()
    {
        while (!_isSendBlocked && HasFinished())
        {
            if (!Monitor.TryEnter(_sending))
                return;
            bool isBlocked = false;
            try
            {
                while (!isBlocked && TryPeekFinished(out SlowRequest? slow))
                {
                    isBlocked = !ProgressAll(slow, _isBroken ? 0 : SendSome(slow));
                }

                if (isBlocked)
                {
                    // Inside the lock: the session cannot end, and dispose of the event, before it has had the lock itself.
                    _isSendBlocked = true;
                    Interlocked.MemoryBarrier(); // the session's thread sees that, or this one its event
                    Volatile.Read(ref _wakeUp)?.Signal();
                }
            }
            finally
            {
                Monitor.Exit(_sending);
            }
        }
    }

    /// <summary>Sends all finished replies, waiting for the client; of a broken connection they are dropped. The sending side is held.</summary>
    /// <returns>False when the connection is broken.</returns>
    private bool SendFinishedWaiting()
    {
        while (TryPeekFinished(out SlowRequest? slow))
        {
            if (!Progress(slow, _isBroken ? 0 : LinuxSocket.Send(_connection.Handle, slow.UnsentBytes, more: false)))
                _ = IsStalled();
        }

        _isSendBlocked = false;
        return !_isBroken;
    }

    /// <summary>Sends the next finished reply; or several of them with one call, if they are small: a copy costs less.</summary>
    private long SendSome(SlowRequest first)
    {
        lock (_finished)
        {
            if (_finished.Count < 2)
                return LinuxSocket.SendNow(_connection.Handle, first.UnsentBytes);
        }

        NativeBuffer buffer = _services.Buffers.Rent(GatherBytes);
        int length = Gather(buffer.Slice(0, GatherBytes));
        long count = LinuxSocket.SendNow(_connection.Handle, length > 0 ? buffer.Slice(0, length) : first.UnsentBytes);
        _services.Buffers.Return(buffer);
        return count;
    }

    /// <summary>Copies the next finished replies, one behind the other, as many as there is room for.</summary>
    private int Gather(Span<byte> room)
    {
        int length = 0;
        lock (_finished)
        {
            foreach (SlowRequest slow in _finished)
            {
                ReadOnlySpan<byte> reply = slow.UnsentBytes;
                if (reply.Length > room.Length - length)
                    break;
                reply.CopyTo(room[length..]);
                length += reply.Length;
            }
        }

        return length;
    }

    /// <summary>The most that is gathered of finished replies: fifteen of 4 KiB and their headers.</summary>
    private const int GatherBytes = 64 * 1024;

    private Action? _sendFinished;

    /// <summary>Notes what a send of one or several finished replies achieved.</summary>
    /// <returns>False when the socket is full.</returns>
    private bool ProgressAll(SlowRequest first, long count)
    {
        if (count <= first.Unsent.Length || _isBroken)
            return Progress(first, count);
        while (count > 0 && TryPeekFinished(out SlowRequest? slow))
        {
            int part = (int)Math.Min(count, slow.Unsent.Length);
            count -= part;
            _ = Progress(slow, part);
        }

        return true;
    }

    /// <summary>Notes what a send of a finished reply achieved; of a broken connection the reply is dropped.</summary>
    /// <returns>False when the socket is full.</returns>
    private bool Progress(SlowRequest slow, long count)
    {
        if (count == -(long)Errno.EAGAIN)
            return false;
        if (count < 0)
            Broken((Errno)(-count));

        _stall.Moved(count);
        slow.Sent(_isBroken ? slow.Unsent.Length : (int)count);
        if (slow.Unsent.Length == 0)
        {
            lock (_finished)
            {
                _finished.Dequeue();
                if (_finished.Count == 0)
                    _stall.Stop();
            }

            Release(slow);
        }

        return true;
    }

    /// <summary>Notes that nothing more can be sent.</summary>
    private bool Broken(Errno errno)
    {
        _isBroken = true;
        return _connection.End($"sending: {errno.Describe()}");
    }

    private bool SendOutput(bool more)
    {
        ReadOnlySpan<byte> data = _output!.Slice(0, _outputLength);
        _outputLength = 0;
        while (data.Length > 0)
        {
            long count = LinuxSocket.Send(_connection.Handle, data, more);
            if (count == -(long)Errno.EAGAIN)
            {
                if (InFlight > 0 && IsStalled())
                    return false;
                continue;
            }

            if (count < 0)
                return Broken((Errno)(-count));
            _stall.Moved(count);
            data = data[(int)count..];
        }

        return true;
    }

    /// <param name="file">The file.</param>
    /// <param name="offset">Of the part, in bytes.</param>
    /// <param name="length">Of the part, in bytes.</param>
    /// <param name="missing">Bytes at the end that the file did not give.</param>
    /// <returns>False when the connection is broken.</returns>
    private bool SendFile(SafeFileHandle file, long offset, int length, out int missing)
    {
        missing = length;
        while (missing > 0)
        {
            long count = LinuxSocket.SendFile(_connection.Handle, file, offset, missing);
            if (count == -(long)Errno.EAGAIN)
            {
                if (InFlight > 0 && IsStalled())
                    return false;
                continue;
            }

            if (count < 0 && LinuxSocket.IsOfSocket((Errno)(-count)))
                return Broken((Errno)(-count));
            if (count <= 0)
                return true; // the end of a file that became shorter, or a medium that failed
            _stall.Moved(count);
            offset += count;
            missing -= (int)count;
        }

        return true;
    }

    private bool HasFinished()
    {
        lock (_finished)
            return _finished.Count > 0;
    }

    private bool TryPeekFinished(out SlowRequest slow)
    {
        lock (_finished)
            return _finished.TryPeek(out slow!);
    }

    /// <summary>Slow requests whose replies have not been sent.</summary>
    private int InFlight
    {
        get
        {
            lock (_finished)
                return _inFlight;
        }
    }

    /// <summary>Whether a slow request with this cookie is not ready to be answered yet.</summary>
    private bool IsInFlight(ulong cookie)
    {
        lock (_finished)
            return _cookies.Contains(cookie);
    }

    /// <summary>A slow request has been answered, or dropped.</summary>
    private void Release(SlowRequest slow)
    {
        GiveBack(slow);
        lock (_finished)
        {
            _inFlight--;
            if (_awaitsFinished)
                Monitor.Pulse(_finished);
        }
    }

    /// <summary>Gives back what a slow request held, which is not, or not any more, in flight.</summary>
    private void GiveBack(SlowRequest slow)
    {
        if (slow.Buffer is { } buffer)
            _services.Buffers.Return(buffer);
        if (slow.ClaimedBytes > 0)
            _services.Budget.Release(slow.ClaimedBytes);
        slow.Return();
    }

    /// <summary>Sends what is finished until at most <paramref name="mostInFlight"/> slow requests are left.</summary>
    /// <returns>False when the connection is broken; then, too, no more are left than that.</returns>
    private bool WaitUntilFinished(int mostInFlight)
    {
        while (true)
        {
            lock (_finished)
            {
                _awaitsFinished = true;
                while (_inFlight > mostInFlight && _finished.Count == 0)
                    Monitor.Wait(_finished);
                _awaitsFinished = false;
                if (_inFlight <= mostInFlight)
                    break;
            }

            lock (_sending)
                SendFinishedWaiting();
        }

        SendFinished(); // what came while others were being sent
        return !_isBroken;
    }
}
