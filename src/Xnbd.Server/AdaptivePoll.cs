using System.Diagnostics;
using System.Runtime.InteropServices;
using Xnbd.Linux;

namespace Xnbd.Server;

/// <summary>
/// Polls a socket for a short time before its thread blocks. Blocking and waking costs a client that sends one
/// request at a time more than the request itself; polling for a client that is slow costs processor time for
/// nothing. So a session polls only while it has credit: earned when data came within the poll's time (polled or
/// not), lost at each poll in vain.
/// </summary>
internal struct AdaptivePoll
{
    private const int MaxCredit = 16;
    private const int CreditToPoll = 4;
    private const int LossInVain = 4;

    /// <summary>Half of the processors may poll at a time: the other half is for those for whom they wait.</summary>
    private static readonly int s_maxPolling = Math.Max(1, Environment.ProcessorCount / 2);

    private static readonly long s_pollTicks = (long)(ServerLimits.PollTime.TotalSeconds * Stopwatch.Frequency);
    private static int s_polling;

    private int _credit;

    /// <summary>Polls, if that has been paying off.</summary>
    /// <returns>As <see cref="LinuxSocket.ReceiveNow"/>; -EAGAIN when nothing came.</returns>
    public long Poll(SafeHandle socket, Span<byte> buffer)
    {
        if (_credit < CreditToPoll)
            return -(long)Errno.EAGAIN;
        if (Interlocked.Increment(ref s_polling) > s_maxPolling)
        {
            Interlocked.Decrement(ref s_polling);
            return -(long)Errno.EAGAIN;
        }

        long count;
        long start = Stopwatch.GetTimestamp();
        do
        {
            count = LinuxSocket.ReceiveNow(socket, buffer);
        }
        while (count == -(long)Errno.EAGAIN && Stopwatch.GetTimestamp() - start < s_pollTicks);
        Interlocked.Decrement(ref s_polling);

        _credit = count == -(long)Errno.EAGAIN ? _credit - LossInVain : Math.Min(MaxCredit, _credit + 1);
        return count;
    }

    /// <summary>Notes how long the thread was blocked: had it been short, polling would have paid off.</summary>
    public void NoteBlockedTime(TimeSpan time)
    {
        // Waking takes about as long as polling may, hence twice its time.
        _credit = time < 2 * ServerLimits.PollTime ? Math.Min(MaxCredit, _credit + 1) : Math.Max(0, _credit - 1);
    }
}
