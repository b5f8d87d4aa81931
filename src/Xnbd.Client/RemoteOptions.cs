using Microsoft.Extensions.Logging;
using Xnbd.Storage;

namespace Xnbd.Client;

/// <summary>How a remote disk is reached.</summary>
public sealed record RemoteOptions
{
    /// <summary>
    /// How long a server may be silent before its connection is given up, unless reads wait for a shorter time.
    /// </summary>
    public static readonly TimeSpan SilenceTime = TimeSpan.FromSeconds(30);

    /// <summary>Patience without an end.</summary>
    public static readonly TimeSpan Forever = TimeSpan.MaxValue;

    /// <summary>Servers that have the disk, which are tried in turn; at least one.</summary>
    public required IReadOnlyList<RemoteAddress> Servers { get; init; }

    /// <summary>
    /// The server from which all that is known of the disk was read. It is tried first, and is believed even if its
    /// disk has changed since.
    /// </summary>
    public RemoteAddress? LastServer { get; init; }

    /// <summary>
    /// Takes blocks of the disk that are known: a server other than the last one must have them. It waits for no
    /// server.
    /// </summary>
    public Func<DiskSamples> TakeSamples { get; init; } = () => DiskSamples.None;

    /// <summary>
    /// Records the server that is believed from now on, before anything is read from it. If it throws a
    /// <see cref="DiskException"/>, the server is not used. It waits for no server.
    /// </summary>
    public Action<RemoteAddress> Record { get; init; } = _ => { };

    /// <summary>
    /// Length of the disk in bytes: a server with another one is passed over. Null if it is not known.
    /// </summary>
    public long? ExpectedLength { get; init; }

    /// <summary>The id of this proxy, by which a circle of proxies is recognized; see <c>NbdProxyTrail</c>.</summary>
    public ulong ProxyId { get; init; }

    /// <summary>How many connections are made at most, if the server allows several; at least 1.</summary>
    public int MaxConnections { get; init; } = 1;

    /// <summary>
    /// How long a read waits for a server that is away or silent, before it fails. Zero: a read fails at once while
    /// there is no connection.
    /// </summary>
    public TimeSpan Patience { get; init; } = Forever;

    /// <summary>Told when connections break and come back.</summary>
    public required ILogger Log { get; init; }

    /// <summary>
    /// Told when the last connection is lost, and when there is one again, in this order. It is called on a thread of
    /// this type, and must not wait.
    /// </summary>
    public Action<RemoteChange>? Changed { get; init; }

    /// <summary>The clock for patience and silence.</summary>
    public TimeProvider Time { get; init; } = TimeProvider.System;

    /// <summary>
    /// How long a server may be silent while it owes replies. It is never zero, since every line has a delay.
    /// </summary>
    internal TimeSpan Silence
        => Patience == TimeSpan.Zero ? RemoteAddress.UnacknowledgedTime
            : Patience < SilenceTime ? Patience : SilenceTime;
}

/// <summary>The remote was lost, or is back.</summary>
/// <param name="IsLost">There is no connection any more.</param>
/// <param name="Address">The server.</param>
/// <param name="Reason">Why it was lost; empty when it is back.</param>
/// <param name="Away">How long it was away, when it is back.</param>
/// <param name="WaitingReads">How many reads wait for it, when it is lost.</param>
public sealed record RemoteChange(bool IsLost, RemoteAddress Address, string Reason, TimeSpan Away, int WaitingReads);
