using Microsoft.Extensions.Logging;
using Xnbd.Protocol;

namespace Xnbd.Server;

/// <summary>
/// Logs requests that failed, at most <see cref="ServerLimits.MaxLoggedFailures"/> in a second: a dying disk must not
/// fill another one. Any thread may use it.
/// </summary>
internal sealed class FailureLog(ILogger logger, TimeProvider time)
{
    private readonly Lock _lock = new();
    private readonly long _start = time.GetTimestamp();
    private long _second;
    private long _count;

    /// <summary>Logs a failure, or counts it.</summary>
    public void Log(string peer, NbdCommand command, string cause)
    {
        long left = 0;
        bool isLogged;
        lock (_lock)
        {
            long second = (long)time.GetElapsedTime(_start).TotalSeconds;
            if (second != _second)
            {
                left = _count - ServerLimits.MaxLoggedFailures;
                (_second, _count) = (second, 0);
            }

            isLogged = ++_count <= ServerLimits.MaxLoggedFailures;
        }

        if (left > 0)
            logger.MoreRequestsFailed(left);
        if (isLogged)
            logger.RequestFailed(peer, command, cause);
    }
}
