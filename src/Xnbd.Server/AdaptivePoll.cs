using System.Diagnostics;
using System.Runtime.InteropServices;
using Xnbd.Linux;

namespace Xnbd.Server;

/// <summary>
/// Polls a socket for a short time before its thread blocks. For a client that sends one request at a time, blocking
/// and waking cost more than the request itself. For a slow client, polling wastes processor time. So a session polls
/// only while it has credit. It earns credit when data arrives within the time of a poll, polled or not, and loses
/// credit with each poll in vain. It also polls only while few sessions are at work: otherwise the poll would take the
/// processor away from the threads for which it waits.
/// </summary>
internal struct AdaptivePoll
{
    private const int MaxCredit = 16;
    private const int CreditToPoll = 4;
    private const int LossInVain = 4;

    /// <summary>A poll needs one processor, and the client for which it waits another one.</summary>
    private static readonly int s_maxAwake = Math.Max(1, Environment.ProcessorCount / 2);

    private static readonly long s_pollTicks = (long)(ServerLimits.PollTime.TotalSeconds * Stopwatch.Frequency);
    private static int s_awake; // sessions that are not blocked

    private int _credit;

    /// <summary>Polling has been paying off.</summary>
    public readonly bool HasCredit => _credit >= CreditToPoll;

    /// <summary>Polling has been paying off, and there is a processor for it.</summary>
    public readonly bool IsWorthwhile => HasCredit && HasFreeProcessor;

    /// <summary>So few sessions are at work that another thread probably has a processor.</summary>
    public static bool HasFreeProcessor => Volatile.Read(ref s_awake) <= s_maxAwake;

    /// <summary>A session's thread goes to work.</summary>
    public static void NoteAwake() => Interlocked.Increment(ref s_awake);

    /// <summary>A session's thread blocks, or ends.</summary>
    public static void NoteBlocked() => Interlocked.Decrement(ref s_awake);

    /// <summary>Polls.</summary>
    /// <returns>As <see cref="LinuxSocket.ReceiveNow"/>; -EAGAIN when nothing came.</returns>
    public long Poll(SafeHandle socket, Span<byte> buffer)
    {
        long count;
        long start = Stopwatch.GetTimestamp();
        do
        {
            count = LinuxSocket.ReceiveNow(socket, buffer);
        }
        while (Errno.Of(count) == Errno.EAGAIN && Stopwatch.GetTimestamp() - start < s_pollTicks);

        _credit = Errno.Of(count) == Errno.EAGAIN ? _credit - LossInVain : Math.Min(MaxCredit, _credit + 1);
        return count;
    }

    /// <summary>Notes how long the thread was blocked: after a short time, polling would have paid off.</summary>
    public void NoteBlockedTime(TimeSpan time)
    {
        // Waking takes about as long as a poll may take, hence twice the time of a poll.
        _credit = time < 2 * ServerLimits.PollTime ? Math.Min(MaxCredit, _credit + 1) : Math.Max(0, _credit - 1);
    }
}
