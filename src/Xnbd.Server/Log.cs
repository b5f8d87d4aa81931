using Microsoft.Extensions.Logging;
using Xnbd.Protocol;

namespace Xnbd.Server;

/// <summary>The server's log messages.</summary>
internal static partial class Log
{
    [LoggerMessage(Level = LogLevel.Information, Message = "listening on {Place}: {Uri}")]
    public static partial void Listening(this ILogger logger, string place, string uri);

    [LoggerMessage(Level = LogLevel.Information, Message = "{Peer}: serving export '{Export}'")]
    public static partial void SessionStarted(this ILogger logger, string peer, string export);

    [LoggerMessage(Level = LogLevel.Information, Message = "{Peer}: {Reason} after {Count} requests: read {Read}, wrote {Written}, {Seconds:0.0} s")]
    public static partial void SessionEnded(
        this ILogger logger, string peer, string reason, long count, string read, string written, double seconds);

    [LoggerMessage(Level = LogLevel.Information, Message = "{Peer}: no session: {Reason}")]
    public static partial void HandshakeEnded(this ILogger logger, string peer, string reason);

    [LoggerMessage(Level = LogLevel.Error, Message = "{Peer}: {Command} failed: {Cause}")]
    public static partial void RequestFailed(this ILogger logger, string peer, NbdCommand command, string cause);

    [LoggerMessage(Level = LogLevel.Error, Message = "{Count} more requests failed within a second")]
    public static partial void MoreRequestsFailed(this ILogger logger, long count);

    [LoggerMessage(Level = LogLevel.Error, Message = "a connection was refused: {Cause}")]
    public static partial void Refused(this ILogger logger, string cause);

    [LoggerMessage(Level = LogLevel.Error, Message = "{Count} more connections were refused")]
    public static partial void MoreRefused(this ILogger logger, long count);

    [LoggerMessage(Level = LogLevel.Error, Message = "{Peer}: internal error, the connection is closed: {Cause}")]
    public static partial void SessionCrashed(this ILogger logger, string peer, string cause);

    [LoggerMessage(Level = LogLevel.Warning, Message = "{Count} connections did not end in time and are broken off")]
    public static partial void SessionsBrokenOff(this ILogger logger, int count);
}

/// <summary>Logs requests that failed, at most <see cref="MostPerSecond"/> in a second: a dying disk must not fill another one.</summary>
internal sealed class FailureLog(ILogger logger)
{
    private const int MostPerSecond = 10;

    private readonly Lock _lock = new();
    private long _second;
    private long _count;

    /// <summary>Logs a failure, or counts it.</summary>
    public void Log(string peer, NbdCommand command, string cause)
    {
        long left = 0;
        bool isLogged;
        lock (_lock)
        {
            long second = Environment.TickCount64 / 1000;
            if (second != _second)
            {
                left = _count - MostPerSecond;
                (_second, _count) = (second, 0);
            }

            isLogged = ++_count <= MostPerSecond;
        }

        if (left > 0)
            logger.MoreRequestsFailed(left);
        if (isLogged)
            logger.RequestFailed(peer, command, cause);
    }
}

/// <summary>
/// Logs connections that were refused, once in <see cref="s_pause"/>: who is refused tries again soon.
/// </summary>
internal sealed class RefusalLog(ILogger logger)
{
    private static readonly TimeSpan s_pause = TimeSpan.FromSeconds(5);

    private readonly Lock _lock = new();
    private long _lastLine = long.MinValue / 2; // in milliseconds of the system's clock
    private long _unsaid;

    /// <summary>Logs a refusal, or counts it.</summary>
    public void Log(string cause)
    {
        long unsaid;
        lock (_lock)
        {
            if (Environment.TickCount64 - _lastLine < s_pause.TotalMilliseconds)
            {
                _unsaid++;
                return;
            }

            (unsaid, _unsaid) = (_unsaid, 0);
            _lastLine = Environment.TickCount64;
        }

        if (unsaid > 0)
            logger.MoreRefused(unsaid);
        logger.Refused(cause);
    }
}
