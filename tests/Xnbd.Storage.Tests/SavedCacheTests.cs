using Microsoft.Win32.SafeHandles;
using Xnbd.Storage.Cache;
using Xnbd.Storage.Images;
using Xnbd.Storage.Maps;
using Xnbd.TestKit;

namespace Xnbd.Storage.Tests;

/// <summary>The map that was loaded to recognize the origin is the one with which the cache is opened.</summary>
public sealed class SavedCacheTests : IDisposable
{
    private const long Length = 1 << 20;

    private readonly TempFolder _folder = new();

    public SavedCacheTests()
    {
        (ImageFile image, BlockMap map, SafeFileHandle file) = Open(null);
        byte[] data = new byte[4096];
        new Random(1).NextBytes(data);
        Assert.True(image.TryWrite(8192, data));
        map.Set(new BlockRange(2, 1), BlockState.Fetched);
        Close(image, file);
    }

    public void Dispose() => _folder.Dispose();

    private string MapPath => _folder.File("map");

    private (ImageFile Image, BlockMap Map, SafeFileHandle File) Open(
        SavedCache? saved, CacheOpening opening = CacheOpening.GoOn)
        => CacheFiles.Open(_folder.File("image"), MapPath, "origin", Length, opening, saved: saved);

    private static void Close(ImageFile image, SafeFileHandle file)
    {
        image.Dispose();
        LockedFile.Close(file);
    }

    private SavedCache TakeSamples()
    {
        SavedCache saved = SavedCache.Find(MapPath)!;
        Assert.Equal(8192, Assert.Single(saved.TakeSamples(_folder.File("image")).Blocks).Offset);
        return saved;
    }

    [Fact]
    public void The_map_is_loaded_once_and_nobody_else_opens_it_in_between()
    {
        using SavedCache saved = TakeSamples();
        Assert.Throws<InUseException>(() => Open(null));
        Assert.Empty(SavedCache.Find(MapPath)!.TakeSamples(_folder.File("image")).Blocks); // it is in use
        Assert.False(saved.IsComplete());
        (ImageFile image, BlockMap map, SafeFileHandle file) = Open(saved);
        Assert.Equal([255, 1, 0, 0], map.CountAll());
        map.Set(new BlockRange(3, 1), BlockState.Written);
        saved.Dispose(); // the file is not its own any more
        Assert.Throws<InUseException>(() => Open(null));
        Close(image, file);
        (image, map, file) = Open(null);
        Assert.Equal([254, 1, 0, 1], map.CountAll());
        Close(image, file);
    }

    [Fact]
    public void Without_an_opening_the_lock_ends_with_it()
    {
        TakeSamples().Dispose();
        (ImageFile image, _, SafeFileHandle file) = Open(null);
        Close(image, file);
    }

    [Fact]
    public void A_map_that_was_replaced_meanwhile_is_loaded_anew()
    {
        File.Copy(MapPath, MapPath + ".copy");
        using SavedCache saved = TakeSamples();
        File.Move(MapPath + ".copy", MapPath, overwrite: true);
        using (SafeFileHandle file = File.OpenHandle(MapPath, access: FileAccess.ReadWrite))
        {
            var map = BlockMap.Open(new FileMapStore(MapPath, file), Xnbd.Linux.LinuxProcess.BootId);
            map.Set(new BlockRange(7, 2), BlockState.Written);
        }

        (ImageFile image, BlockMap opened, SafeFileHandle mapFile) = Open(saved);
        Assert.Equal([253, 1, 0, 2], opened.CountAll());
        Close(image, mapFile);
    }

    [Fact]
    public void A_failure_to_open_the_cache_releases_the_lock()
    {
        using (SavedCache saved = TakeSamples())
        {
            Assert.Throws<DiskException>(() => CacheFiles.Open(
                _folder.File("image"), MapPath, "another origin", Length, CacheOpening.GoOn, saved: saved));
        }

        (ImageFile image, _, SafeFileHandle file) = Open(null);
        Close(image, file);
    }
}
