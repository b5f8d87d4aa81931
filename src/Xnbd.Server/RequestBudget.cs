namespace Xnbd.Server;

/// <summary>
/// The share of one export: bounds what its sessions have in flight, in bytes, and in requests that hold them. Sessions
/// that must wait are served in the order in which they asked, so small requests cannot overtake a large one for ever.
/// A session that waits must hold nothing of the budget, so no circle of waiting arises. A request that is larger than
/// the whole budget passes alone.
/// <para>
/// Requests that may wait for another machine are <em>far</em>, all others are <em>near</em>. Far ones get at most
/// three fourths of the budget, and each kind has a queue of its own. One request of each kind may always be in flight.
/// So, however long the other machine is silent, nothing that this machine has is kept waiting for it.
/// </para>
/// <para>
/// All exports of a server together are bounded by a <see cref="BudgetTotal"/>, and one that never gives back cannot
/// stop the others: each kind of each export may hold as much as it leaves free, and one short request of each passes
/// whatever the others hold. The lock is the total's; nothing is called while it is held.
/// </para>
/// </summary>
internal sealed class RequestBudget(RequestLimits limits, BudgetTotal total)
{
    private readonly Share _near = new(limits);
    private readonly Share _far = new(new RequestLimits(limits.Requests / 4 * 3, limits.Bytes / 4 * 3));

    /// <summary>Another session waits for what a session of this export holds.</summary>
    public bool IsContended => _near.Waiting > 0 || _far.Waiting > 0 || total.IsContended;

    /// <summary>Takes bytes for a request, if there is room and nobody of this export waits with such a one.</summary>
    /// <param name="bytes">How many.</param>
    /// <param name="isFar">The request may wait for another machine.</param>
    public bool TryAcquire(long bytes, bool isFar)
    {
        lock (total)
            return ShareOf(isFar) is { Waiting: 0 } share && TryEnter(share, bytes);
    }

    /// <summary>Takes bytes that a near request can do without, if few are in use and nobody waits.</summary>
    public bool TryAcquireSpare(long bytes)
    {
        lock (total)
        {
            return _near.Waiting == 0
                && _far.Waiting == 0
                && _near.Bytes + _far.Bytes + bytes <= limits.Bytes / ServerLimits.SparePartOfBudget
                && TryEnter(_near, bytes);
        }
    }

    /// <summary>Takes bytes for a request, and waits until there is room.</summary>
    /// <param name="bytes">How many.</param>
    /// <param name="isFar">The request may wait for another machine.</param>
    /// <param name="mustEnd">Asked now and then whether the session has no reason to wait any more.</param>
    /// <returns>False if the session has no reason to wait any more: then nothing was taken.</returns>
    public bool Acquire(long bytes, bool isFar, Func<bool> mustEnd)
    {
        Share share = ShareOf(isFar);
        LinkedListNode<long> place;
        lock (total)
            place = share.Queue(bytes);
        bool waitsForOthers = false; // for what other exports hold
        for (long lastAsked = Environment.TickCount64; ;)
        {
            lock (total)
            {
                bool isFirst = share.IsFirst(place);
                if (isFirst && TryEnter(share, bytes))
                {
                    Leave(share, place, waitsForOthers);
                    return true;
                }

                if (!waitsForOthers && isFirst && IsWithinLimits(share, bytes))
                {
                    waitsForOthers = true;
                    total.Waiting++;
                }

                TimeSpan sinceAsked = TimeSpan.FromMilliseconds(Environment.TickCount64 - lastAsked);
                if (sinceAsked < ServerLimits.ClientCheckTime)
                {
                    Monitor.Wait(total, ServerLimits.ClientCheckTime);
                    continue;
                }
            }

            if (mustEnd())
            {
                lock (total)
                    Leave(share, place, waitsForOthers);
                return false;
            }

            lastAsked = Environment.TickCount64;
        }
    }

    /// <summary>Gives back the bytes of a request.</summary>
    /// <param name="bytes">How many.</param>
    /// <param name="isFar">As when they were taken.</param>
    public void Release(long bytes, bool isFar)
    {
        lock (total)
        {
            ShareOf(isFar).Take(-bytes, requests: -1);
            total.Bytes -= bytes;
            if (IsContended)
                Monitor.PulseAll(total);
        }
    }

    private Share ShareOf(bool isFar) => isFar ? _far : _near;

    private bool TryEnter(Share share, long bytes)
    {
        if (!IsWithinLimits(share, bytes) || !total.HasRoom(share.Bytes, bytes))
            return false;
        share.Take(bytes, requests: 1);
        total.Bytes += bytes;
        return true;
    }

    private bool IsWithinLimits(Share share, long bytes)
        => share.Requests == 0
            || (share.HasRoom(bytes)
                && _near.Requests + _far.Requests < limits.Requests
                && _near.Bytes + _far.Bytes + bytes <= limits.Bytes);

    private void Leave(Share share, LinkedListNode<long> place, bool waitedForOthers)
    {
        share.Unqueue(place);
        if (waitedForOthers)
            total.Waiting--;
        Monitor.PulseAll(total); // the next in the queue may fit as well
    }

    /// <summary>What the requests of one kind hold, and the sessions that wait with one.</summary>
    private sealed class Share(RequestLimits limits)
    {
        private readonly LinkedList<long> _queue = new();
        private int _waiting; // as many as the queue has

        public long Bytes { get; private set; }

        public int Requests { get; private set; }

        /// <summary>Sessions that wait. It may be read without the lock.</summary>
        public int Waiting => Volatile.Read(ref _waiting);

        public bool HasRoom(long bytes) => Requests < limits.Requests && Bytes + bytes <= limits.Bytes;

        public void Take(long bytes, int requests) => (Bytes, Requests) = (Bytes + bytes, Requests + requests);

        public LinkedListNode<long> Queue(long bytes)
        {
            Volatile.Write(ref _waiting, _waiting + 1);
            return _queue.AddLast(bytes);
        }

        public bool IsFirst(LinkedListNode<long> place) => ReferenceEquals(_queue.First, place);

        public void Unqueue(LinkedListNode<long> place)
        {
            _queue.Remove(place);
            Volatile.Write(ref _waiting, _waiting - 1);
        }
    }
}

/// <summary>Bounds what all exports of a server together have in flight. It is the lock of their shares.</summary>
/// <param name="maxBytes">The bound in bytes; <see cref="long.MaxValue"/> for a server of one export, which has its
/// own bound.</param>
internal sealed class BudgetTotal(long maxBytes = long.MaxValue)
{
    private int _waiting;

    /// <summary>Bytes that all exports hold. The lock guards it.</summary>
    public long Bytes { get; set; }

    /// <summary>Sessions that wait for what other exports hold. The lock guards changes.</summary>
    public int Waiting
    {
        get => Volatile.Read(ref _waiting);
        set => Volatile.Write(ref _waiting, value);
    }

    /// <summary>A session waits for what another export holds.</summary>
    public bool IsContended => Waiting > 0;

    /// <summary>
    /// Whether an export may take more. It may hold as much as is free afterwards: one export at most half of all, two
    /// a third each, and so on, so that something is always free for one more. Besides, a request passes if its export
    /// holds nothing, and it fits, or is short.
    /// </summary>
    /// <param name="held">Bytes that the export holds.</param>
    /// <param name="bytes">Bytes that it wants.</param>
    public bool HasRoom(long held, long bytes)
    {
        long left = maxBytes - Bytes - bytes;
        return held + bytes <= left || (held == 0 && (left >= 0 || bytes <= ServerLimits.SurePassBytes));
    }
}

/// <summary>
/// Bounds on what all connections to an export together have in flight: requests that wait, and carry data.
/// </summary>
/// <param name="Requests">The number of requests, at least 1.</param>
/// <param name="Bytes">Their bytes, at least 1; a larger request passes alone.</param>
public readonly record struct RequestLimits(int Requests, long Bytes)
{
    /// <summary>The bounds for local images: their disks answer soon, so only bytes matter.</summary>
    public static RequestLimits Default => new(int.MaxValue, ServerLimits.MaxBytesInFlight);
}
