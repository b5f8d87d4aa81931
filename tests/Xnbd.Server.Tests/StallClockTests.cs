using Xnbd.TestKit;

namespace Xnbd.Server.Tests;

public class StallClockTests
{
    private static readonly TimeSpan s_moment = TimeSpan.FromMilliseconds(1);

    private readonly TestClock _clock = new();
    private readonly RequestBudget _budget = new(new RequestLimits(Requests: 1, Bytes: 1), new BudgetTotal());
    private readonly StallClock _stall;

    public StallClockTests() => _stall = new StallClock(_budget, _clock);

    [Fact]
    public void A_client_for_which_nobody_waits_may_take_any_time()
    {
        Assert.False(_stall.IsStalled());
        _clock.Turn(TimeSpan.FromDays(1));
        Assert.False(_stall.IsStalled());
    }

    [Fact]
    public void A_client_that_moves_nothing_is_stalled_after_the_time_it_has()
    {
        using IDisposable waiting = LetSomebodyWait();
        Assert.False(_stall.IsStalled());
        _clock.Turn(ServerLimits.StallTime);
        Assert.False(_stall.IsStalled());
        _clock.Turn(s_moment);
        Assert.True(_stall.IsStalled());
    }

    [Fact]
    public void Bytes_that_move_buy_time_at_the_lowest_rate()
    {
        using IDisposable waiting = LetSomebodyWait();
        Assert.False(_stall.IsStalled());
        _stall.Moved(3 * ServerLimits.MinStallRate);
        _clock.Turn(ServerLimits.StallTime + TimeSpan.FromSeconds(3));
        Assert.False(_stall.IsStalled());
        _clock.Turn(s_moment);
        Assert.True(_stall.IsStalled());
    }

    [Fact]
    public void A_clock_that_was_stopped_starts_anew()
    {
        using IDisposable waiting = LetSomebodyWait();
        Assert.False(_stall.IsStalled());
        _clock.Turn(ServerLimits.StallTime * 2);
        _stall.Stop();
        Assert.False(_stall.IsStalled());
        _clock.Turn(ServerLimits.StallTime);
        Assert.False(_stall.IsStalled());
    }

    /// <summary>Somebody waits for bytes of the budget until the result is disposed of.</summary>
    private Release LetSomebodyWait()
    {
        Assert.True(_budget.TryAcquire(1, isFar: false));
        Task waiting = Task.Run(() => _budget.Acquire(1, isFar: false, () => false));
        Assert.True(SpinWait.SpinUntil(() => _budget.IsContended, 10_000));
        return new Release(_budget, waiting);
    }

    private sealed class Release(RequestBudget budget, Task waiting) : IDisposable
    {
        public void Dispose()
        {
            budget.Release(1, isFar: false);
            waiting.Wait();
        }
    }
}
