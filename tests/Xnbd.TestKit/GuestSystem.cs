using System.Text;

namespace Xnbd.TestKit;

/// <summary>
/// The system of a <see cref="Guest"/>: Debian's kernel, and an initramfs with busybox, kernel modules and the files of
/// a test. All of it is in memory, so a guest's disks hold nothing but what the test puts there.
/// </summary>
public sealed class GuestSystem
{
    private const int FileMode = 0x81ED, DirectoryMode = 0x41ED; // a regular file and a directory, of rwxr-xr-x

    private static readonly string s_folder = Path.Combine(Repository.Root, "out", "guest");

    /// <summary>Builds the initramfs, or skips the test with the reason.</summary>
    /// <param name="folder">Where it is built.</param>
    /// <param name="modules">Kernel modules to be loaded at the start; those that they need are loaded before.</param>
    /// <param name="files">Further files, all executable, by their path in the guest, such as "bin/work".</param>
    public GuestSystem(TempFolder folder, string[] modules, params (string Path, string Content)[] files)
    {
        string? reason = !Directory.Exists(s_folder) ? "script/setup could not unpack the system of the guest"
            : Tool.Find(Guest.Program) is null ? $"{Guest.Program} is absent" : null;
        if (reason is not null && Environment.GetEnvironmentVariable("CI") is not null)
            throw new InvalidOperationException($"virtual machines are tested in CI, but {reason}");
        Skip.Unless(reason is null, reason ?? "");

        Kernel = Path.Combine(s_folder, "vmlinuz");
        Initramfs = folder.File("initramfs");
        var order = new List<string>();
        foreach (string module in modules)
            AddModule(module, order);
        using FileStream archive = File.Create(Initramfs);
        foreach (string directory in (string[])["bin", "dev", "lib", "mnt", "proc", "sys", "tmp"])
            Add(archive, directory, DirectoryMode, []);
        Add(archive, "bin/busybox", FileMode, File.ReadAllBytes(Path.Combine(s_folder, "busybox")));
        foreach (string module in order)
            Add(archive, $"lib/{module}.ko", FileMode, ReadModule(module));
        foreach ((string path, string content) in files)
            Add(archive, path, FileMode, Encoding.UTF8.GetBytes(content));
        Add(archive, "init", FileMode, Encoding.UTF8.GetBytes(Init(order)));
        Add(archive, "TRAILER!!!", 0, []);
    }

    /// <summary>The kernel's file.</summary>
    public string Kernel { get; }

    /// <summary>The initramfs' file.</summary>
    public string Initramfs { get; }

    /// <summary>
    /// The first process: it loads the modules, and runs a shell on the second serial line. A guest that is forgotten
    /// ends by itself after 15 minutes. The shell's output goes through a pipe, so that it does not prompt.
    /// </summary>
    private static string Init(IEnumerable<string> modules) => $"""
        #!/bin/busybox sh
        /bin/busybox --install -s /bin
        export PATH=/bin HOME=/tmp
        mount -t proc proc /proc
        mount -t sysfs sys /sys
        mount -t devtmpfs dev /dev
        mount -t tmpfs tmp /tmp
        for module in {string.Join(' ', modules)}; do insmod /lib/$module.ko; done
        (sleep 900; poweroff -f) &
        exec < /dev/ttyS1 > /dev/ttyS1 2>&1
        stty raw -echo
        echo "{Guest.Ready}"
        sh | cat
        poweroff -f

        """;

    /// <summary>A module's file; the kernel has "-" and "_" for the same.</summary>
    private static byte[] ReadModule(string module)
    {
        string folder = Path.Combine(s_folder, "modules");
        string underscores = Path.Combine(folder, module + ".ko");
        return File.ReadAllBytes(
            File.Exists(underscores) ? underscores : Path.Combine(folder, module.Replace('_', '-') + ".ko"));
    }

    /// <summary>Adds a module after those that it needs, which it names itself.</summary>
    private static void AddModule(string module, List<string> order)
    {
        if (order.Contains(module))
            return;
        byte[] file = ReadModule(module);
        ReadOnlySpan<byte> key = "\0depends="u8;
        ReadOnlySpan<byte> needs = file.AsSpan(file.AsSpan().IndexOf(key) + key.Length);
        string names = Encoding.ASCII.GetString(needs[..needs.IndexOf((byte)0)]);
        foreach (string name in names.Split(',', StringSplitOptions.RemoveEmptyEntries))
            AddModule(name, order);
        order.Add(module);
    }

    /// <summary>Adds an entry in the format that the kernel calls "newc".</summary>
    private static void Add(FileStream archive, string name, int mode, byte[] content)
    {
        // number, mode, owner, group, links, time, length, four parts of devices, length of the name, checksum
        int number = (int)archive.Position;
        int[] fields = [number, mode, 0, 0, 1, 0, content.Length, 0, 0, 0, 0, name.Length + 1, 0];
        archive.Write(Encoding.ASCII.GetBytes($"070701{string.Concat(fields.Select(f => $"{f:X8}"))}{name}\0"));
        Pad();
        archive.Write(content);
        Pad();

        void Pad() => archive.Write(new byte[-archive.Position & 3]);
    }
}
