using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;
using Xnbd.Storage;
using Xnbd.Storage.Cache;
using Xnbd.Storage.Images;
using Xnbd.Storage.Layers;
using Xnbd.Storage.Maps;

namespace Xnbd.Fuzz.Targets;

/// <summary>
/// Layers and maps of caches in files, damaged in any way (see <see cref="MapBytes"/>), opened as the programs open
/// them.
/// </summary>
public sealed class LayerTarget : FuzzTarget
{
    private readonly string _path = Path.Combine(Path.GetTempPath(), $"xnbd-fuzz-{Guid.NewGuid():N}");

    /// <inheritdoc/>
    public override void Run(byte[] input)
    {
        byte[] bytes = MapBytes.Build(input);
        File.WriteAllBytes(_path, bytes);
        try
        {
            OpenLayer(input, _path, readOnly: true);
            OpenLayer(input, _path, readOnly: false);
            LookAt(_path);
            _ = SavedCache.Find(_path)?.IsComplete();
            Check.That(
                File.ReadAllBytes(_path).AsSpan().SequenceEqual(bytes),
                "a file that is only opened stays as it was");
            OpenCache(input, _path, bytes);
        }
        finally
        {
            File.Delete(_path);
        }
    }

    /// <inheritdoc/>
    public override IEnumerable<(string Name, byte[] Input)> Seeds()
    {
        foreach ((string Name, byte[] Input) seed in MapBytes.Seeds())
            yield return seed;
        byte switched = (byte)(MapFlags.Cache | MapFlags.Switched);
        yield return ("cache-switched", MapBytes.Input(
            MapBytes.IsCache | MapBytes.RepairHeader, (12, [switched]), (MapHeader.Size + 12, [switched])));
        yield return ("cache-other-boot", MapBytes.Input(MapBytes.IsCache | MapBytes.OtherBoot));
        yield return ("data-start", MapBytes.Input(MapBytes.RepairHeader, (96, [0]), (MapHeader.Size + 96, [1])));
    }

    private static void OpenLayer(byte[] input, string path, bool readOnly)
    {
        try
        {
            LayerFile layer = LayerFile.Open(path, readOnly);
            using ImageFile data = layer.Data;
            byte[] all = new byte[data.Length];
            data.ReadAsync(0, all).AsTask().GetAwaiter().GetResult();
            Check.That(layer.Map.BlockCount == BlockRange.CountOf(data.Length), "a layer's map is of its data");
        }
        catch (DiskException failure)
        {
            Check.That(failure.Message.Contains(path, StringComparison.Ordinal), "a message names the file");
            if (!MapBytes.IsOfCache(input))
                MapBytes.CheckMayBeRefused(input);
        }
    }

    private static void LookAt(string path)
    {
        Check.That(
            LinuxFile.Open(path, OpenMode.ReadOnly, out SafeFileHandle? file) == Errno.None,
            "the file can be opened");
        using (file)
            _ = LayerFile.IsDisposable(file!);
    }

    private static void OpenCache(byte[] input, string path, byte[] before)
    {
        string imagePath = path + ".img";
        try
        {
            using (FileStream file = File.Create(imagePath))
                file.SetLength(MapBytes.DiskLength); // a map with blocks is refused without its image
            (ImageFile image, BlockMap map, SafeFileHandle mapFile) = CacheFiles.Open(
                imagePath, path, MapBytes.Origin, MapBytes.DiskLength, CacheOpening.GoOn);
            using (image)
            using (mapFile)
            {
                Check.That(image.Length == MapBytes.DiskLength, "a cache has the length of its origin");
                Check.That(map.Header.Source.Length == MapBytes.DiskLength, "a map has the length of its origin");
                Check.That(
                    (map.Header.Flags & MapFlags.Switched) == 0,
                    "a cache that is opened is switched to no longer");
            }
        }
        catch (DiskException failure)
        {
            bool isNamed = failure.Message.Contains(path, StringComparison.Ordinal);
            Check.That(isNamed, "a message names the file");
            Check.That(File.ReadAllBytes(path).AsSpan().SequenceEqual(before), "a map that is refused stays as it was");
            if (MapBytes.IsOfCache(input))
                MapBytes.CheckMayBeRefused(input);
        }
        finally
        {
            File.Delete(imagePath);
        }
    }
}
