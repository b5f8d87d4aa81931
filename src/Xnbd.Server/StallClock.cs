namespace Xnbd.Server;

/// <summary>
/// Tells a client that keeps others waiting from one that is merely slow. The clock runs from the moment at which a
/// session waits for its client while it holds bytes of the budget, until nothing of the session waits for the client
/// any more. Single bytes do not wind it back. Any thread may use it; its figures need not agree to the byte.
/// </summary>
internal sealed class StallClock(RequestBudget budget, TimeProvider time)
{
    private long _since; // a timestamp; 0 when the clock does not run
    private long _movedBytes;

    /// <summary>Notes that the client took or gave bytes.</summary>
    public void Moved(long bytes) => Interlocked.Add(ref _movedBytes, bytes);

    /// <summary>Notes that nothing waits for the client any more.</summary>
    public void Stop()
    {
        Volatile.Write(ref _since, 0);
        Volatile.Write(ref _movedBytes, 0);
    }

    /// <summary>Asked whenever the client lets the session wait; the first time starts the clock.</summary>
    public bool IsStalled()
    {
        long since = Volatile.Read(ref _since);
        if (since == 0)
        {
            Stop();
            Volatile.Write(ref _since, time.GetTimestamp());
            return false;
        }

        double allowed = ServerLimits.StallTime.TotalSeconds
            + ((double)Volatile.Read(ref _movedBytes) / ServerLimits.MinStallRate);
        return budget.IsContended && time.GetElapsedTime(since).TotalSeconds > allowed;
    }
}
