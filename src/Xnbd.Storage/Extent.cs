namespace Xnbd.Storage;

/// <summary>Consecutive bytes of a disk of one kind.</summary>
/// <param name="Length">In bytes, at least 1.</param>
/// <param name="IsHole">They take no space and read as zeroes.</param>
/// <param name="Depth">Which file holds them: 1 is the topmost layer, or the image itself where there are no layers; 2 is what stands below, and so on.</param>
public readonly record struct Extent(long Length, bool IsHole, int Depth);

/// <summary>Extents in order, up to a fixed number of them; neighbours of one kind become one.</summary>
/// <param name="capacity">The most it takes, at least 1: the bound on the work of one request.</param>
public sealed class ExtentList(int capacity)
{
    private readonly List<Extent> _extents = [];

    /// <summary>How many more there is room for.</summary>
    public int Room => capacity - _extents.Count;

    /// <summary>The sum of their lengths, in bytes.</summary>
    public long Length { get; private set; }

    /// <summary>The extents.</summary>
    public IReadOnlyList<Extent> Extents => _extents;

    /// <summary>Forgets all extents.</summary>
    public void Clear()
    {
        _extents.Clear();
        Length = 0;
    }

    /// <summary>Adds an extent.</summary>
    /// <returns>False when the list is full and the extent was not taken.</returns>
    public bool Add(long length, bool isHole, int depth = 1)
    {
        if (_extents.Count > 0 && _extents[^1] is var last && last.IsHole == isHole && last.Depth == depth)
            _extents[^1] = last with { Length = last.Length + length };
        else if (Room > 0)
            _extents.Add(new Extent(length, isHole, depth));
        else
            return false;
        Length += length;
        return true;
    }
}
