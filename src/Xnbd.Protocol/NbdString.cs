using System.Diagnostics.CodeAnalysis;
using System.Text;

namespace Xnbd.Protocol;

/// <summary>Strings as the protocol has them: UTF-8, no NUL, at most 4096 bytes (section "Conventions").</summary>
public static class NbdString
{
    private static readonly UTF8Encoding s_strict
        = new(encoderShouldEmitUTF8Identifier: false, throwOnInvalidBytes: true);

    /// <summary>Reads a string that fills <paramref name="source"/>.</summary>
    /// <returns>False when it is too long, holds a NUL, or is not UTF-8.</returns>
    public static bool TryRead(ReadOnlySpan<byte> source, [NotNullWhen(true)] out string? text)
    {
        text = null;
        if (source.Length > NbdSize.MaxString || source.Contains((byte)0) || !System.Text.Unicode.Utf8.IsValid(source))
            return false;
        text = s_strict.GetString(source);
        return true;
    }

    /// <summary>Says why a text cannot be a string of the protocol.</summary>
    /// <returns>The fault, for people; null when the text can be one.</returns>
    public static string? FindFault(string text)
    {
        if (text.Contains('\0', StringComparison.Ordinal))
            return "the text holds a NUL character";
        try
        {
            return s_strict.GetByteCount(text) > NbdSize.MaxString
                ? $"the text is longer than {NbdSize.MaxString} bytes" : null;
        }
        catch (EncoderFallbackException)
        {
            return "the text is not valid Unicode";
        }
    }

    /// <summary>The bytes of a string that is to be sent.</summary>
    /// <exception cref="ArgumentException"><see cref="FindFault"/> finds a fault.</exception>
    public static byte[] GetBytes(string text)
        => FindFault(text) is { } fault ? throw new ArgumentException(fault, nameof(text)) : s_strict.GetBytes(text);
}
