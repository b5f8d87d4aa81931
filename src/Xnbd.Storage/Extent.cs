namespace Xnbd.Storage;

/// <summary>Consecutive bytes of a disk of one kind.</summary>
/// <param name="Length">Length in bytes, at least 1.</param>
/// <param name="IsHole">The bytes take no space and read as zeroes.</param>
/// <param name="Depth">
/// Which file holds the bytes: 1 is the topmost layer, or the image itself where there are no layers; 2 is what stands
/// below it, and so on.
/// </param>
public readonly record struct Extent(long Length, bool IsHole, int Depth);

/// <summary>A list of extents in order, up to a fixed number. Neighbours of one kind become one extent.</summary>
/// <param name="capacity">How many extents the list takes, at least 1. It bounds the work of one request.</param>
public sealed class ExtentList(int capacity)
{
    private readonly List<Extent> _extents = [];

    /// <summary>How many more extents the list takes.</summary>
    public int Room => capacity - _extents.Count;

    /// <summary>The sum of the extents' lengths in bytes.</summary>
    public long Length { get; private set; }

    /// <summary>The extents, in order.</summary>
    public IReadOnlyList<Extent> Extents => _extents;

    /// <summary>Forgets all extents.</summary>
    public void Clear()
    {
        _extents.Clear();
        Length = 0;
    }

    /// <summary>Adds an extent.</summary>
    /// <returns>False if the list is full; then the extent was not added.</returns>
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
