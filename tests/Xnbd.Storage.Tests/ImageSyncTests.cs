using Xnbd.Storage.Images;
using Xnbd.TestKit;

namespace Xnbd.Storage.Tests;

/// <summary>The group commit of an image: who shares a sync, and what a failed one means.</summary>
public sealed class ImageSyncTests
{
    private static readonly TimeSpan s_limit = TimeSpan.FromSeconds(30);

    [Fact]
    public void Many_who_ask_for_a_sync_share_one_that_starts_after_they_asked()
    {
        int syncs = 0;
        using var firstRuns = new ManualResetEventSlim();
        using var mayEnd = new ManualResetEventSlim();
        var sync = new ImageSync(() =>
        {
            if (Interlocked.Increment(ref syncs) == 1)
            {
                firstRuns.Set();
                mayEnd.Wait(s_limit);
            }

            return null;
        });
        Thread[] threads = [.. Enumerable.Range(0, 21).Select(_ => new Thread(sync.Run))];
        threads[0].Start();
        Assert.True(firstRuns.Wait(s_limit));
        foreach (Thread other in threads[1..]) // one after the other, so that none waits for the lock alone
        {
            other.Start();
            Wait.UntilBlocked(other, "it waits: the sync that runs began before it asked");
        }

        Assert.Equal(1, Volatile.Read(ref syncs));
        mayEnd.Set();
        Assert.All(threads, thread => Assert.True(thread.Join(s_limit)));
        Assert.Equal(2, syncs);
    }

    [Fact]
    public void A_sync_that_has_failed_is_final()
    {
        int syncs = 0;
        var sync = new ImageSync(() => ++syncs == 2 ? new DiskException(DiskError.Io, "bad medium") : null);
        sync.Run();
        sync.ThrowIfFailed();
        Assert.Throws<DiskException>(sync.Run);
        Assert.Contains("bad medium", Assert.Throws<DiskException>(sync.Run).Message, StringComparison.Ordinal);
        Assert.Throws<DiskException>(sync.ThrowIfFailed);
        Assert.Equal(2, syncs);
    }
}
