using Xnbd.Storage.Cache;

namespace Xnbd.Storage.Tests;

/// <summary>The buckets in which the times of misses are counted.</summary>
public sealed class MissLatencyTests
{
    [Fact]
    public void A_time_is_counted_in_a_bucket_that_is_at_most_an_eighth_too_large()
    {
        for (long us = 0; us < 100_000; us += 1 + (us / 50))
            Check(us);
        for (long us = 100_000; us < 1L << 36; us *= 2)
        {
            Check(us - 1);
            Check(us);
            Check(us + 1);
        }

        static void Check(long us)
        {
            var latency = new MissLatency();
            latency.Add(TimeSpan.FromMicroseconds(us));
            LatencyBucket bucket = Assert.Single(latency.Buckets);
            Assert.Equal(1, bucket.Count);
            Assert.InRange(bucket.MaxMicroseconds, us, us + (us / 8));
        }
    }

    [Fact]
    public void Any_time_is_counted_and_buckets_are_in_order()
    {
        var latency = new MissLatency();
        foreach (double seconds in (double[])[-1, 0, 0.02, 0.02, 3, 1e9])
            latency.Add(TimeSpan.FromSeconds(seconds));
        Assert.Equal([2, 2, 1, 1], latency.Buckets.Select(bucket => bucket.Count));
        Assert.Equal(
            latency.Buckets.Select(bucket => bucket.MaxMicroseconds).Order(),
            latency.Buckets.Select(bucket => bucket.MaxMicroseconds));
    }

    [Fact]
    public void Counting_allocates_nothing()
    {
        var latency = new MissLatency();
        latency.Note(0);
        long before = GC.GetAllocatedBytesForCurrentThread();
        for (int i = 0; i < 1000; i++)
            latency.Note(i);
        Assert.Equal(before, GC.GetAllocatedBytesForCurrentThread());
    }
}
