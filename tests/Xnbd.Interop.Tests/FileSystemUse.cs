using System.Diagnostics;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>The kernel's ext4 on an NBD disk: nbdfuse makes the disk a file, and a loop device uses it.</summary>
internal static class FileSystemUse
{
    /// <summary>
    /// Makes a file system (on demand), mounts it, writes the files f0 to f19, removes f3, trims, and unmounts.
    /// </summary>
    public static async Task Run(TempFolder folder, string uri, bool make)
    {
        Assert.SkipUnless(Environment.UserName == "root", "mounting needs root");
        Assert.SkipWhen(Tool.Find("nbdfuse") is null, "nbdfuse is absent");
        Assert.SkipUnless(File.Exists("/dev/fuse"), "there is no FUSE here");
        string fuse = Directory.CreateDirectory(folder.File("fuse")).FullName;
        string mount = Directory.CreateDirectory(folder.File("mount")).FullName;
        string disk = Path.Combine(fuse, "disk");
        using var nbdfuse = Process.Start(Tool.Find("nbdfuse")!, [disk, uri]);
        try
        {
            Wait.Until(() => File.Exists(disk), "the disk is a file");
            if (make)
                await Tool.Succeed("mkfs.ext4", "-q", "-F", disk);
            await Tool.Succeed("mount", "-o", "loop", disk, mount);
            try
            {
                for (int i = 0; i < 20; i++)
                {
                    byte[] bytes = [.. Enumerable.Range(i, i * 10_000).Select(value => (byte)value)];
                    File.WriteAllBytes(Path.Combine(mount, $"f{i}"), bytes);
                }

                File.Delete(Path.Combine(mount, "f3"));
                await Tool.Run("fstrim", mount);
            }
            finally
            {
                await Tool.Succeed("umount", mount);
            }
        }
        finally
        {
            await Tool.Run("umount", fuse);
            if (!nbdfuse.WaitForExit(10_000))
                nbdfuse.Kill();
        }
    }
}
