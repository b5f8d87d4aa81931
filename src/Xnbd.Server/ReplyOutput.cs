using System.Diagnostics;
using System.Runtime.InteropServices;
using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;
using Xnbd.Protocol;
using Xnbd.Storage;
using Xnbd.Storage.Threads;

namespace Xnbd.Server;

/// <summary>
/// The replies that the session's thread gives at once: they are gathered in one buffer and sent with one call. Only
/// the session's thread uses it.
/// <para>
/// A request is not answered before those that its client expects to be answered first. A client of the old style tells
/// replies apart by their order, so it gets them in that order. A client that gives several requests one cookie relies
/// on their order, too: from then on it gets all replies in order.
/// </para>
/// </summary>
/// <param name="sender">Sends what is gathered.</param>
/// <param name="builder">Builds errors.</param>
/// <param name="buffers">For the buffer, which exists only while it is needed.</param>
/// <param name="structured">Reads are answered with structured replies.</param>
internal sealed class ReplyOutput(ReplySender sender, ReplyBuilder builder, BufferPool buffers, bool structured)
{
    private readonly List<ulong> _cookies = []; // of all requests since the output was empty; the last one is at hand
    private NativeBuffer? _buffer;
    private int _length;

    /// <summary>The request at hand must be answered after those in flight.</summary>
    public bool MustQueue { get; private set; }

    /// <summary>Requests whose replies come from other threads.</summary>
    public int InFlight => sender.Pending.Count;

    /// <summary>Nothing is gathered.</summary>
    public bool IsEmpty => _length == 0;

    /// <summary>A request is at hand: puts it into its place in the order of replies.</summary>
    /// <returns>False when the connection is broken.</returns>
    public bool BeginRequest(ulong cookie)
    {
        MustQueue = false;
        if (_length == 0)
            _cookies.Clear();
        _cookies.Add(cookie);
        PendingRequests pending = sender.Pending;
        if (pending.IsEmpty)
            return true;
        if (!pending.KeepsOrder && pending.Contains(cookie))
        {
            if (!FinishAll())
                return false;
            pending.KeepOrder();
        }

        MustQueue = pending.KeepsOrder && pending.Count > 0;
        return true;
    }

    /// <summary>
    /// The request at hand becomes pending. Another thread may send its reply, so earlier replies that it must not
    /// overtake go out first.
    /// </summary>
    /// <returns>False when the connection is broken.</returns>
    public bool BeginPending(ulong cookie) => !IsOrdered(cookie) || Flush();

    /// <summary>The reply to the request at hand must not overtake those that are gathered.</summary>
    public bool IsOrdered(ulong cookie)
        => sender.Pending.KeepsOrder
            || (_length > 0 && CollectionsMarshal.AsSpan(_cookies)[..^1].Contains(cookie));

    /// <summary>Makes room for a reply. What is gathered is sent first if the room is needed.</summary>
    /// <param name="length">Length of the room in bytes; what is used of it is told to <see cref="Advance"/>.</param>
    /// <param name="room">The room; it is valid until the next call of another member.</param>
    /// <returns>False when the connection is broken.</returns>
    public bool TryReserve(int length, out Span<byte> room)
    {
        _buffer ??= buffers.Rent(ServerLimits.OutputBuffer);
        bool isFull = _length > 0 && _length + length > ServerLimits.OutputBuffer;
        if ((isFull && !Flush()) || (MustQueue && !WaitForTurn()))
        {
            room = default;
            return false;
        }

        room = _buffer.Slice(_length, length);
        return true;
    }

    /// <summary>Bytes were written into the room that was reserved last.</summary>
    public void Advance(int count) => _length += count;

    /// <summary>Sends what is gathered, waiting for the client as long as it takes.</summary>
    /// <returns>False when the connection is broken.</returns>
    public bool Flush()
    {
        DeferredWork.Run();
        if (_length > 0)
            return sender.Send(TakeGathered());
        sender.SendFinished(); // what others left while this thread was sending
        return true;
    }

    /// <summary>Sends what is gathered, then a part of a file, with nothing in between.</summary>
    /// <param name="file">The file.</param>
    /// <param name="offset">Offset of the part in bytes.</param>
    /// <param name="length">Length of the part in bytes.</param>
    /// <param name="padded">Bytes at the end of the part that could not be read: zeroes went out in their
    /// place.</param>
    /// <returns>False when the connection is broken.</returns>
    public bool FlushWithFile(SafeFileHandle file, long offset, int length, out int padded)
    {
        DeferredWork.Run();
        return sender.SendWithFile(TakeGathered(), file, offset, length, mayPad: structured, out padded);
    }

    /// <summary>Sends what is gathered, and waits until the replies of all that is in flight have been sent.</summary>
    /// <returns>False when the connection is broken.</returns>
    public bool FinishAll() => Finish(maxInFlight: 0);

    /// <summary>Sends what is gathered, and waits until no more than some requests are in flight.</summary>
    /// <returns>False when the connection is broken.</returns>
    public bool Finish(int maxInFlight) => Flush() && sender.WaitUntilFinished(maxInFlight);

    /// <summary>Gathers a reply without data.</summary>
    /// <returns>False when the connection is broken.</returns>
    public bool ReplySuccess(in NbdRequest request)
    {
        if (!TryReserve(NbdSize.StructuredReply, out Span<byte> room))
            return false;
        _length += request.Command == NbdCommand.Read && structured
            ? NbdReply.WriteChunkHeader(room, NbdChunkFlags.Done, NbdChunkType.None, request.Cookie, 0)
            : NbdReply.WriteSimple(room, NbdError.None, request.Cookie);
        return true;
    }

    /// <summary>Gathers the reply to a request whose disk failed, and logs why.</summary>
    /// <returns>False when the connection is broken.</returns>
    public bool ReplyFailure(in NbdRequest request, DiskException failure)
    {
        NbdError error = builder.LogFailure(request, failure);
        return ReplyError(request, error, ErrorMap.Describe(error));
    }

    /// <summary>Gathers an error.</summary>
    /// <returns>False when the connection is broken.</returns>
    public bool ReplyError(in NbdRequest request, NbdError error, string message)
    {
        if (!TryReserve(NbdReply.MaxErrorChunk, out Span<byte> room))
            return false;
        _length += builder.WriteError(room, request, error, message);
        return true;
    }

    /// <summary>Gives the buffer back. Everything has been sent, or is to be dropped.</summary>
    public void Release()
    {
        _length = 0;
        if (_buffer is null)
            return;
        buffers.Return(_buffer);
        _buffer = null;
        _cookies.Clear();
        _cookies.TrimExcess();
    }

    private bool WaitForTurn()
    {
        MustQueue = false;
        return FinishAll();
    }

    private ReadOnlySpan<byte> TakeGathered()
    {
        Debug.Assert(_buffer is not null, "a reply has been reserved");
        ReadOnlySpan<byte> gathered = _buffer.Slice(0, _length);
        _length = 0;
        return gathered;
    }
}
