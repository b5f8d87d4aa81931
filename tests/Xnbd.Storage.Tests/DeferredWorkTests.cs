using Xnbd.Storage.Threads;

namespace Xnbd.Storage.Tests;

/// <summary>The phases of deferred work.</summary>
public sealed class DeferredWorkTests
{
    private readonly List<string> _done = [];

    private Action Work(string name, Action? more = null) => () =>
    {
        _done.Add(name);
        more?.Invoke();
    };

    [Fact]
    public void Without_a_batch_nothing_is_deferred()
    {
        Assert.False(DeferredWork.TryDefer(WorkPhase.Send, Work("send")));
        DeferredWork.Run();
        Assert.Empty(_done);
    }

    [Fact]
    public void All_is_sent_before_anything_is_stored()
    {
        DeferredWork.Begin();
        Assert.True(DeferredWork.TryDefer(WorkPhase.Store, Work("store 1")));
        DeferredWork.TryDefer(WorkPhase.Send, Work("send 1"));
        DeferredWork.TryDefer(WorkPhase.Store, Work("store 2"));
        DeferredWork.TryDefer(WorkPhase.Send, Work("send 2"));
        Assert.Empty(_done);
        DeferredWork.End();
        Assert.Equal(["send 1", "send 2", "store 1", "store 2"], _done);
        Assert.False(DeferredWork.TryDefer(WorkPhase.Send, Work("late")));
    }

    [Fact]
    public void Sends_that_storing_causes_come_before_the_next_storing()
    {
        DeferredWork.Begin();
        DeferredWork.TryDefer(
            WorkPhase.Store, Work("store 1", () => DeferredWork.TryDefer(WorkPhase.Send, Work("send"))));
        DeferredWork.TryDefer(WorkPhase.Store, Work("store 2"));
        DeferredWork.End();
        Assert.Equal(["store 1", "send", "store 2"], _done);
    }

    [Fact]
    public void The_same_work_is_done_once_and_may_defer_itself_again()
    {
        int left = 3;
        Action? again = null;
        again = Work("again", () =>
        {
            if (--left > 0)
                DeferredWork.TryDefer(WorkPhase.Send, again!);
        });
        DeferredWork.Begin();
        DeferredWork.TryDefer(WorkPhase.Send, again);
        DeferredWork.TryDefer(WorkPhase.Send, again);
        DeferredWork.End();
        Assert.Equal(["again", "again", "again"], _done);
    }

    [Fact]
    public void Work_that_is_about_to_wait_runs_the_rest_first()
    {
        DeferredWork.Begin();
        DeferredWork.TryDefer(WorkPhase.Send, Work("first", () =>
        {
            DeferredWork.Run();
            _done.Add("waits");
        }));
        DeferredWork.TryDefer(WorkPhase.Store, Work("store"));
        DeferredWork.TryDefer(WorkPhase.Send, Work("send"));
        DeferredWork.End();
        Assert.Equal(["first", "send", "store", "waits"], _done);
    }
}
