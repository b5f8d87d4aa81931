namespace Xnbd.Server;

/// <summary>
/// The share of one export: bounds what its sessions have in flight, in bytes, and in requests that hold them. Sessions
/// that must wait are served in the order in which they asked, so small requests cannot overtake a large one for ever.
/// A session that waits must hold nothing of the budget, so no circle of waiting arises. A request that is larger than
/// the whole budget passes alone.
/// <para>
/// All exports of a server together are bounded by a <see cref="BudgetTotal"/>, and one that never gives back cannot
/// stop the others: each may hold as much as it leaves free, and one short request of each passes whatever the others
/// hold. The lock is the total's.
/// </para>
/// </summary>
internal sealed class RequestBudget(RequestLimits limits, BudgetTotal total)
{
    private long _bytes;
    private int _requests;
    private long _nextTicket;
    private long _served;

    /// <summary>Another session waits for what a session of this export holds.</summary>
    public bool IsContended => Volatile.Read(ref _nextTicket) != Volatile.Read(ref _served) || total.IsContended;

    /// <summary>Takes bytes for a request, if there is room and nobody of this export waits.</summary>
    public bool TryAcquire(long bytes)
    {
        lock (total)
            return _nextTicket == _served && TryEnter(bytes);
    }

    /// <summary>Takes bytes that a request can do without, if few are in use and nobody waits.</summary>
    public bool TryAcquireSpare(long bytes)
    {
        lock (total)
        {
            return _nextTicket == _served
                && _bytes + bytes <= limits.Bytes / ServerLimits.SparePartOfBudget
                && TryEnter(bytes);
        }
    }

    /// <summary>Takes bytes for a request, and waits until there is room.</summary>
    public void Acquire(long bytes)
    {
        lock (total)
        {
            long ticket = _nextTicket++;
            bool waitsForOthers = false; // for what other exports hold
            while (_served != ticket || !TryEnter(bytes))
            {
                if (!waitsForOthers && _served == ticket && IsWithinLimits(bytes))
                {
                    waitsForOthers = true;
                    total.Waiting++;
                }

                Monitor.Wait(total);
            }

            if (waitsForOthers)
                total.Waiting--;
            _served++;
            Monitor.PulseAll(total); // the next in the queue may fit as well
        }
    }

    /// <summary>Gives back the bytes of a request.</summary>
    public void Release(long bytes)
    {
        lock (total)
        {
            _bytes -= bytes;
            _requests--;
            total.Bytes -= bytes;
            if (_nextTicket != _served || total.IsContended)
                Monitor.PulseAll(total);
        }
    }

    private bool TryEnter(long bytes)
    {
        if (!IsWithinLimits(bytes) || !total.HasRoom(_bytes, bytes))
            return false;
        _bytes += bytes;
        _requests++;
        total.Bytes += bytes;
        return true;
    }

    private bool IsWithinLimits(long bytes)
        => _requests == 0 || (_requests < limits.Requests && _bytes + bytes <= limits.Bytes);
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
