using Xnbd.Storage;
using Xnbd.Storage.Threads;

namespace Xnbd.Client;

/// <summary>
/// A read of a remote disk that is under way, or a question where its zeroes are.
/// <para>
/// States: rented; with a connection, or waiting for one; completed, once; returned by whoever awaits the task. One
/// thread at a time owns it: the one that made it, then the connection's receiving thread.
/// </para>
/// </summary>
internal sealed class RemoteRequest : PooledOperation
{
    /// <summary>How many requests are kept for reuse: as many as two connections have under way.</summary>
    private const int MaxKept = 256;

    private static readonly Pool<RemoteRequest> s_pool = new(() => new RemoteRequest(), MaxKept);

    private readonly List<(int Start, int End)> _covered = []; // what has arrived of a structured reply, in order

    /// <summary>Offset of the range in bytes.</summary>
    public long Offset { get; private set; }

    /// <summary>Length of the range in bytes.</summary>
    public int Length { get; private set; }

    /// <summary>Where the data of a read go; empty for a question.</summary>
    public Memory<byte> Buffer { get; private set; }

    /// <summary>Where the answer of a question is gathered; null for a read.</summary>
    public ExtentList? Extents { get; private set; }

    /// <summary>The read asks this server what it has: it is not sent to another one.</summary>
    public bool IsProbe { get; private set; }

    /// <summary>What the server says went wrong, when an error has arrived; more chunks may follow.</summary>
    public string? Failure { get; set; }

    /// <summary>How many error chunks have arrived.</summary>
    public int ErrorChunks { get; set; }

    /// <summary>The time stamp at which the request was made.</summary>
    public long StartedAt { get; private set; }

    /// <summary>Tells this use of the object from earlier and later ones.</summary>
    public int Use { get; private set; }

    /// <summary>All data have arrived, or some of the answer.</summary>
    public bool IsComplete
        => Extents is null ? _covered.Count == 1 && _covered[0] == (0, Buffer.Length) : Extents.Length > 0;

    /// <summary>Makes a read.</summary>
    /// <param name="offset">Offset in bytes.</param>
    /// <param name="buffer">Where the data go.</param>
    /// <param name="now">The time stamp of the present.</param>
    public static RemoteRequest Rent(long offset, Memory<byte> buffer, long now)
    {
        RemoteRequest request = s_pool.Rent();
        request.Offset = offset;
        request.Buffer = buffer;
        request.Length = buffer.Length;
        request.StartedAt = now;
        request.Use++;
        request.Restart();
        return request;
    }

    /// <summary>Makes a read by which a server is recognized.</summary>
    /// <param name="offset">Offset in bytes.</param>
    /// <param name="buffer">Where the data go.</param>
    /// <param name="now">The time stamp of the present.</param>
    public static RemoteRequest RentProbe(long offset, Memory<byte> buffer, long now)
    {
        RemoteRequest request = Rent(offset, buffer, now);
        request.IsProbe = true;
        return request;
    }

    /// <summary>
    /// Makes a question where zeroes are. It is not sent again: whoever asks can do without an answer.
    /// </summary>
    /// <param name="offset">Offset in bytes.</param>
    /// <param name="length">Length in bytes.</param>
    /// <param name="extents">Receives the answer.</param>
    /// <param name="now">The time stamp of the present.</param>
    public static RemoteRequest RentQuestion(long offset, int length, ExtentList extents, long now)
    {
        RemoteRequest request = Rent(offset, default, now);
        request.Length = length;
        request.Extents = extents;
        return request;
    }

    /// <summary>Forgets what has arrived, since the request is sent again.</summary>
    public void Restart()
    {
        _covered.Clear();
        Failure = null;
        ErrorChunks = 0;
    }

    /// <summary>Notes data that are about to arrive.</summary>
    /// <returns>False when they are outside of the range, or have arrived already.</returns>
    public bool TryCover(ulong offset, uint length)
    {
        if (length == 0 || offset < (ulong)Offset || length > (uint)Buffer.Length)
            return false;
        if (offset - (ulong)Offset > (uint)Buffer.Length - length)
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

    /// <summary>Fails the request.</summary>
    public void Fail(DiskError error, string message) => Fail(new DiskException(error, message));

    /// <inheritdoc/>
    protected override void Return()
    {
        Buffer = default;
        Extents = null;
        IsProbe = false;
        s_pool.Return(this);
    }
}
