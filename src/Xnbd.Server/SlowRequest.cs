using System.Runtime.CompilerServices;
using Xnbd.Linux;
using Xnbd.Protocol;
using Xnbd.Storage;
using Xnbd.Storage.Threads;

namespace Xnbd.Server;

/// <summary>
/// A request that waits for the disk while its session goes on. It owns its buffer and its share of the byte budget,
/// from its start until its reply has been sent. Reused, so that a steady load allocates nothing.
/// <para>States: rented and filled by the session's thread; started; finished by whichever thread completes the disk's
/// operation, which builds the reply; sent, and returned.</para>
/// </summary>
internal sealed class SlowRequest
{
    private const int MaxSpare = 256;

    private static readonly Pool<SlowRequest> s_pool = new(() => new SlowRequest(), MaxSpare);

    private readonly Action _onCompleted;
    private readonly byte[] _smallReply = new byte[NbdReply.MaxErrorChunk];
    private Session? _session;
    private ValueTaskAwaiter _awaiter;
    private bool _replyIsSmall;

    private SlowRequest() => _onCompleted = OnCompleted;

    /// <summary>The request's header.</summary>
    public NbdRequest Request { get; private set; }

    /// <summary>Payload of a write, data of a read, extents of a block status; null when there is none.</summary>
    public NativeBuffer? Buffer { get; set; }

    /// <summary>Bytes claimed of the budget.</summary>
    public long ClaimedBytes { get; set; }

    /// <summary>Where the answer to a block status is gathered.</summary>
    public ExtentList? Extents { get; set; }

    /// <summary>Its reply is built, and waits to be sent.</summary>
    public bool IsFinished { get; set; }

    /// <summary>What is left to send of the reply: its start within buffer or small reply, and its length.</summary>
    public (int Start, int Length) Unsent { get; set; }

    public static SlowRequest Rent(Session session, in NbdRequest request)
    {
        SlowRequest slow = s_pool.Rent();
        slow._session = session;
        slow.Request = request;
        return slow;
    }

    /// <summary>Gives the object back; its buffer and claim have been released.</summary>
    public void Return()
    {
        _session = null;
        Buffer = null;
        ClaimedBytes = 0;
        Extents = null;
        IsFinished = false;
        s_pool.Return(this);
    }

    /// <summary>Waits for the disk's operation, on no thread; the session's <see cref="Session.Finish"/> comes next.</summary>
    public void Await(ValueTask operation)
    {
        _awaiter = operation.GetAwaiter();
        if (_awaiter.IsCompleted)
            OnCompleted();
        else
            _awaiter.UnsafeOnCompleted(_onCompleted);
    }

    /// <summary>The operation's result.</summary>
    /// <exception cref="DiskException">It failed.</exception>
    public void GetResult() => _awaiter.GetResult();

    /// <summary>Room for a reply without data, or an error.</summary>
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
    public void Sent(int count) => Unsent = (Unsent.Start + count, Unsent.Length - count);

    private void OnCompleted() => _session!.Finish(this);
}
