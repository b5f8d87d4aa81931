using Xnbd.Storage.Threads;

namespace Xnbd.Storage.Tests;

/// <summary>Disk threads that are all at work, and those of a system that has no thread to give.</summary>
public sealed class DiskThreadsTests
{
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(30);

    private sealed class Job(Action work) : IDiskWork
    {
        public void Run() => work();
    }

    [Fact]
    public void Threads_that_wait_for_a_disk_that_never_answers_are_not_idle()
    {
        var threads = new DiskThreads("busy", 4);
        using var begun = new CountdownEvent(3);
        using var end = new ManualResetEventSlim();
        Assert.True(threads.IsMostlyIdle);
        for (int i = 0; i < 3; i++)
        {
            threads.Enqueue(new Job(() =>
            {
                begun.Signal();
                end.Wait();
            }));
        }

        Assert.True(begun.Wait(s_deadline));
        Assert.False(threads.IsMostlyIdle);
        end.Set();
        Assert.True(SpinWait.SpinUntil(() => threads.IsMostlyIdle, s_deadline));
    }

    [Fact]
    public void Threads_without_work_end_and_further_work_starts_others()
    {
        var threads = new DiskThreads("idle", 4, idleTime: TimeSpan.FromMilliseconds(1));
        for (int i = 0; i < 3; i++)
        {
            using var done = new ManualResetEventSlim();
            threads.Enqueue(new Job(done.Set));
            Assert.True(done.Wait(s_deadline));
            Assert.True(SpinWait.SpinUntil(() => threads.Count == 0, s_deadline));
        }
    }

    [Fact]
    public void Without_threads_all_work_is_done_that_several_callers_hand_over_at_once()
    {
        const int count = 4;
        // All have handed their work over before any learns that there is no thread.
        using var all = new Barrier(count);
        var threads = new DiskThreads("none", 16, (_, _) =>
        {
            Assert.True(all.SignalAndWait(s_deadline));
            return null;
        });
        using var done = new CountdownEvent(count);
        Thread[] callers = [.. Enumerable.Range(0, count).Select(
            _ => new Thread(() => threads.Enqueue(new Job(() => done.Signal()))))];
        Array.ForEach(callers, caller => caller.Start());
        Array.ForEach(callers, caller => caller.Join());
        Assert.Equal(0, done.CurrentCount); // before: one was done, and three waited for ever
    }

    /// <summary>
    /// A thread that does a disk thread's work may wait, and others may wait for what it has deferred.
    /// </summary>
    [Fact]
    public void Without_threads_deferred_work_is_done_before_each_piece_that_may_wait()
    {
        var threads = new DiskThreads("none", 16, (_, _) => null);
        var done = new List<string>();
        var second = new Job(() => done.Add("second"));
        var first = new Job(() =>
        {
            done.Add("first");
            Assert.True(DeferredWork.TryDefer(WorkPhase.Send, () => done.Add("reply of the first")));
            threads.Enqueue(second);
        });
        DeferredWork.Begin();
        DeferredWork.TryDefer(WorkPhase.Send, () => done.Add("an earlier reply"));
        threads.Enqueue(first);
        DeferredWork.End();
        Assert.Equal(["an earlier reply", "first", "reply of the first", "second"], done);
    }

    [Fact]
    public void Without_threads_work_that_gives_its_place_up_goes_on_at_the_same_depth()
    {
        var threads = new DiskThreads("none", 16, (_, _) => null);
        int left = 100, depth = 0, deepest = 0;
        Job? job = null;
        job = new Job(() =>
        {
            deepest = Math.Max(deepest, ++depth);
            if (--left > 0)
                threads.Enqueue(job!); // as long zeroes do
            depth--;
        });
        threads.Enqueue(job);
        Assert.Equal((0, 1), (left, deepest)); // before: each piece lay upon the last one, up to the end of the stack
    }
}
