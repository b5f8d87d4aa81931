namespace Xnbd.TestKit;

/// <summary>A small file system in memory, which is soon full; unmounted at the end.</summary>
public sealed class TmpfsMount : IDisposable
{
    private TmpfsMount(string path) => Path = path;

    public string Path { get; }

    /// <summary>Mounts it, or skips the test with the reason.</summary>
    /// <param name="folder">Where its mount point is made.</param>
    /// <param name="size">As mount has it, such as "1m".</param>
    public static async Task<TmpfsMount> Create(TempFolder folder, string size)
    {
        Skip.Unless(Environment.UserName == "root", "mounting needs root");
        string path = Directory.CreateDirectory(folder.File("small")).FullName;
        await Tool.Succeed("mount", "-t", "tmpfs", "-o", $"size={size}", "none", path);
        return new TmpfsMount(path);
    }

    /// <summary>The path of a file in it.</summary>
    public string File(string name) => System.IO.Path.Combine(Path, name);

    public void Dispose() => Tool.Succeed("umount", "--lazy", Path).GetAwaiter().GetResult();
}
