using System.Threading.Tasks.Sources;
using Xnbd.Storage;
using Xnbd.Storage.Threads;

namespace Xnbd.Client;

/// <summary>
/// A read of a remote disk that is under way, or a question for its zeroes, and the task that stands for it. Reused, so that a steady stream of reads
/// allocates nothing. Whoever awaits goes on at once, on the thread that received the reply.
/// </summary>
internal sealed class RemoteRequest : IValueTaskSource
{
    private const int MaxSpare = 256;

    private static readonly Pool<RemoteRequest> s_pool = new(() => new RemoteRequest(), MaxSpare);

    private readonly List<(int Start, int End)> _covered = []; // what has arrived of a structured reply, in order of offset
    private ManualResetValueTaskSourceCore<bool> _completion;

    public long Offset { get; private set; }

    public Memory<byte> Buffer { get; private set; }

    /// <summary>Where the answer of a question is gathered; null of a read.</summary>
    public ExtentList? Extents { get; private set; }

    /// <summary>Of the range, in bytes.</summary>
    public int Length { get; private set; }

    /// <summary>An error chunk has arrived; more chunks may follow.</summary>
    public string? Failure { get; set; }

    /// <summary>How many error chunks have arrived.</summary>
    public int ErrorChunks { get; set; }

    /// <summary>When the request was made, in milliseconds of the system's clock.</summary>
    public long StartedAt { get; private set; }

    public static RemoteRequest Rent(long offset, Memory<byte> buffer)
    {
        RemoteRequest request = s_pool.Rent();
        request.Offset = offset;
        request.Buffer = buffer;
        request.Length = buffer.Length;
        request.StartedAt = Environment.TickCount64;
        request.Restart();
        return request;
    }

    /// <summary>A question where zeroes are. It is not sent again: who asks can do without an answer.</summary>
    public static RemoteRequest RentQuestion(long offset, int length, ExtentList extents)
    {
        RemoteRequest request = Rent(offset, default);
        request.Length = length;
        request.Extents = extents;
        return request;
    }

    /// <summary>The task. To be taken before the request is handed over to anybody.</summary>
    public ValueTask Task => new(this, _completion.Version);

    /// <summary>All bytes have arrived, or some of the answer.</summary>
    public bool IsComplete => Extents is null ? _covered.Count == 1 && _covered[0] == (0, Buffer.Length) : Extents.Length > 0;

    /// <summary>It will be sent again: nothing has arrived.</summary>
    public void Restart()
    {
        _covered.Clear();
        Failure = null;
        ErrorChunks = 0;
    }

    /// <summary>Notes bytes that are about to arrive.</summary>
    /// <returns>False when they are outside of the request, or have arrived already.</returns>
    public bool TryCover(ulong offset, uint length)
    {
        if (length == 0 || offset < (ulong)Offset || length > (uint)Buffer.Length || offset - (ulong)Offset > (uint)Buffer.Length - length)
            return false;
        int start = (int)(offset - (ulong)Offset), end = start + (int)length;
        int at = _covered.FindIndex(c => c.Start >= start);
        if (at < 0)
            at = _covered.Count;
        if ((at > 0 && _covered[at - 1].End > start) || (at < _covered.Count && _covered[at].Start < end))
            return false;
        if (at < _covered.Count && _covered[at].Start == end)
        {
            end = _covered[at].End;
            _covered.RemoveAt(at);
        }

        if (at > 0 && _covered[at - 1].End == start)
            _covered[at - 1] = (_covered[at - 1].Start, end);
        else
            _covered.Insert(at, (start, end));
        return true;
    }

    public void Succeed() => _completion.SetResult(true);

    public void Fail(string message) => _completion.SetException(new DiskException(DiskError.Io, message));

    void IValueTaskSource.GetResult(short token)
    {
        try
        {
            _completion.GetResult(token);
        }
        finally
        {
            Buffer = default;
            Extents = null;
            _completion.Reset();
            s_pool.Return(this);
        }
    }

    ValueTaskSourceStatus IValueTaskSource.GetStatus(short token) => _completion.GetStatus(token);

    void IValueTaskSource.OnCompleted(Action<object?> continuation, object? state, short token, ValueTaskSourceOnCompletedFlags flags)
        => _completion.OnCompleted(continuation, state, token, flags);
}
