using Microsoft.Extensions.Logging;

namespace Xnbd.Server;

/// <summary>
/// Logs connections that were refused, once in <see cref="ServerLimits.RefusalLogPause"/>: a refused client tries again
/// soon. Any thread may use it.
/// </summary>
internal sealed class RefusalLog(ILogger logger, TimeProvider time)
{
    private readonly Lock _lock = new();
    private long? _lastLine; // a timestamp; null before the first line
    private long _unsaid;

    /// <summary>Logs a refusal, or counts it.</summary>
    public void Log(string cause)
    {
        long unsaid;
        lock (_lock)
        {
            if (_lastLine is { } last && time.GetElapsedTime(last) < ServerLimits.RefusalLogPause)
            {
                _unsaid++;
                return;
            }

            (unsaid, _unsaid) = (_unsaid, 0);
            _lastLine = time.GetTimestamp();
        }

        if (unsaid > 0)
            logger.MoreRefused(unsaid);
        logger.Refused(cause);
    }
}
