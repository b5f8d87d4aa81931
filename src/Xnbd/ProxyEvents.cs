using System.Globalization;
using Microsoft.Extensions.Logging;
using Xnbd.Client;
using Xnbd.Storage;
using Xnbd.Storage.Cache;

namespace Xnbd.Programs;

/// <summary>
/// The events of a proxy that its administrator wants to know: each is logged once, with its numbers, and told to the
/// program of <c>--on-event</c> (docs/xnbd-server.8). Any thread may call anything; nobody waits.
/// </summary>
/// <param name="options">The proxy's options.</param>
/// <param name="log">The server's log.</param>
/// <exception cref="FailureException">The program cannot be run.</exception>
internal sealed class ProxyEvents(ProxyOptions options, ILogger log) : IDisposable
{
    /// <summary>What the names of the variables begin with.</summary>
    public const string Prefix = "XNBD_";

    private readonly ProxyOptions _options = options;
    private readonly ILogger _log = log;
    private readonly EventHook? _hook = options.OnEvent is { } path ? new EventHook(path, log) : null;

    /// <summary>The remote was lost, or is back.</summary>
    public void Remote(RemoteChange change)
    {
        if (change.IsLost)
        {
            _log.LogWarning("the remote is lost, {Count} reads wait: {Reason}", change.WaitingReads, change.Reason);
            Tell("remote-lost", ("REMOTE", change.Address), ("READS", change.WaitingReads), ("REASON", change.Reason));
        }
        else
        {
            _log.LogInformation(
                "the remote is back after {Seconds:0.0} s: {Address}", change.Away.TotalSeconds, change.Address);
            Tell("remote-back", ("REMOTE", change.Address), Seconds(change.Away));
        }
    }

    /// <summary>Nothing is missing any more.</summary>
    /// <param name="before">The figures when the copy began.</param>
    /// <param name="after">The figures now.</param>
    /// <param name="time">How long it took.</param>
    public void Copied(CacheStatistics before, CacheStatistics after, TimeSpan time)
    {
        long bytes = after.FetchedBytes - before.FetchedBytes, zeroes = after.ZeroBytes - before.ZeroBytes;
        _log.LogInformation(
            "all is cached: {Fetched} fetched, {Zeroes} of zeroes, {Seconds:0.0} s",
            ByteCount.Describe(bytes),
            ByteCount.Describe(zeroes),
            time.TotalSeconds);
        Tell("copied", ("BYTES", bytes), ("ZERO_BYTES", zeroes), Seconds(time));
    }

    /// <summary>What was fetched was compared.</summary>
    public void Verified(CacheVerification result, TimeSpan time)
    {
        long compared = result.DoneBlocks - result.WrittenBlocks;
        _log.Log(
            result.DifferentBlocks == 0 ? LogLevel.Information : LogLevel.Error,
            "verified: {Blocks} blocks compared, {Different} differ, {Read} read, {Seconds:0.0} s",
            compared,
            result.DifferentBlocks,
            ByteCount.Describe(result.ReadBytes),
            time.TotalSeconds);
        Tell(
            "verified",
            ("BLOCKS", compared),
            ("DIFFERENT_BLOCKS", result.DifferentBlocks),
            ("BYTES", result.ReadBytes),
            Seconds(time));
    }

    /// <summary>The cache image alone is the disk.</summary>
    /// <param name="givenUpBlocks">Blocks that were missing, and are zeroes now.</param>
    /// <param name="time">How long the switch took.</param>
    public void Switched(long givenUpBlocks, TimeSpan time)
    {
        _log.LogInformation(
            "switched: this is a target now, of '{Image}'; the remote is no longer used; {Seconds:0.000} s, "
                + "{Missing} missing blocks became zeroes",
            _options.CacheImage,
            time.TotalSeconds,
            givenUpBlocks);
        Tell("switched", ("GIVEN_UP_BLOCKS", givenUpBlocks), Seconds(time));
    }

    /// <inheritdoc/>
    public void Dispose() => _hook?.Dispose();

    private static (string, object) Seconds(TimeSpan time)
        => ("SECONDS", time.TotalSeconds.ToString("0.000", CultureInfo.InvariantCulture));

    private void Tell(string name, params (string Name, object Value)[] values)
    {
        (string, object)[] all =
        [
            ("EVENT", name),
            ("CACHE_IMAGE", _options.CacheImage),
            ("CONTROL_SOCKET", _options.ControlSocket),
            .. values,
        ];
        _hook?.Tell(name, [.. all.Select(value => $"{Prefix}{value.Item1}={Clean(value.Item2)}")]);
    }

    /// <summary>Without control characters: some of the text comes from a server.</summary>
    private static string Clean(object value)
        => string.Concat(
            Convert.ToString(value, CultureInfo.InvariantCulture)!.Select(c => char.IsControl(c) ? '?' : c));
}
