using System.Diagnostics;
using System.Numerics;

namespace Xnbd.Storage.Cache;

/// <summary>Misses that took about the same time.</summary>
/// <param name="MaxMicroseconds">They took at most this time, in microseconds.</param>
/// <param name="Count">How many there were since the start.</param>
public readonly record struct LatencyBucket(long MaxMicroseconds, long Count);

/// <summary>
/// How long misses have taken since the start. The times are counted in buckets whose widths are an eighth of a power
/// of two, so that a percentile is at most 12.5 % too large. Whoever wants the last seconds subtracts an earlier
/// answer.
/// <para>
/// Any thread may call anything; a miss costs one atomic addition, and allocates nothing. Nothing survives the process.
/// </para>
/// </summary>
internal sealed class MissLatency
{
    private const int Steps = 8; // buckets for each power of two, and for the first microseconds
    private const int StepBits = 3;
    private const int MaxBits = 36; // 19 hours; the last bucket also holds what took longer

    private readonly long[] _counts = new long[IndexOf(1L << MaxBits) + 1];

    /// <summary>Counts a miss that has been answered.</summary>
    /// <param name="start">The time stamp at which it began.</param>
    public void Note(long start) => Add(Stopwatch.GetElapsedTime(start));

    /// <summary>Counts a miss that took this time.</summary>
    public void Add(TimeSpan time)
    {
        long microseconds = Math.Clamp((long)time.TotalMicroseconds, 0, 1L << MaxBits);
        Interlocked.Increment(ref _counts[IndexOf(microseconds)]);
    }

    /// <summary>The buckets that are not empty, in order.</summary>
    public List<LatencyBucket> Buckets
    {
        get
        {
            var buckets = new List<LatencyBucket>();
            for (int i = 0; i < _counts.Length; i++)
            {
                if (Interlocked.Read(ref _counts[i]) is var count and > 0)
                    buckets.Add(new LatencyBucket(MaxOf(i), count));
            }

            return buckets;
        }
    }

    private static int IndexOf(long microseconds)
    {
        if (microseconds < Steps)
            return (int)microseconds;
        int bits = BitOperations.Log2((ulong)microseconds) - StepBits;
        return (bits * Steps) + (int)(microseconds >> bits);
    }

    private static long MaxOf(int index)
    {
        if (index < Steps)
            return index;
        int bits = (index / Steps) - 1;
        return ((index - (bits * Steps) + 1L) << bits) - 1;
    }
}
