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
                Medium.SparseMemory => Sparse(),
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

    private string Sparse()
    {
        const int piece = 4 << 20, pieces = 64, each = 32;
        string image = _memory.Sparse("sparse", (long)piece * pieces * each);
        byte[] data = new byte[piece];
        new Random(1).NextBytes(data);
        using FileStream file = File.OpenWrite(image);
        for (int i = 0; i < pieces; i++)
        {
            file.Position = (long)piece * each * i;
            file.Write(data);
        }

        return image;
    }
}
