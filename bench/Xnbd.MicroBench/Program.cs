using BenchmarkDotNet.Attributes;
using BenchmarkDotNet.Running;
using Xnbd.Protocol;
using Xnbd.Storage;
using Xnbd.Storage.Images;
using Xnbd.Storage.Layers;
using Xnbd.Storage.Maps;

// script/bench --micro --filter '*'
BenchmarkSwitcher.FromAssembly(typeof(ProtocolBenchmarks).Assembly).Run(args);

/// <summary>What each request costs before and after the disk.</summary>
[MemoryDiagnoser]
public class ProtocolBenchmarks
{
    private readonly byte[] _request = new byte[NbdSize.Request];
    private readonly byte[] _reply = new byte[64];
    private readonly byte[] _info = [0, 0, 0, 4, (byte)'d', (byte)'i', (byte)'s', (byte)'k', 0, 2, 0, 3, 0, 1];
    private readonly byte[] _zeroes = new byte[4096];

    public ProtocolBenchmarks() => new NbdRequest(0, NbdCommand.Read, 7, 4096, 4096).Write(_request);

    [Benchmark]
    public bool ReadRequest() => NbdRequest.TryRead(_request, out _);

    [Benchmark]
    public int WriteSimpleReply() => NbdReply.WriteSimple(_reply, NbdError.None, 7);

    [Benchmark]
    public int WriteOffsetData() => NbdReply.WriteOffsetData(_reply, NbdChunkFlags.Done, 7, 4096, 4096);

    [Benchmark]
    public bool ReadInfoRequest() => NbdInfoRequest.TryRead(_info, out _);

    [Benchmark]
    public bool FindHoleOf4KiB() => !_zeroes.AsSpan().ContainsAnyExcept((byte)0);
}

/// <summary>What an image file adds to the system calls.</summary>
[MemoryDiagnoser]
public class ImageFileBenchmarks : IDisposable
{
    private readonly string _path = Path.Combine("/dev/shm", Path.GetRandomFileName());
    private readonly byte[] _buffer = new byte[4096];
    private ImageFile _image = null!;

    [GlobalSetup]
    public void SetUp()
    {
        byte[] bytes = new byte[16 << 20];
        new Random(1).NextBytes(bytes);
        File.WriteAllBytes(_path, bytes);
        _image = ImageFile.Open(_path, readOnly: false);
    }

    [Benchmark]
    public bool TryRead4KiB() => _image.TryRead(8192, _buffer);

    [Benchmark]
    public bool TryWrite4KiB() => _image.TryWrite(8192, _buffer);

    [Benchmark]
    public int TryLocate256KiB() => _image.TryLocate(1 << 20, 256 * 1024, findHoles: true).Length;

    [GlobalCleanup]
    public void Dispose()
    {
        _image.Dispose();
        File.Delete(_path);
        GC.SuppressFinalize(this);
    }
}

/// <summary>What the map of a layer adds to a request.</summary>
[MemoryDiagnoser]
public class BlockMapBenchmarks : IDisposable
{
    private const long Length = 1L << 40;

    private readonly string _path = Path.Combine("/dev/shm", Path.GetRandomFileName());
    private readonly string _base = Path.Combine("/dev/shm", Path.GetRandomFileName());
    private readonly byte[] _buffer = new byte[4096];
    private LayerFile _layer = null!;
    private CowDisk _disk = null!;
    private bool _isWritten;
    private long _block;

    [GlobalSetup]
    public void SetUp()
    {
        using (FileStream file = File.Create(_base))
            file.SetLength(Length);
        _layer = LayerFile.TryCreateDisposable(_path, new SourceIdentity(_base, Length, 0, 0))!;
        _disk = new CowDisk(ImageFile.Open(_base, readOnly: true), _layer, readOnly: false);
        _layer.Map.Set(new BlockRange(1 << 20, 1 << 10), BlockState.Written);
    }

    [Benchmark]
    public BlockState StateOfOneBlock() => _layer.Map[_block++ & 0xfff_ffff];

    [Benchmark]
    public bool RunOf1MiB() => _layer.Map.IsAll(new BlockRange((1 << 20) + 7, 256), BlockState.Written);

    [Benchmark]
    public void SetOneBlock()
        => _layer.Map.Set(new BlockRange(5, 1), (_isWritten = !_isWritten) ? BlockState.Written : BlockState.Zero);

    [Benchmark]
    public void Set1MiB()
        => _layer.Map.Set(new BlockRange(100, 256), (_isWritten = !_isWritten) ? BlockState.Written : BlockState.Zero);

    [Benchmark]
    public bool TryRead4KiBOfTheBase() => _disk.TryRead(8192, _buffer);

    [Benchmark]
    public bool TryWrite4KiBAgain() => _disk.TryWrite(1L << 32, _buffer);

    [GlobalCleanup]
    public void Dispose()
    {
        _disk.Dispose();
        File.Delete(_base);
        GC.SuppressFinalize(this);
    }
}
