namespace Xnbd.Storage;

/// <summary>Consecutive bytes of a disk of one kind.</summary>
/// <param name="Length">In bytes, at least 1.</param>
/// <param name="IsHole">They take no space and read as zeroes.</param>
public readonly record struct Extent(long Length, bool IsHole);

/// <summary>Extents in order, up to a fixed number of them; neighbours of one kind become one.</summary>
/// <param name="capacity">The most it takes, at least 1: the bound on the work of one request.</param>
public sealed class ExtentList(int capacity)
{
    private readonly List<Extent> _extents = [];

    /// <summary>How many there are.</summary>
    public int Count => _extents.Count;

    /// <summary>The sum of their lengths, in bytes.</summary>
    public long Length { get; private set; }

    /// <summary>The extents.</summary>
    public IReadOnlyList<Extent> Extents => _extents;

    /// <summary>Adds an extent.</summary>
    /// <returns>False when the list is full and the extent was not taken.</returns>
    public bool Add(long length, bool isHole)
    {
        if (_extents.Count > 0 && _extents[^1].IsHole == isHole)
            _extents[^1] = new Extent(_extents[^1].Length + length, isHole);
        else if (_extents.Count < capacity)
            _extents.Add(new Extent(length, isHole));
        else
            return false;
        Length += length;
        return true;
    }
}
