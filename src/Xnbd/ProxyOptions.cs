using Xnbd.Client;
using Xnbd.Server;
using Xnbd.Storage.Cache;

namespace Xnbd.Programs;

/// <summary>The options of the proxy mode.</summary>
internal sealed record ProxyOptions
{
    public const int DefaultConnections = 4;
    public const int DefaultRequests = 1024; // eight clients with as many requests as a client may have
    public const int DefaultBytes = 64 << 20;

    /// <summary>Servers of the disk, in the order in which they are tried; the first one is the argument.</summary>
    public required IReadOnlyList<RemoteAddress> Remotes { get; init; }

    /// <summary>Their URIs.</summary>
    public IReadOnlyList<string> RemoteNames => [.. Remotes.Select(remote => remote.ToString())];

    public required string CacheImage { get; init; }
    public required string Map { get; init; }
    public required string ControlSocket { get; init; }
    public int Connections { get; init; }
    public int WaitSeconds { get; init; }

    /// <summary>How long a read of a missing block waits for a lost remote; see <see cref="RemoteOptions"/>.</summary>
    public TimeSpan RemoteTimeout { get; init; } = RemoteOptions.Forever;

    public CacheOpening Opening { get; init; }

    /// <summary>Until the first write of a client, reads pass through, and nothing is kept.</summary>
    public bool Incoming { get; init; }

    /// <summary>How fast the background copy may be, in bytes per second; 0 for no limit.</summary>
    public long MaxCopyRate { get; init; }

    /// <summary>The program that is told of events; null for none.</summary>
    public string? OnEvent { get; init; }
    public int MaxRequests { get; init; }
    public int MaxBytes { get; init; }

    /// <summary>
    /// Limits on requests of clients that are in flight. When a limit is reached, the server stops reading from clients
    /// that need data.
    /// </summary>
    public RequestLimits ClientLimits => new(MaxRequests, MaxBytes / 2);

    /// <summary>Limits on requests to the remote.</summary>
    public CacheLimits FetchLimits => new(MaxRequests, MaxBytes / 2);

    /// <summary>Reads the arguments: a remote's host and port, or its URI; two files; a socket.</summary>
    /// <param name="words">The arguments.</param>
    /// <param name="exportName">The export of that remote; null if the option was not given.</param>
    /// <param name="further">URIs of further servers.</param>
    public static ProxyOptions Parse(string[] words, string? exportName, string[] further)
    {
        bool isUri = words.Length > 0 && RemoteUri.IsUri(words[0]);
        if (words.Length != (isUri ? 4 : 5))
        {
            const string files = "CACHE_IMAGE CACHE_BITMAP_IMAGE CONTROL_SOCKET_PATH";
            string wanted = isUri
                ? $"four arguments, if the first one is a URI: URI {files}"
                : $"five arguments, REMOTE_HOST REMOTE_PORT {files}";
            throw new UsageException($"--proxy takes {wanted}; {words.Length} were given");
        }

        if (words.Contains(""))
            throw new UsageException("an argument is empty");
        try
        {
            RemoteAddress remote = isUri
                ? RemoteUri.Parse(words[0], exportName)
                : RemoteAddress.Parse(words[0], words[1], exportName ?? "");
            return new ProxyOptions
            {
                Remotes = [.. further.Select(uri => ParseFurther(uri)).Prepend(remote).Distinct()],
                CacheImage = Path.GetFullPath(words[^3]),
                Map = Path.GetFullPath(words[^2]),
                ControlSocket = Path.GetFullPath(words[^1]),
            };
        }
        catch (FormatException failure)
        {
            throw new UsageException(failure.Message);
        }
    }

    private static RemoteAddress ParseFurther(string uri)
        => RemoteUri.IsUri(uri)
            ? RemoteUri.Parse(uri, null)
            : throw new FormatException($"--remote {uri}: a URI is wanted, such as nbd://HOST:PORT/EXPORT");
}
