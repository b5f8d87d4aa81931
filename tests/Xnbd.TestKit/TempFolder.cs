namespace Xnbd.TestKit;

/// <summary>A folder that goes with the test.</summary>
public sealed class TempFolder : IDisposable
{
    /// <param name="root">Where; null: the system's temporary folder.</param>
    public TempFolder(string? root = null)
    {
        Path = Directory.CreateDirectory(
            System.IO.Path.Combine(root ?? System.IO.Path.GetTempPath(), "xnbd-test-" + Guid.NewGuid().ToString("N")[..12])).FullName;
    }

    public string Path { get; }

    /// <summary>The path of a file in it.</summary>
    public string File(string name) => System.IO.Path.Combine(Path, name);

    /// <summary>A sparse file of a length.</summary>
    public string Sparse(string name, long length)
    {
        using FileStream file = System.IO.File.Create(File(name));
        file.SetLength(length);
        return file.Name;
    }

    /// <summary>A file of seeded random bytes.</summary>
    public string Random(string name, int length, int seed = 1)
    {
        byte[] bytes = new byte[length];
        new Random(seed).NextBytes(bytes);
        System.IO.File.WriteAllBytes(File(name), bytes);
        return File(name);
    }

    public void Dispose() => Directory.Delete(Path, recursive: true);
}
