namespace Xnbd.TestKit;

/// <summary>A clock that stands still until a test turns it. Any thread may use it.</summary>
public sealed class TestClock : TimeProvider
{
    private long _ticks = TimeSpan.TicksPerDay;
    private int _readings;

    public override long TimestampFrequency => TimeSpan.TicksPerSecond;

    /// <summary>How often the clock has been read.</summary>
    public int Readings => Volatile.Read(ref _readings);

    public override long GetTimestamp()
    {
        Interlocked.Increment(ref _readings);
        return Interlocked.Read(ref _ticks);
    }

    public override DateTimeOffset GetUtcNow() => DateTimeOffset.UnixEpoch + TimeSpan.FromTicks(GetTimestamp());

    /// <summary>Turns the clock forward.</summary>
    public void Turn(TimeSpan time) => Interlocked.Add(ref _ticks, time.Ticks);
}
