using Microsoft.Extensions.Logging;

namespace Xnbd.Client;

/// <summary>How a remote disk is reached.</summary>
public sealed record RemoteOptions
{
    /// <summary>
    /// How long a server may be silent before its connection is given up, where reads wait as long as that.
    /// </summary>
    public static readonly TimeSpan SilenceTime = TimeSpan.FromSeconds(30);

    /// <summary>Patience without an end.</summary>
    public static readonly TimeSpan Forever = TimeSpan.MaxValue;

    /// <summary>The server and its export.</summary>
    public required RemoteAddress Address { get; init; }

    /// <summary>How many connections are made at most, if the server allows several; at least 1.</summary>
    public int MaxConnections { get; init; } = 1;

    /// <summary>
    /// How long a read waits for a server that is away or silent, before it fails. Zero: a read fails at once while
    /// there is no connection.
    /// </summary>
    public TimeSpan Patience { get; init; } = Forever;

    /// <summary>Told when connections break and come back.</summary>
    public required ILogger Log { get; init; }

    /// <summary>The clock for patience and silence.</summary>
    public TimeProvider Time { get; init; } = TimeProvider.System;

    /// <summary>
    /// How long a server may be silent while it owes replies. A line has a delay, so that this is never zero.
    /// </summary>
    internal TimeSpan Silence
        => Patience == TimeSpan.Zero ? RemoteAddress.UnacknowledgedTime
            : Patience < SilenceTime ? Patience : SilenceTime;
}
