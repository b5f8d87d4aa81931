namespace Xnbd.TestKit;

/// <summary>A file as a block device, detached at the end.</summary>
public sealed class LoopDevice : IDisposable
{
    private LoopDevice(string path) => Path = path;

    /// <summary>The device.</summary>
    public string Path { get; }

    /// <summary>Its name without its folder, as sysfs has it.</summary>
    public string Name => System.IO.Path.GetFileName(Path);

    /// <summary>Attaches a file, or skips the test with the reason.</summary>
    /// <param name="file">The file behind it.</param>
    /// <param name="options">Further options of losetup, such as "--direct-io=on".</param>
    public static async Task<LoopDevice> Attach(string file, params string[] options)
    {
        Skip.Unless(Environment.UserName == "root", "loop devices need root");
        ToolResult loop = await Tool.Run("losetup", ["--find", "--show", .. options, file]);
        Skip.Unless(loop.ExitCode == 0, $"no loop device: {loop.Errors}");
        return new LoopDevice(loop.Output.Trim());
    }

    public void Dispose() => Tool.Succeed("losetup", "--detach", Path).GetAwaiter().GetResult();
}
