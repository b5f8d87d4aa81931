using System.Diagnostics;
using Xnbd.Linux;
using Xnbd.Protocol;

namespace Xnbd.Server;

/// <summary>
/// What the client sends: requests and small payloads in one buffer, large payloads straight in their place. Only the
/// session's thread uses it, except <see cref="Stop"/>.
/// <para>
/// While the session's thread waits here, it also sends what other threads could not. Before it waits for the rest of a
/// payload, it sends what is gathered: the client may wait for earlier replies before it sends on.
/// </para>
/// </summary>
internal sealed class SessionInput(
    Connection connection, SessionServices services, ReplyOutput output, ReplySender sender)
{
    // Received and not yet taken: _buffer[_head.._tail].
    private NativeBuffer? _buffer;
    private int _head;
    private int _tail;
    private bool _expectsLargeWrite;
    private AdaptivePoll _poll; // not readonly: a struct that changes
    private volatile bool _isStopping;

    /// <summary>Bytes that have been received and not yet taken.</summary>
    public int Length => _tail - _head;

    /// <summary>
    /// Receives nothing more, from any thread. The caller signals <see cref="SessionServices.Stopping"/> afterwards.
    /// </summary>
    public void Stop() => _isStopping = true;

    /// <summary>The next bytes, which stay there to be taken.</summary>
    /// <param name="length">Length in bytes, at most <see cref="Length"/>.</param>
    public ReadOnlySpan<byte> Peek(int length) => _buffer!.Slice(_head, length);

    /// <summary>Takes the next bytes. They are valid until the next receive.</summary>
    /// <param name="length">Length in bytes, at most <see cref="Length"/>.</param>
    public Span<byte> Take(int length)
    {
        Span<byte> taken = _buffer!.Slice(_head, length);
        _head += length;
        return taken;
    }

    /// <summary>
    /// Waits for more input. It polls for a short time while that pays off. Then it blocks in the receive itself, the
    /// cheapest way to wait. After a while without input, or when pending requests may need this thread, it gives the
    /// buffers back and waits for all that may happen.
    /// </summary>
    /// <returns>False when no more will come.</returns>
    public bool ReceiveMore()
    {
        bool isIdle = false;
        while (!_isStopping)
        {
            _buffer ??= services.Buffers.Rent(ServerLimits.InputBuffer);
            Compact();

            // After a large write the next one is likely: its header alone first, so that its payload lands in place.
            int room = _expectsLargeWrite && _tail < NbdSize.Request ? NbdSize.Request - _tail : _buffer.Length - _tail;
            long count = Receive(_buffer.Slice(_tail, room), mayBlock: !isIdle && sender.Pending.IsEmpty);
            if (count > 0)
            {
                _tail += (int)count;
                return true;
            }

            if (Errno.Of(count) != Errno.EAGAIN)
                return connection.End(count == 0 ? "closed by client" : Errno.Of(count).Describe());

            isIdle = true;
            _expectsLargeWrite = false;
            ReleaseIdleBuffers();
            if (!WaitForInput())
                return false;
        }

        return connection.End("server is stopping");
    }

    /// <summary>
    /// Receives the payload of a large write: what the buffer holds of it, then the rest straight in its place.
    /// </summary>
    /// <returns>False when it does not arrive.</returns>
    public bool ReceivePayload(Span<byte> payload)
    {
        int buffered = Math.Min(Length, payload.Length);
        Take(buffered).CopyTo(payload);
        payload = payload[buffered..];
        _expectsLargeWrite = true;

        if (payload.Length > 0 && !output.Flush())
            return false;
        while (payload.Length > 0)
        {
            // Over TCP the rest is mostly there already, and a poll takes the socket away from the client that sends.
            long count = Receive(payload, mayBlock: true, mayPoll: connection.IsUnix);
            if (count > 0)
                payload = payload[(int)count..];
            if (payload.Length > 0 && !MayReceiveOn(count, holdsBytes: true))
                return false;
        }

        StopStallClock();
        return true;
    }

    /// <summary>Passes over a payload that nobody will use.</summary>
    /// <returns>False when it does not arrive.</returns>
    public bool DrainPayload(uint length)
    {
        int buffered = (int)Math.Min(Length, length);
        Take(buffered);
        long left = length - buffered;
        if (left == 0)
            return true;
        if (!output.Flush())
            return false;

        Debug.Assert(_head == _tail, "what is left of the payload is not in the buffer");
        _head = _tail = 0;
        while (left > 0)
        {
            Span<byte> scratch = _buffer!.Slice(0, (int)Math.Min(left, _buffer.Length));
            long count = Receive(scratch, mayBlock: true);
            left -= Math.Max(0, count);
            if (count < scratch.Length && !MayReceiveOn(count, holdsBytes: !sender.Pending.IsEmpty))
                return false;
        }

        StopStallClock();
        return true;
    }

    /// <summary>Drops what has not been taken, and gives the buffer back.</summary>
    public void Release()
    {
        _head = _tail = 0;
        if (_buffer is null)
            return;
        services.Buffers.Return(_buffer);
        _buffer = null;
    }

    /// <returns>As <see cref="LinuxSocket.ReceiveNow"/>.</returns>
    private long Receive(Span<byte> destination, bool mayBlock, bool mayPoll = true)
    {
        if (mayPoll && _poll.IsWorthwhile)
        {
            long count = _poll.Poll(connection.Handle, destination);
            if (Errno.Of(count) != Errno.EAGAIN)
                return count;
        }

        if (!mayBlock)
            return LinuxSocket.ReceiveNow(connection.Handle, destination);
        long start = Stopwatch.GetTimestamp();
        AdaptivePoll.NoteBlocked();
        long received = LinuxSocket.Receive(connection.Handle, destination);
        AdaptivePoll.NoteAwake();
        _poll.NoteBlockedTime(Stopwatch.GetElapsedTime(start));
        return received;
    }

    /// <summary>Blocks until the client sends; meanwhile sends what other threads could not.</summary>
    /// <returns>False when the connection was ended.</returns>
    private bool WaitForInput()
    {
        while (true)
        {
            bool canBeWoken = sender.PrepareWakeUp();
            bool isBlocked = sender.IsBlocked;
            AdaptivePoll.NoteBlocked();
            Readiness ready = LinuxSocket.Wait(
                connection.Handle,
                forReading: true,
                forWriting: isBlocked,
                isBlocked ? ServerLimits.StallCheckMilliseconds : canBeWoken ? -1 : ServerLimits.LookAgainMilliseconds,
                sender.WakeUp,
                services.Stopping);
            AdaptivePoll.NoteAwake();
            if ((ready & Readiness.Woken) != 0)
                sender.WakeUp?.Reset();
            if ((ready & Readiness.Writable) != 0)
                sender.Retry();
            if (isBlocked && sender.EndIfStalled())
                return false;

            if ((ready & (Readiness.Readable | Readiness.Broken)) != 0 || _isStopping)
                return true; // the next receive tells what it is
        }
    }

    /// <summary>After a receive that did not bring all that is due: whether to wait for the rest.</summary>
    /// <param name="count">What the receive answered.</param>
    /// <param name="holdsBytes">The session holds bytes of the budget.</param>
    private bool MayReceiveOn(long count, bool holdsBytes)
    {
        if (count == 0 || Errno.Of(count) is not (Errno.None or Errno.EAGAIN))
            return connection.End(count == 0 ? "closed by client amid a write" : Errno.Of(count).Describe());
        if (_isStopping)
            return connection.End("server is stopping");
        sender.Stall.Moved(Math.Max(0, count));
        if (holdsBytes && sender.EndIfStalled())
            return false;

        if (sender.IsBlocked)
            sender.Retry(); // the client may not send on before it has its replies
        return !sender.IsBroken;
    }

    /// <summary>The client has sent its payload. The clock goes on if the client owes the taking of replies.</summary>
    private void StopStallClock()
    {
        if (!sender.IsBlocked)
            sender.Stall.Stop();
    }

    private void Compact()
    {
        int length = Length;
        if (length > 0 && _head > 0)
            _buffer!.Slice(_head, length).CopyTo(_buffer.Slice(0, length));
        _head = 0;
        _tail = length;
    }

    private void ReleaseIdleBuffers()
    {
        if (Length == 0)
            Release();
        Debug.Assert(output.IsEmpty, "replies are sent before a session waits");
        output.Release();
    }
}
