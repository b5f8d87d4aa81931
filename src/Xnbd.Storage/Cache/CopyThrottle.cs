namespace Xnbd.Storage.Cache;

/// <summary>
/// Holds back the background copy: at a rate that somebody has set, and while it is paused. Clients' reads never come
/// here.
/// <para>
/// State, under <c>_lock</c>, a leaf: the rate, the pause, and the time from which on the next piece may be copied. A
/// piece moves that time by its length over the rate. A change wakes those who wait. Nothing survives the process.
/// </para>
/// </summary>
/// <param name="time">The clock.</param>
internal sealed class CopyThrottle(TimeProvider time)
{
    /// <summary>How much of what was missed is made up for: a timer may be late by a few milliseconds.</summary>
    private static readonly TimeSpan s_maxLate = TimeSpan.FromMilliseconds(100);

    /// <summary>A piece takes at most this time at the rate that was set, so that the copy does not jerk.</summary>
    private static readonly TimeSpan s_maxPiece = TimeSpan.FromMilliseconds(100);

    /// <summary>A timer does not take less.</summary>
    private static readonly TimeSpan s_tick = TimeSpan.FromMilliseconds(1);

    private readonly Lock _lock = new();
    private TaskCompletionSource _changed = NewSignal();
    private long _bytesPerSecond; // 0: unlimited
    private long _nextAt; // a time stamp
    private bool _isPaused;
    private bool _isOpen; // whatever was set: the copy has nothing more to do than to end

    /// <summary>The rate in bytes per second; 0 for no limit.</summary>
    public long BytesPerSecond
    {
        get
        {
            lock (_lock)
                return _bytesPerSecond;
        }

        set
        {
            ArgumentOutOfRangeException.ThrowIfNegative(value);
            Change(() => (_bytesPerSecond, _nextAt) = (value, time.GetTimestamp()));
        }
    }

    /// <summary>Whether the copy waits until this becomes false.</summary>
    public bool IsPaused
    {
        get
        {
            lock (_lock)
                return _isPaused;
        }

        set => Change(() => _isPaused = value);
    }

    /// <summary>Whether nothing is held back, whatever was set: the disk is being switched.</summary>
    public bool IsOpen
    {
        set => Change(() => _isOpen = value);
    }

    /// <summary>How many blocks a piece should have at most, at the rate that was set; at least 1.</summary>
    public int MaxBlocks
    {
        get
        {
            lock (_lock)
            {
                return _bytesPerSecond == 0 || _isOpen
                    ? Fetch.MaxBlocks
                    : (int)Math.Clamp(
                        _bytesPerSecond * s_maxPiece.TotalSeconds / BlockRange.BlockSize, 1, Fetch.MaxBlocks);
            }
        }
    }

    /// <summary>Waits until the next piece may be copied.</summary>
    public async Task WaitAsync(CancellationToken cancel)
    {
        while (true)
        {
            Task changed;
            TimeSpan wait;
            lock (_lock)
            {
                if (_isOpen)
                    return;
                wait = _isPaused ? Timeout.InfiniteTimeSpan
                    : _bytesPerSecond == 0 ? TimeSpan.Zero
                    : time.GetElapsedTime(time.GetTimestamp(), _nextAt);
                if (!_isPaused && wait <= TimeSpan.Zero)
                    return;
                changed = _changed.Task;
            }

            using var ended = CancellationTokenSource.CreateLinkedTokenSource(cancel);
            if (wait > TimeSpan.Zero && wait < s_tick)
                wait = s_tick;
            await Task.WhenAny(changed, Task.Delay(wait, time, ended.Token));
            await ended.CancelAsync(); // the timer
            cancel.ThrowIfCancellationRequested();
        }
    }

    /// <summary>Notes a piece that is being copied.</summary>
    /// <param name="bytes">Its length.</param>
    public void Charge(long bytes)
    {
        lock (_lock)
        {
            if (_bytesPerSecond == 0)
                return;
            long earliest = time.GetTimestamp() - (long)(s_maxLate.TotalSeconds * time.TimestampFrequency);
            _nextAt = Math.Max(_nextAt, earliest) + (long)((double)bytes / _bytesPerSecond * time.TimestampFrequency);
        }
    }

    private static TaskCompletionSource NewSignal() => new(TaskCreationOptions.RunContinuationsAsynchronously);

    private void Change(Action change)
    {
        TaskCompletionSource changed;
        lock (_lock)
        {
            change();
            (changed, _changed) = (_changed, NewSignal());
        }

        changed.SetResult();
    }
}
