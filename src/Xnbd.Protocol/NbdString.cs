using System.Diagnostics.CodeAnalysis;
using System.Text;

namespace Xnbd.Protocol;

/// <summary>Strings as the protocol has them: UTF-8, no NUL, at most 4096 bytes (section "Conventions").</summary>
public static class NbdString
{
    private static readonly UTF8Encoding Strict = new(encoderShouldEmitUTF8Identifier: false, throwOnInvalidBytes: true);

    /// <summary>Reads a string that fills <paramref name="source"/>.</summary>
    /// <returns>False when it is too long, holds a NUL, or is not UTF-8.</returns>
    public static bool TryRead(ReadOnlySpan<byte> source, [NotNullWhen(true)] out string? text)
    {
        text = null;
        if (source.Length > NbdSize.MaxString || source.Contains((byte)0) || !System.Text.Unicode.Utf8.IsValid(source))
            return false;
        text = Strict.GetString(source);
        return true;
    }

    /// <summary>The bytes of a string that is to be sent.</summary>
    /// <exception cref="ArgumentException">It is no string of the protocol: too long, with a NUL, or with a lone surrogate.</exception>
    public static byte[] GetBytes(string text)
    {
        byte[] bytes;
        try
        {
            bytes = Strict.GetBytes(text);
        }
        catch (EncoderFallbackException)
        {
            throw new ArgumentException("the text is not valid Unicode", nameof(text));
        }

        if (bytes.Length > NbdSize.MaxString)
            throw new ArgumentException($"the text is longer than {NbdSize.MaxString} bytes", nameof(text));
        if (text.Contains('\0', StringComparison.Ordinal))
            throw new ArgumentException("the text holds a NUL character", nameof(text));
        return bytes;
    }
}
