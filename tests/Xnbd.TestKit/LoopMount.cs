namespace Xnbd.TestKit;

/// <summary>A file system of some kind on a loop device, unmounted at the end.</summary>
public sealed class LoopMount : IDisposable
{
    private LoopMount(string path) => Path = path;

    public string Path { get; }

    /// <summary>Makes and mounts it, or skips the test with the reason.</summary>
    /// <param name="folder">Where its image and its mount point are made.</param>
    /// <param name="kind">The file system, as mkfs names it.</param>
    /// <param name="length">Length of its image in bytes.</param>
    /// <param name="options">Further options of mkfs, such as "-bsize=16384" for XFS.</param>
    public static async Task<LoopMount> Create(TempFolder folder, string kind, long length, params string[] options)
    {
        Skip.Unless(Environment.UserName == "root", "mounting needs root");
        Skip.Unless(Tool.Find($"mkfs.{kind}") is not null, $"mkfs.{kind} is absent");
        string image = folder.Sparse($"{kind}.img", length);
        await Tool.Succeed($"mkfs.{kind}", [kind == "ext4" ? "-Fq" : "-fq", .. options, image]);
        string path = Directory.CreateDirectory(folder.File(kind)).FullName;
        ToolResult mount = await Tool.Run("mount", "-o", "loop", image, path);
        Skip.Unless(mount.ExitCode == 0, $"{kind} cannot be mounted here: {mount.Errors.Trim()}");
        return new LoopMount(path);
    }

    public void Dispose() => Tool.Succeed("umount", "--lazy", Path).GetAwaiter().GetResult();
}

/// <summary>Skips a test with a reason, in the way that xunit.v3 recognises.</summary>
public static class Skip
{
    public static void Unless(bool condition, string reason)
    {
        if (!condition)
            throw new InvalidOperationException("$XunitDynamicSkip$" + reason);
    }
}
