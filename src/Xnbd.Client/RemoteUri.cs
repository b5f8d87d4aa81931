using System.Globalization;
using System.Text;
using Xnbd.Protocol;

namespace Xnbd.Client;

/// <summary>
/// URIs of NBD servers (<c>doc/uri.md</c> of the NBD project): <c>nbd://HOST[:PORT]/EXPORT</c> and
/// <c>nbd+unix:///EXPORT?socket=PATH</c>.
/// </summary>
public static class RemoteUri
{
    /// <summary>The TCP port that is registered for NBD.</summary>
    public const int DefaultPort = 10809;

    private const string Tcp = "nbd", Unix = "nbd+unix";

    private static readonly UTF8Encoding s_strict
        = new(encoderShouldEmitUTF8Identifier: false, throwOnInvalidBytes: true);

    /// <summary>Whether a word is meant as a URI of an NBD server, also if it is malformed.</summary>
    /// <param name="word">Any text.</param>
    public static bool IsUri(string word)
        => word.StartsWith("nbd", StringComparison.OrdinalIgnoreCase)
            && word.IndexOf("://", StringComparison.Ordinal) is > 0 and var end
            && word.AsSpan(0, end).IndexOfAny("/?#") < 0;

    /// <summary>Parses a URI. A relative path of a socket begins at the present folder.</summary>
    /// <param name="uri">The URI.</param>
    /// <param name="exportName">The export, given apart from the URI; null if it was not given.</param>
    /// <exception cref="FormatException">
    /// It is no URI of an NBD server, or the export is named twice; the message says why.
    /// </exception>
    public static RemoteAddress Parse(string uri, string? exportName)
    {
        int schemeEnd = uri.IndexOf("://", StringComparison.Ordinal);
        string scheme = schemeEnd < 0 ? "" : uri[..schemeEnd].ToLowerInvariant();
        if (scheme.StartsWith("nbds", StringComparison.Ordinal))
            throw new FormatException($"'{uri}': TLS is not supported yet");
        if (scheme is not (Tcp or Unix))
            throw new FormatException($"'{uri}': the URI of an NBD server begins with nbd:// or nbd+unix://");
        if (uri.Contains('#', StringComparison.Ordinal))
            throw new FormatException($"'{uri}': a # in a name is written %23");

        string rest = uri[(schemeEnd + 3)..];
        int queryStart = rest.IndexOf('?', StringComparison.Ordinal);
        string[] parameters = queryStart < 0 ? [] : rest[(queryStart + 1)..].Split('&');
        rest = queryStart < 0 ? rest : rest[..queryStart];
        int pathStart = rest.IndexOf('/', StringComparison.Ordinal);
        string authority = pathStart < 0 ? rest : rest[..pathStart];
        string export = pathStart < 0 ? "" : Decode(uri, rest[(pathStart + 1)..]);
        if (exportName is not null && export.Length > 0)
            throw new FormatException($"'{uri}' names an export, and so does an option: give one of them");
        bool isForTls = authority.Contains('@', StringComparison.Ordinal)
            || Array.Exists(parameters, p => p.StartsWith("tls-", StringComparison.Ordinal));
        if (isForTls)
            throw new FormatException(
                $"'{uri}': TLS is not supported yet, and user names and tls- parameters are for TLS");

        string[] sockets = [.. parameters.Where(p => p.StartsWith("socket=", StringComparison.Ordinal))];
        export = exportName ?? export;
        if (scheme == Unix)
        {
            if (authority.Length > 0)
                throw new FormatException(
                    $"'{uri}': a Unix socket has no host: nbd+unix:///{authority}?socket=PATH names an export");
            if (sockets.Length != 1)
                throw new FormatException($"'{uri}': the socket's path is missing, as in nbd+unix:///?socket=PATH");
            return RemoteAddress.OfSocket(Decode(uri, sockets[0]["socket=".Length..]), export);
        }

        if (sockets.Length > 0)
            throw new FormatException($"'{uri}': a socket goes with nbd+unix://");
        (string host, string port) = SplitAuthority(uri, authority);
        return RemoteAddress.Parse(Decode(uri, host), port, export);
    }

    /// <summary>Writes a part of a URI, with all characters that have a meaning there as %XX.</summary>
    internal static string EscapePath(string path)
    {
        var escaped = new StringBuilder();
        foreach (char c in path)
        {
            if (c is <= ' ' or '%' or '&' or '#' or '?' or '+' or '\x7f')
                escaped.Append(CultureInfo.InvariantCulture, $"%{(int)c:X2}");
            else
                escaped.Append(c);
        }

        return escaped.ToString();
    }

    private static (string Host, string Port) SplitAuthority(string uri, string authority)
    {
        string port = "";
        int hostEnd = authority.StartsWith('[')
            ? authority.IndexOf(']', StringComparison.Ordinal) + 1
            : authority.IndexOf(':', StringComparison.Ordinal);
        if (authority.StartsWith('[') && (hostEnd == 0 || (hostEnd < authority.Length && authority[hostEnd] != ':')))
            throw new FormatException($"'{uri}': an IPv6 address is written [ADDRESS], and a port behind it :PORT");
        if (hostEnd >= 0 && hostEnd < authority.Length)
        {
            port = authority[(hostEnd + 1)..];
            authority = authority[..hostEnd];
            if (port.Contains(':', StringComparison.Ordinal))
                throw new FormatException($"'{uri}': an IPv6 address is written [ADDRESS]");
        }

        if (authority is "" or "[]")
            throw new FormatException($"'{uri}': the host is missing");
        return (authority, port.Length > 0 ? port : DefaultPort.ToString(CultureInfo.InvariantCulture));
    }

    private static string Decode(string uri, string part)
    {
        byte[] bytes = Encoding.UTF8.GetBytes(part);
        var decoded = new List<byte>(bytes.Length);
        for (int i = 0; i < bytes.Length; i++)
        {
            if (bytes[i] != '%')
            {
                decoded.Add(bytes[i]);
                continue;
            }

            if (i + 2 >= bytes.Length
                || !char.IsAsciiHexDigit((char)bytes[i + 1])
                || !char.IsAsciiHexDigit((char)bytes[i + 2]))
                throw new FormatException(
                    $"'{uri}': behind a % stand two hexadecimal digits; the sign itself is written %25");
            decoded.Add(Convert.FromHexString([(char)bytes[i + 1], (char)bytes[i + 2]])[0]);
            i += 2;
        }

        try
        {
            string text = s_strict.GetString([.. decoded]);
            _ = NbdString.GetBytes(text);
            return text;
        }
        catch (ArgumentException)
        {
            throw new FormatException(
                $"'{uri}': a name in it is not valid UTF-8, holds a NUL character, or is longer than"
                + $" {NbdSize.MaxString} bytes");
        }
    }
}
