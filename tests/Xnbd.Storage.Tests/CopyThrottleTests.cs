using Xnbd.Storage.Cache;
using Xnbd.TestKit;

namespace Xnbd.Storage.Tests;

/// <summary>The copy is held back as somebody has set it.</summary>
public sealed class CopyThrottleTests
{
    private readonly TestClock _clock = new();
    private readonly CopyThrottle _throttle;

    public CopyThrottleTests() => _throttle = new CopyThrottle(_clock);

    private Task Turn(CancellationToken cancel = default) => _throttle.WaitAsync(cancel);

    private static Task Soon(Task task)
        => task.WaitAsync(TimeSpan.FromSeconds(20), TestContext.Current.CancellationToken);

    [Fact]
    public void Nothing_is_held_back_unless_it_was_set()
    {
        _throttle.Charge(1L << 40);
        Assert.True(Turn().IsCompletedSuccessfully);
        Assert.Equal(Fetch.MaxBlocks, _throttle.MaxBlocks);
    }

    [Fact]
    public void Pieces_go_out_at_the_rate()
    {
        _throttle.BytesPerSecond = 1 << 20;
        long copied = 0;
        for (int i = 0; i < 1000; i++)
        {
            if (Turn().IsCompletedSuccessfully)
            {
                _throttle.Charge(64 << 10);
                copied += 64 << 10;
            }

            _clock.Turn(TimeSpan.FromMilliseconds(10));
        }

        Assert.InRange(copied, 10L << 20, (10L << 20) + (128 << 10)); // in 10 s
    }

    [Fact]
    public void What_was_not_used_for_a_while_is_not_made_up_for()
    {
        _throttle.BytesPerSecond = 1 << 20;
        _throttle.Charge(1);
        _clock.Turn(TimeSpan.FromMinutes(1));
        long copied = 0;
        for (; Turn().IsCompletedSuccessfully; copied += 64 << 10)
            _throttle.Charge(64 << 10);
        Assert.InRange(copied, 64 << 10, 256 << 10);
    }

    [Fact]
    public void Pieces_are_small_at_a_low_rate()
    {
        _throttle.BytesPerSecond = 1 << 20;
        Assert.InRange(_throttle.MaxBlocks, 10, 26);
        _throttle.BytesPerSecond = 1;
        Assert.Equal(1, _throttle.MaxBlocks);
        _throttle.BytesPerSecond = long.MaxValue;
        Assert.Equal(Fetch.MaxBlocks, _throttle.MaxBlocks);
    }

    [Fact]
    public async Task A_changed_rate_holds_at_once()
    {
        _throttle.BytesPerSecond = 1;
        _throttle.Charge(1 << 20); // twelve days
        Task turn = Turn();
        Assert.False(turn.IsCompleted);
        _throttle.BytesPerSecond = 1 << 30;
        await Soon(turn);
    }

    [Fact]
    public async Task Who_waits_while_it_is_paused_goes_on_when_it_is_not_or_ends_when_cancelled()
    {
        _throttle.IsPaused = true;
        using var cancel = new CancellationTokenSource();
        Task turn = Turn(), cancelled = Turn(cancel.Token);
        _throttle.BytesPerSecond = 1 << 30;
        Assert.False(turn.IsCompleted);
        await cancel.CancelAsync();
        await Assert.ThrowsAnyAsync<OperationCanceledException>(() => Soon(cancelled));
        Assert.False(turn.IsCompleted);
        _throttle.IsPaused = false;
        await Soon(turn);
    }

    [Fact]
    public async Task An_open_throttle_holds_nothing_back()
    {
        _throttle.IsPaused = true;
        Task turn = Turn();
        _throttle.IsOpen = true;
        await Soon(turn);
        Assert.Equal(Fetch.MaxBlocks, _throttle.MaxBlocks);
        _throttle.IsOpen = false;
        Assert.False(Turn().IsCompleted);
    }
}
