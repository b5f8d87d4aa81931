using System.Runtime.CompilerServices;
using Xnbd.Linux;
using Xnbd.Protocol;
using Xnbd.Storage;
using Xnbd.Storage.Threads;

namespace Xnbd.Server;

/// <summary>
/// A request that waits for the disk while its session goes on. It owns its buffer and its share of the byte budget
/// from its start until its reply has been sent. Objects are reused, so a steady load allocates nothing.
/// <para>States: the session's thread rents and fills it, and starts the disk's operation. The thread that completes
/// the operation builds the reply (<see cref="ReplySender.Finish"/>). The thread that sends the last byte gives it
/// back.</para>
/// </summary>
internal sealed class PendingRequest
{
    private static readonly Pool<PendingRequest> s_pool
        = new(() => new PendingRequest(), ServerLimits.MaxSparePendingRequests);

    private readonly Action _onCompleted;
    private readonly byte[] _smallReply = new byte[NbdReply.MaxErrorChunk];
    private ReplySender? _sender;
    private ValueTaskAwaiter _awaiter;
    private long _claimedBytes;
    private bool _isFar;
    private bool _replyIsSmall;

    private PendingRequest() => _onCompleted = OnCompleted;

    /// <summary>The request's header.</summary>
    public NbdRequest Request { get; private set; }

    /// <summary>Payload of a write, data of a read, or extents of a block status; null when there is none.</summary>
    public NativeBuffer? Buffer { get; private set; }

    /// <summary>Receives the answer to a block status; null for other requests.</summary>
    public ExtentList? Extents { get; set; }

    /// <summary>The reply is built and waits to be sent. Guarded by <see cref="PendingRequests"/>.</summary>
    public bool IsFinished { get; set; }

    /// <summary>
    /// The part of the reply that is still to be sent: its start in the buffer or the small reply, and its length.
    /// </summary>
    public (int Start, int Length) Unsent { get; private set; }

    /// <summary>Takes an object for a request.</summary>
    /// <param name="sender">Sends the reply.</param>
    /// <param name="request">The request's header.</param>
    /// <param name="buffer">A buffer, which the request owns from now on; may be null.</param>
    /// <param name="claimedBytes">Bytes of the budget, which the request owns from now on; may be 0.</param>
    /// <param name="isFar">They belong to the share of requests that may wait for another machine.</param>
    public static PendingRequest Rent(
        ReplySender sender, in NbdRequest request, NativeBuffer? buffer, long claimedBytes, bool isFar)
    {
        PendingRequest pending = s_pool.Rent();
        pending._sender = sender;
        pending.Request = request;
        pending.Buffer = buffer;
        pending._claimedBytes = claimedBytes;
        pending._isFar = isFar;
        return pending;
    }

    /// <summary>Gives back the buffer, the claim and the object itself.</summary>
    public void Return(SessionServices services)
    {
        if (Buffer is { } buffer)
            services.Buffers.Return(buffer);
        if (_claimedBytes > 0)
            services.Budget.Release(_claimedBytes, _isFar);
        _sender = null;
        Buffer = null;
        _claimedBytes = 0;
        Extents = null;
        IsFinished = false;
        s_pool.Return(this);
    }

    /// <summary>Waits for the disk's operation, on no thread. <see cref="ReplySender.Finish"/> comes next.</summary>
    public void Await(ValueTask operation)
    {
        _awaiter = operation.GetAwaiter();
        if (_awaiter.IsCompleted)
            OnCompleted();
        else
            _awaiter.UnsafeOnCompleted(_onCompleted);
    }

    /// <summary>The operation's result.</summary>
    /// <exception cref="DiskException">The operation failed.</exception>
    public void GetResult() => _awaiter.GetResult();

    /// <summary>Room for a reply without data, or for an error.</summary>
    public Span<byte> SmallReply => _smallReply;

    /// <summary>The reply is the first <paramref name="length"/> bytes of <see cref="SmallReply"/>.</summary>
    public void ReplySmall(int length)
    {
        _replyIsSmall = true;
        Unsent = (0, length);
    }

    /// <summary>The reply is a part of <see cref="Buffer"/>.</summary>
    public void ReplyFromBuffer(int start, int length)
    {
        _replyIsSmall = false;
        Unsent = (start, length);
    }

    /// <summary>The bytes of the reply that are still to be sent.</summary>
    public ReadOnlySpan<byte> UnsentBytes
        => _replyIsSmall ? _smallReply.AsSpan(Unsent.Start, Unsent.Length) : Buffer!.Slice(Unsent.Start, Unsent.Length);

    /// <summary>Notes that bytes of the reply were sent.</summary>
    public void NoteSent(int count) => Unsent = (Unsent.Start + count, Unsent.Length - count);

    private void OnCompleted() => _sender!.Finish(this);
}
