using Xnbd.TestKit;

namespace Xnbd.Bench;

/// <summary>The images that servers serve. They are made when they are first needed, and go with this object.</summary>
internal sealed class Images(string diskFolder) : IDisposable
{
    /// <summary>A tmpfs.</summary>
    public const string MemoryFolder = "/dev/shm";

    private readonly TempFolder _memory = new(MemoryFolder);
    private readonly TempFolder _disk = new(diskFolder);
    private readonly Dictionary<Medium, string> _made = [];

    /// <summary>The image of a medium, in the state that it promises.</summary>
    public async Task<string> Get(Medium medium)
    {
        if (!_made.TryGetValue(medium, out string? image))
        {
            image = medium switch
            {
                Medium.SparseMemory => Sparse(_memory, "sparse", pieceBytes: 4 << 20, pieces: 64, each: 32),
                Medium.FragmentedMemory => Sparse(_memory, "fragmented", pieceBytes: 4 << 10, pieces: 1 << 20, each: 2),
                Medium.FragmentedDisk => Sparse(_disk, "fragmented", pieceBytes: 4 << 10, pieces: 1 << 20, each: 2),
                Medium.ColdDisk => _disk.Random("cold", 1 << 30),
                _ => _memory.Random("image", 512 << 20),
            };
            _made.Add(medium, image);
            if (medium == Medium.ColdDisk)
                await Tool.Succeed("sync", image);
        }

        if (medium == Medium.ColdDisk)
            await Tool.Succeed("dd", $"if={image}", "iflag=nocache", "count=0", "status=none");
        return image;
    }

    public void Dispose()
    {
        _memory.Dispose();
        _disk.Dispose();
    }

    /// <summary>An image of which one piece of so many is data, and the rest are holes.</summary>
    private static string Sparse(TempFolder folder, string name, int pieceBytes, int pieces, int each)
    {
        long needed = (long)pieceBytes * pieces;
        long available = new DriveInfo(folder.Path).AvailableFreeSpace;
        if (needed * 3 / 2 > Math.Min(available, GC.GetGCMemoryInfo().TotalAvailableMemoryBytes))
            throw new InvalidOperationException($"there are no {needed >> 20} MiB for it in {folder.Path}");
        string image = folder.Sparse(name, needed * each);
        byte[] data = new byte[pieceBytes];
        new Random(1).NextBytes(data);
        using FileStream file = File.OpenWrite(image);
        for (int i = 0; i < pieces; i++)
            RandomAccess.Write(file.SafeFileHandle, data, (long)pieceBytes * each * i);
        return image;
    }
}
