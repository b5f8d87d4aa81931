using System.Globalization;

namespace Xnbd.Protocol;

/// <summary>
/// The trail of a proxy: its own id, and those of the proxies that its reads pass through. A proxy appends it to the
/// description of its export (<c>NBD_INFO_DESCRIPTION</c>), and refuses a server whose trail has its own id: a read
/// would come back to where it began.
/// <para>The text at the end of the description: <c>[proxy ID ID ...]</c>, each id with 16 hexadecimal digits.</para>
/// </summary>
public static class NbdProxyTrail
{
    /// <summary>The longest trail: a longer one is cut.</summary>
    public const int MaxIds = 32;

    private const string Start = "[proxy", End = "]";

    /// <summary>Appends a trail to a description.</summary>
    /// <param name="description">What people read.</param>
    /// <param name="ids">The proxy's own id first.</param>
    public static string Append(string description, IEnumerable<ulong> ids)
        => $"{description} {Start}{string.Concat(ids.Take(MaxIds).Select(id => $" {id:x16}"))}{End}";

    /// <summary>Finds the trail in a description.</summary>
    /// <returns>The ids; empty if there is no trail, or another text at its place.</returns>
    public static IReadOnlyList<ulong> Find(string description)
    {
        int start = description.LastIndexOf(Start, StringComparison.Ordinal);
        if (start < 0 || !description.EndsWith(End, StringComparison.Ordinal))
            return [];
        var ids = new List<ulong>();
        foreach (string word in description[(start + Start.Length)..^End.Length].Split(' ').Skip(1))
        {
            if (ids.Count == MaxIds || word.Length != 16
                || !ulong.TryParse(word, NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out ulong id))
                return [];
            ids.Add(id);
        }

        return ids;
    }
}
