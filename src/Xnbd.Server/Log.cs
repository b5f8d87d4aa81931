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

    [LoggerMessage(
        Level = LogLevel.Information,
        Message = "{Peer}: {Reason} after {Count} requests: read {Read}, wrote {Written}, {Seconds:0.0} s")]
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

    [LoggerMessage(Level = LogLevel.Warning, Message = "{Count} connections did not end in time; they are broken off")]
    public static partial void SessionsBrokenOff(this ILogger logger, int count);
}
