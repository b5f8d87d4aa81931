using System.Globalization;

namespace Xnbd.Storage;

/// <summary>Byte counts for people.</summary>
public static class ByteCount
{
    private static readonly string[] s_units = ["KiB", "MiB", "GiB", "TiB"];

    /// <summary>A count in the largest unit that fits, such as "1.2 GiB"; below 1024, such as "17 bytes".</summary>
    /// <param name="bytes">At least 0.</param>
    public static string Describe(long bytes)
    {
        double value = bytes;
        int unit = -1;
        for (; value >= 1024 && unit < s_units.Length - 1; unit++)
            value /= 1024;
        return unit < 0
            ? string.Create(CultureInfo.InvariantCulture, $"{bytes} bytes")
            : string.Create(CultureInfo.InvariantCulture, $"{value:0.#} {s_units[unit]}");
    }

    /// <summary>The same, and the exact count behind it, such as "1.2 GiB (1288490188 bytes)".</summary>
    /// <param name="bytes">At least 0.</param>
    public static string DescribeExactly(long bytes)
        => bytes < 1024
            ? Describe(bytes)
            : string.Create(CultureInfo.InvariantCulture, $"{Describe(bytes)} ({bytes} bytes)");

    /// <summary>Reads a count: a number, or one with a unit, such as "50M". K, M, G and T are powers of 1024.</summary>
    /// <param name="text">The text.</param>
    /// <param name="bytes">The count; at least 0.</param>
    /// <returns>Whether it is a count that fits in 63 bits.</returns>
    public static bool TryParse(string text, out long bytes)
    {
        int unit = text.Length == 0 ? -1 : "KMGT".IndexOf(char.ToUpperInvariant(text[^1]), StringComparison.Ordinal);
        string digits = unit < 0 ? text : text[..^1];
        int shift = 10 * (unit + 1);
        bool isCount = long.TryParse(digits, NumberStyles.None, CultureInfo.InvariantCulture, out bytes)
            && bytes <= long.MaxValue >> shift;
        bytes = isCount ? bytes << shift : 0;
        return isCount;
    }
}
