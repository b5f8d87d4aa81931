using System.Text.Json;
using System.Text.Json.Nodes;
using System.Text.Json.Serialization;

namespace Xnbd.Programs.Watch;

/// <summary>
/// The answer of the control channel's method <c>watch</c> (docs/control.md): what a proxy is doing at a moment.
/// Numbers that grow count since the start of the proxy, so that several clients can watch, and a rate is a difference.
/// </summary>
internal sealed record WatchReport
{
    /// <summary>Reads a report, of which nothing is believed but that it is one.</summary>
    /// <param name="answer">What the proxy has answered.</param>
    /// <returns>Null if it is no report.</returns>
    public static WatchReport? TryRead(JsonNode? answer)
    {
        try
        {
            WatchReport? report = answer.Deserialize(WatchJson.Default.WatchReport);
            return report is not null
                && Array.TrueForAll(report.RemoteConnections, connection => connection is not null)
                && Array.TrueForAll(report.MissLatency, bucket => bucket is not null)
                ? report
                : null;
        }
        catch (Exception failure) when (failure is JsonException or InvalidOperationException)
        {
            return null;
        }
    }

    /// <summary>Milliseconds since the start of the proxy.</summary>
    public required long UptimeMs { get; init; }

    /// <summary><c>proxy</c>, or <c>target</c> after the switch.</summary>
    public required string Mode { get; init; }

    /// <summary>The remote's URI; null after the switch.</summary>
    public required string? Remote { get; init; }

    /// <summary>How many connections to the remote there should be.</summary>
    public required int RemoteWanted { get; init; }

    /// <summary>The connections to the remote.</summary>
    public required WatchConnection[] RemoteConnections { get; init; }

    /// <summary>For how many milliseconds there has been no connection; null if there is one, or none is needed.
    /// </summary>
    public required long? RemoteLostMs { get; init; }

    /// <summary>Why there is no connection; null if there is one, or none is needed.</summary>
    public required string? RemoteFailure { get; init; }

    /// <summary>Reads that wait for a connection, or for room in one.</summary>
    public required int RemoteWaitingReads { get; init; }

    /// <summary>Reads pass through, and nothing is kept.</summary>
    public required bool Incoming { get; init; }

    /// <summary>Path of the cache image.</summary>
    public required string CacheImage { get; init; }

    /// <summary>Length of the disk in bytes.</summary>
    public required long Size { get; init; }

    /// <summary>Blocks of the disk.</summary>
    public required long Blocks { get; init; }

    /// <summary>Blocks that are not local.</summary>
    public required long MissingBlocks { get; init; }

    /// <summary>Local blocks that are as the remote has them.</summary>
    public required long FetchedBlocks { get; init; }

    /// <summary>Blocks that clients have written or zeroed.</summary>
    public required long WrittenBlocks { get; init; }

    /// <summary>Those of them that were zeroed.</summary>
    public required long ZeroedBlocks { get; init; }

    /// <summary>Bytes that were read from the remote.</summary>
    public required long FetchedBytes { get; init; }

    /// <summary>Bytes that were made zero, because the remote reports zeroes.</summary>
    public required long ZeroBytes { get; init; }

    /// <summary>Reads of the remote that are under way.</summary>
    public required int RequestsInFlight { get; init; }

    /// <summary>Their bytes.</summary>
    public required long BytesInFlight { get; init; }

    /// <summary>Reads, or pieces of reads, that the cache answered at once.</summary>
    public required long Hits { get; init; }

    /// <summary>Reads, or pieces of reads, that had to wait for the remote.</summary>
    public required long Misses { get; init; }

    /// <summary>How long misses took that were answered.</summary>
    public required WatchLatency[] MissLatency { get; init; }

    /// <summary>Connections of clients.</summary>
    public required int Clients { get; init; }

    /// <summary>Bytes that clients have asked for.</summary>
    public required long ClientReadBytes { get; init; }

    /// <summary>Bytes that clients have sent.</summary>
    public required long ClientWrittenBytes { get; init; }

    /// <summary>How often fetched data could not be kept.</summary>
    public required long StoreFailures { get; init; }

    /// <summary>Jobs wait until they are resumed.</summary>
    public required bool CopyPaused { get; init; }

    /// <summary>The last job; null if there was none.</summary>
    public required WatchJob? Job { get; init; }

    /// <summary>The disk, a sign for each cell.</summary>
    public required string Map { get; init; }
}

/// <summary>A connection to the remote.</summary>
/// <param name="Id">Tells it from all others of this proxy.</param>
/// <param name="Requests">Requests that the remote has not answered.</param>
/// <param name="SilentMs">
/// Milliseconds for which the remote has sent nothing while it owes answers; 0 if it owes none.
/// </param>
/// <param name="ReceivedBytes">Bytes that were received, with everything around the data.</param>
internal sealed record WatchConnection(int Id, int Requests, long SilentMs, long ReceivedBytes);

/// <summary>Misses that took about the same time.</summary>
/// <param name="MaxUs">They took at most this time, in microseconds.</param>
/// <param name="Count">How many there were.</param>
internal sealed record WatchLatency(long MaxUs, long Count);

/// <summary>A job.</summary>
/// <param name="Kind"><c>cache-all</c>, <c>prefetch</c>, <c>verify</c> or <c>move</c>.</param>
/// <param name="Phase"><c>fetch</c>, <c>verify</c> or <c>switch</c>.</param>
/// <param name="State"><c>running</c>, <c>done</c>, <c>failed</c> or <c>cancelled</c>.</param>
/// <param name="Error">Why it failed; otherwise null.</param>
/// <param name="ListedBlocks">Blocks of the list that a <c>prefetch</c> fetches; 0 for other jobs.</param>
/// <param name="ListedLeft">Those that are left.</param>
/// <param name="VerifyBlocks">Blocks that are to be compared with the remote; 0 before the comparison.</param>
/// <param name="VerifiedBlocks">Those that are done with.</param>
/// <param name="DifferentBlocks">Those that are not as the remote has them.</param>
internal sealed record WatchJob(
    string Kind,
    string Phase,
    string State,
    string? Error,
    long ListedBlocks,
    long ListedLeft,
    long VerifyBlocks,
    long VerifiedBlocks,
    long DifferentBlocks);

/// <summary>Reads and writes reports.</summary>
[JsonSourceGenerationOptions(
    PropertyNamingPolicy = JsonKnownNamingPolicy.KebabCaseLower,
    RespectNullableAnnotations = true,
    RespectRequiredConstructorParameters = true)]
[JsonSerializable(typeof(WatchReport))]
internal sealed partial class WatchJson : JsonSerializerContext;
