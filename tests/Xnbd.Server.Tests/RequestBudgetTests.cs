namespace Xnbd.Server.Tests;

/// <summary>Who gets bytes and places at once, who waits, and for what.</summary>
public class RequestBudgetTests
{
    private readonly RequestBudget _budget = new(new RequestLimits(Requests: 8, Bytes: 800), new BudgetTotal());

    [Fact]
    public void What_waits_for_another_machine_leaves_a_fourth_to_what_does_not()
    {
        for (int i = 0; i < 6; i++)
            Assert.True(_budget.TryAcquire(10, isFar: true));
        Assert.False(_budget.TryAcquire(10, isFar: true)); // places
        Assert.True(_budget.TryAcquire(10, isFar: false));
        Assert.True(_budget.TryAcquire(10, isFar: false));
        Assert.False(_budget.TryAcquire(10, isFar: false));

        _budget.Release(10, isFar: true);
        Assert.True(_budget.TryAcquire(10, isFar: true));
        _budget.Release(10, isFar: false);
        Assert.False(_budget.TryAcquire(731, isFar: false)); // bytes: 70 are taken
        Assert.True(_budget.TryAcquire(730, isFar: false));
    }

    [Fact]
    public void One_request_of_each_kind_is_never_kept_waiting_by_the_other_kind()
    {
        Assert.True(_budget.TryAcquire(1000, isFar: true)); // larger than all
        Assert.True(_budget.TryAcquire(1000, isFar: false));
        Assert.False(_budget.TryAcquire(1, isFar: true));
        Assert.False(_budget.TryAcquire(1, isFar: false));
    }

    [Fact]
    public void Those_who_wait_for_another_machine_let_others_pass()
    {
        Assert.True(_budget.TryAcquire(600, isFar: true));
        Task<bool> waiting = Task.Run(() => _budget.Acquire(1, isFar: true, () => false));
        Assert.True(SpinWait.SpinUntil(() => _budget.IsContended, 10_000));
        Assert.True(_budget.TryAcquire(200, isFar: false));
        Assert.False(_budget.TryAcquire(1, isFar: true)); // not before those who wait
        _budget.Release(600, isFar: true);
        Assert.True(waiting.Wait(10_000) && waiting.Result);
        Assert.False(_budget.IsContended);
    }

    [Fact]
    public void Whoever_has_no_reason_to_wait_leaves_the_queue_and_the_next_one_goes_on()
    {
        Assert.True(_budget.TryAcquire(500, isFar: true));
        bool isGone = false;
        Task<bool> leaving = Task.Run(() => _budget.Acquire(600, isFar: true, () => Volatile.Read(ref isGone)));
        Assert.True(SpinWait.SpinUntil(() => _budget.IsContended, 10_000));
        Task<bool> next = Task.Run(() => _budget.Acquire(50, isFar: true, () => false));
        Assert.False(next.Wait(100)); // it would fit, but it is not its turn
        Volatile.Write(ref isGone, true);
        Assert.True(leaving.Wait(10_000) && !leaving.Result);
        Assert.True(next.Wait(10_000) && next.Result);
        Assert.False(_budget.IsContended);
    }
}
