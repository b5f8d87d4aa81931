using Xnbd.Storage.Images;

namespace Xnbd.Storage.Tests;

/// <summary>The group commit of an image: who shares a sync, and what a failed one means.</summary>
public sealed class ImageSyncTests
{
    private static readonly TimeSpan s_limit = TimeSpan.FromSeconds(30);

    [Fact]
    public async Task Many_who_ask_for_a_sync_share_one_that_starts_after_they_asked()
    {
        int syncs = 0, asked = 0, covered = 0;
        using var firstRuns = new ManualResetEventSlim();
        using var mayEnd = new ManualResetEventSlim();
        var sync = new ImageSync(() =>
        {
            if (Interlocked.Increment(ref syncs) == 1)
            {
                firstRuns.Set();
                mayEnd.Wait(s_limit);
            }
            else
            {
                covered = Volatile.Read(ref asked);
            }

            return null;
        });
        Task first = Start(sync.Run);
        Assert.True(firstRuns.Wait(s_limit));
        Task[] others = [.. Enumerable.Range(0, 20).Select(_ => Start(() =>
        {
            Interlocked.Increment(ref asked);
            sync.Run();
        }))];
        while (Volatile.Read(ref asked) < others.Length)
            Thread.Yield();
        Thread.Sleep(100); // so that they wait, most likely all of them
        Assert.DoesNotContain(others, task => task.IsCompleted); // the sync that runs began before they asked
        mayEnd.Set();
        await Task.WhenAll([first, .. others]).WaitAsync(s_limit);
        Assert.InRange(syncs, 2, 10);
        Assert.Equal(others.Length, covered);
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

    private static Task Start(Action work) => Task.Factory.StartNew(
        work, CancellationToken.None, TaskCreationOptions.LongRunning, TaskScheduler.Default);
}
