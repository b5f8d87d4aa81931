using System.Diagnostics;
using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;
using Xnbd.Storage.Cache;
using Xnbd.Storage.Images;
using Xnbd.Storage.Layers;
using Xnbd.TestKit;

namespace Xnbd.Storage.Tests;

/// <summary>
/// A file that is refused is free at once, although a child process shares it until it runs its own program.
/// </summary>
public sealed class RefusedFileTests : IDisposable
{
    private const int Rounds = 3000, Children = 50; // without the unlocking, every twenty-fifth round fails

    private readonly TempFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [Fact]
    public void A_refused_layer_gives_its_lock_back_at_once()
    {
        string path = _folder.File("layer");
        LayerStack.OpenKept(_folder.Random("base", 1 << 20), [path], readOnly: false, force: false, _ => { }).Dispose();
        byte[] bytes = File.ReadAllBytes(path);
        bytes[60] ^= 1; // in both copies of the header
        bytes[4096 + 60] ^= 1;
        File.WriteAllBytes(path, bytes);
        WhileProcessesAreStarted(() =>
        {
            DiskException failure = Assert.Throws<DiskException>(() => LayerFile.Open(path, readOnly: false));
            Assert.Equal(DiskError.Damaged, failure.Error);
            AssertIsFree(path);
        });
    }

    [Fact]
    public void A_refused_map_gives_its_lock_back_at_once()
    {
        const long length = 1 << 20;
        string image = _folder.File("image"), map = _folder.File("map");
        (ImageFile made, _, SafeFileHandle mapFile) = CacheFiles.Open(
            image, map, "origin", length, CacheOpening.GoOn);
        made.Dispose();
        mapFile.Dispose();
        WhileProcessesAreStarted(() =>
        {
            DiskException failure = Assert.Throws<DiskException>(
                () => CacheFiles.Open(image, map, "another origin", length, CacheOpening.GoOn));
            Assert.Equal(DiskError.Mismatch, failure.Error);
            AssertIsFree(map);
        });
    }

    private static void AssertIsFree(string path)
    {
        Assert.Equal(Errno.None, LinuxFile.Open(path, OpenMode.ReadWrite, out SafeFileHandle? file));
        using (file)
        {
            Assert.Equal(Errno.None, LinuxFile.TryLock(file!));
            LinuxFile.Unlock(file!); // as the code under test has to do it
        }
    }

    private static void WhileProcessesAreStarted(Action action)
    {
        bool isOver = false;
        int children = 0;
        var starting = new Thread(() =>
        {
            while (!Volatile.Read(ref isOver))
            {
                using Process child = Process.Start("true");
                child.WaitForExit();
                Interlocked.Increment(ref children);
            }
        });
        starting.Start();
        try
        {
            for (int i = 0; i < Rounds || Volatile.Read(ref children) < Children; i++)
                action();
        }
        finally
        {
            Volatile.Write(ref isOver, true);
            starting.Join();
        }
    }
}
