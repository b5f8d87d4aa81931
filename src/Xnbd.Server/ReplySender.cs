using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;
using Xnbd.Storage.Threads;

namespace Xnbd.Server;

/// <summary>
/// The sending side of a connection. The session's thread sends what it has gathered, waiting for the client as long as
/// it takes. Replies of pending requests are sent by whichever thread holds the sending side, without waiting. When the
/// socket is full, the session's thread is woken and waits for it.
/// <para>
/// Any thread may call <see cref="Finish"/> and <see cref="SendFinished"/>; all other members are for the session's
/// thread. Whoever sends holds <c>_sending</c>. While it is held, replies are dequeued: the lock of
/// <see cref="PendingRequests"/> comes after it. The session's thread waits for its client under this lock. That holds
/// nobody up: other threads only try to take it.
/// </para>
/// </summary>
internal sealed class ReplySender : IDisposable
{
    private static readonly byte[] s_zeroes = new byte[64 * 1024];

    private readonly object _sending = new();
    private readonly Connection _connection;
    private readonly SessionServices _services;
    private readonly ReplyBuilder _builder;
    private readonly Action _sendFinished;
    private readonly CancellationTokenSource _gone = new();
    private volatile bool _isBlocked;
    private volatile bool _isBroken;

    /// <summary>
    /// Lets other threads wake the session's thread from its poll. It exists only while it may be needed, so that an
    /// idle session takes one descriptor. The session's thread makes it and gives it back. Others use it while they
    /// hold <c>_sending</c> and a request is in flight.
    /// </summary>
    private LinuxEvent? _wakeUp;

    public ReplySender(Connection connection, SessionServices services, ReplyBuilder builder, bool keepsOrder)
    {
        _connection = connection;
        _services = services;
        _builder = builder;
        _sendFinished = SendFinished;
        Pending = new PendingRequests(keepsOrder);
        Stall = new StallClock(services.Budget, services.Time);
    }

    /// <summary>Cancelled when nothing reaches the client any more.</summary>
    public CancellationToken Gone => _gone.Token;

    /// <summary>The requests whose replies have not been sent.</summary>
    public PendingRequests Pending { get; }

    /// <summary>Runs while the session waits for its client.</summary>
    public StallClock Stall { get; }

    /// <summary>The socket is full: nothing is sent without waiting until <see cref="Retry"/>.</summary>
    public bool IsBlocked => _isBlocked;

    /// <summary>Nothing can be sent any more.</summary>
    public bool IsBroken => _isBroken;

    /// <summary>The event that others signal when the socket is full; null when there is none.</summary>
    public LinuxEvent? WakeUp => _wakeUp;

    /// <summary>
    /// The disk's operation of a pending request has ended: builds the reply, and sends it if nobody else is sending.
    /// </summary>
    public void Finish(PendingRequest pending)
    {
        _builder.Build(pending);
        Pending.Finish(pending);
        if (!DeferredWork.TryDefer(WorkPhase.Send, _sendFinished))
            SendFinished();
    }

    /// <summary>
    /// Sends finished replies as far as the socket takes them at once. A thread that is already sending goes on with
    /// them.
    /// </summary>
    public void SendFinished()
    {
        while (!_isBlocked && Pending.FinishedCount > 0)
        {
            if (!Monitor.TryEnter(_sending))
                return;
            bool isBlocked = false;
            try
            {
                while (!isBlocked && Pending.TryPeek(out PendingRequest? pending))
                    isBlocked = !NoteSentAll(pending, _isBroken ? 0 : SendSome(pending));

                if (isBlocked)
                {
                    // Inside the lock: the session must have the lock once before it can end and dispose of the event.
                    _isBlocked = true;
                    Interlocked.MemoryBarrier(); // the session's thread sees _isBlocked, or this one sees its event
                    Volatile.Read(ref _wakeUp)?.Signal();
                }
            }
            finally
            {
                Monitor.Exit(_sending);
            }
        }
    }

    /// <summary>The socket may have room again: tries to send what could not be sent.</summary>
    public void Retry()
    {
        _isBlocked = false;
        SendFinished();
    }

    /// <summary>Sends all finished replies, then data, waiting for the client.</summary>
    /// <returns>False when the connection is broken.</returns>
    public bool Send(ReadOnlySpan<byte> data)
    {
        bool sent;
        lock (_sending)
            sent = SendFinishedWaiting() && SendAll(data, more: false);
        SendFinished(); // what others left while this thread was sending
        return sent;
    }

    /// <summary>
    /// Sends all finished replies, then data and a part of a file with nothing in between, waiting for the client.
    /// </summary>
    /// <param name="data">What goes out first.</param>
    /// <param name="file">The file.</param>
    /// <param name="offset">Offset of the part in bytes.</param>
    /// <param name="length">Length of the part in bytes.</param>
    /// <param name="mayPad"> Zeroes may go out in the place of bytes that cannot be read; otherwise the connection is
    /// broken off. </param>
    /// <param name="padded">Bytes at the end of the part that could not be read: zeroes went out in their
    /// place.</param>
    /// <returns>False when the connection is broken.</returns>
    public bool SendWithFile(
        ReadOnlySpan<byte> data, SafeFileHandle file, long offset, int length, bool mayPad, out int padded)
    {
        bool sent;
        padded = 0;
        lock (_sending)
        {
            sent = SendFinishedWaiting() && SendAll(data, more: true) && SendFile(file, offset, length, out padded);
            if (sent && padded > 0)
                sent = mayPad ? SendZeroes(padded) : GiveUp();
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

    /// <summary>Sends what is finished until at most <paramref name="maxInFlight"/> requests are in flight.</summary>
    /// <returns>False when the connection is broken. Then, too, no more are in flight than that.</returns>
    public bool WaitUntilFinished(int maxInFlight)
    {
        while (Pending.WaitForReply(maxInFlight, ServerLimits.ClientCheckTime))
        {
            if (Pending.FinishedCount > 0)
            {
                lock (_sending)
                    SendFinishedWaiting();
            }
            else
            {
                _ = EndIfGone();
            }
        }

        SendFinished(); // what came while others were being sent
        return !_isBroken;
    }

    /// <summary>
    /// Ends the connection of a client that is gone, and the waiting of its requests for another machine: they would
    /// keep others waiting for their places.
    /// </summary>
    /// <returns>True when nothing reaches the client any more.</returns>
    public bool EndIfGone()
    {
        if (!_isBroken && !_connection.IsClientGone())
            return false;
        _connection.End("closed by client before its replies");
        _isBroken = true;
        _gone.Cancel(); // requests end on this thread, which holds no lock
        return true;
    }

    /// <summary>Ends the connection of a client that keeps others waiting for bytes and hardly moves its own.</summary>
    /// <returns>True when it was ended.</returns>
    public bool EndIfStalled()
    {
        if (!Stall.IsStalled())
            return false;
        _isBroken = true;
        _connection.Abort("too slow, while others wait for the memory that it holds");
        return true;
    }

    /// <summary>
    /// Makes the event by which other threads wake this one, if they may have to; otherwise gives it back.
    /// </summary>
    /// <returns>False when they may have to, and no descriptor is left for an event.</returns>
    public bool PrepareWakeUp()
    {
        bool isNeeded = Pending.Count > 0;
        if (isNeeded && _wakeUp is null)
        {
            Volatile.Write(ref _wakeUp, LinuxEvent.TryCreate());
            Interlocked.MemoryBarrier(); // who did not see the event has set _isBlocked before this thread looks
        }
        else if (!isNeeded && _wakeUp is { } idle)
        {
            lock (_sending)
                _wakeUp = null;
            idle.Dispose();
        }

        return !isNeeded || _wakeUp is not null;
    }

    /// <summary>Gives the event back. No request is in flight.</summary>
    public void Dispose()
    {
        _wakeUp?.Dispose();
        _gone.Dispose();
    }

    /// <summary>
    /// Sends all finished replies, waiting for the client; those of a broken connection are dropped. The lock is held.
    /// </summary>
    /// <returns>False when the connection is broken.</returns>
    private bool SendFinishedWaiting()
    {
        while (Pending.TryPeek(out PendingRequest? pending))
        {
            long count = _isBroken ? 0 : LinuxSocket.Send(_connection.Handle, pending.UnsentBytes, more: false);
            if (!NoteSent(pending, count))
                _ = EndIfStalled();
        }

        _isBlocked = false;
        return !_isBroken;
    }

    /// <summary>
    /// Sends the next finished reply, or several small ones with one call: copying them costs less than a call.
    /// </summary>
    private long SendSome(PendingRequest first)
    {
        if (Pending.FinishedCount < 2)
            return LinuxSocket.SendNow(_connection.Handle, first.UnsentBytes);

        NativeBuffer buffer = _services.Buffers.Rent(ServerLimits.GatheredFinished);
        int length = Pending.CopyReplies(buffer.Slice(0, ServerLimits.GatheredFinished));
        long count = LinuxSocket.SendNow(_connection.Handle, length > 0 ? buffer.Slice(0, length) : first.UnsentBytes);
        _services.Buffers.Return(buffer);
        return count;
    }

    /// <summary>Notes what a send of one or several finished replies achieved.</summary>
    /// <returns>False when the socket is full.</returns>
    private bool NoteSentAll(PendingRequest first, long count)
    {
        if (count <= first.Unsent.Length || _isBroken)
            return NoteSent(first, count);
        while (count > 0 && Pending.TryPeek(out PendingRequest? pending))
        {
            int part = (int)Math.Min(count, pending.Unsent.Length);
            count -= part;
            _ = NoteSent(pending, part);
        }

        return true;
    }

    /// <summary>Notes what a send of a finished reply achieved; the reply of a broken connection is dropped.</summary>
    /// <returns>False when the socket is full.</returns>
    private bool NoteSent(PendingRequest pending, long count)
    {
        if (Errno.Of(count) == Errno.EAGAIN)
            return false;
        if (count < 0)
            Break(Errno.Of(count));

        Stall.Moved(count);
        pending.NoteSent(_isBroken ? pending.Unsent.Length : (int)count);
        if (pending.Unsent.Length == 0)
        {
            if (Pending.Dequeue())
                Stall.Stop();
            pending.Return(_services);
            Pending.Remove();
        }

        return true;
    }

    /// <summary>Notes that nothing can be sent any more.</summary>
    /// <returns>False.</returns>
    private bool Break(Errno errno)
    {
        _isBroken = true;
        return _connection.End($"sending: {errno.Describe()}");
    }

    /// <summary>Whether to try again after a send that waited for the client in vain.</summary>
    private bool MayWaitOn() => Pending.IsEmpty || !EndIfStalled();

    private bool SendAll(ReadOnlySpan<byte> data, bool more)
    {
        while (data.Length > 0)
        {
            long count = LinuxSocket.Send(_connection.Handle, data, more);
            if (Errno.Of(count) == Errno.EAGAIN)
            {
                if (!MayWaitOn())
                    return false;
                continue;
            }

            if (count < 0)
                return Break(Errno.Of(count));
            Stall.Moved(count);
            data = data[(int)count..];
        }

        return true;
    }

    private bool SendZeroes(int length)
    {
        for (; length > s_zeroes.Length; length -= s_zeroes.Length)
        {
            if (!SendAll(s_zeroes, more: true))
                return false;
        }

        return SendAll(s_zeroes.AsSpan(0, length), more: true);
    }

    /// <param name="file">The file.</param>
    /// <param name="offset">Offset of the part in bytes.</param>
    /// <param name="length">Length of the part in bytes.</param>
    /// <param name="missing">Bytes at the end of the part that could not be read.</param>
    /// <returns>False when the connection is broken.</returns>
    private bool SendFile(SafeFileHandle file, long offset, int length, out int missing)
    {
        missing = length;
        while (missing > 0)
        {
            long count = LinuxSocket.SendFile(_connection.Handle, file, offset, missing);
            if (Errno.Of(count) == Errno.EAGAIN)
            {
                if (!MayWaitOn())
                    return false;
                continue;
            }

            if (count < 0 && LinuxSocket.IsOfSocket(Errno.Of(count)))
                return Break(Errno.Of(count));
            if (count <= 0)
                return true; // the end of a file that became shorter, or a medium that failed
            Stall.Moved(count);
            offset += count;
            missing -= (int)count;
        }

        return true;
    }
}
