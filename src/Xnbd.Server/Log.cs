using Microsoft.Extensions.Logging;
using Xnbd.Protocol;

namespace Xnbd.Server;

/// <summary>The server's log messages.</summary>
internal static partial class Log
{
    [LoggerMessage(Level = LogLevel.Information, Message = "listening on {Place}")]
    public static partial void Listening(this ILogger logger, string place);

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

    [LoggerMessage(Level = LogLevel.Error, Message = "cannot accept a connection: {Cause}")]
    public static partial void AcceptFailed(this ILogger logger, string cause);

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
