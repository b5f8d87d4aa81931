namespace Xnbd.TestKit;

/// <summary>A folder that is removed at the end of the test.</summary>
public sealed class TempFolder : IDisposable
{
    /// <param name="root">The folder in which it is created; null for the system's temporary folder.</param>
    public TempFolder(string? root = null)
    {
        string name = "xnbd-test-" + Guid.NewGuid().ToString("N")[..12];
        Path = Directory.CreateDirectory(System.IO.Path.Combine(root ?? System.IO.Path.GetTempPath(), name)).FullName;
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
