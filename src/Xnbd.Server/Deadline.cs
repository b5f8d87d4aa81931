namespace Xnbd.Server;

/// <summary>A moment at which something must have ended.</summary>
internal readonly struct Deadline
{
    private readonly TimeProvider _time;
    private readonly long _start;
    private readonly TimeSpan _length;

    /// <summary>A deadline after the given time.</summary>
    public Deadline(TimeProvider time, TimeSpan length)
    {
        _time = time;
        _start = time.GetTimestamp();
        _length = length;
    }

    /// <summary>The time that is left, at least 0.</summary>
    public TimeSpan Left
        => _length - _time.GetElapsedTime(_start) is var left && left > TimeSpan.Zero
        ? left : TimeSpan.Zero;

    /// <summary>The moment has come.</summary>
    public bool HasPassed => Left == TimeSpan.Zero;
}
