using Xnbd.Storage.Maps;
using Xnbd.Storage.Overlay;

namespace Xnbd.Storage.Layers;

/// <summary>
/// A disk whose writes go to a layer, over a base that is never written. It owns both: closing the disk closes them,
/// the layer first.
/// </summary>
internal sealed class CowDisk : OverlayDisk
{
    private readonly LayerFile? _file; // null in tests, which compose the disk of parts
    private readonly IDisposable _layer; // the owner of data and map

    /// <summary>Composes the disk of parts, which it owns from now on.</summary>
    /// <param name="baseDisk">The base, which is only read.</param>
    /// <param name="data">The layer's data, as long as the base.</param>
    /// <param name="map">Which blocks the layer holds.</param>
    /// <param name="readOnly">The disk will not be written.</param>
    public CowDisk(Disk baseDisk, Disk data, BlockMap map, bool readOnly)
        : base(data, map, DiskFeatures.Layered | (readOnly ? DiskFeatures.ReadOnly : DiskFeatures.None))
        => (Base, _layer) = (baseDisk, data);

    /// <summary>Composes the disk of a base and a layer's file, which it owns from now on.</summary>
    public CowDisk(Disk baseDisk, LayerFile file, bool readOnly)
        : this(baseDisk, file.Data, file.Map, readOnly) => _layer = _file = file;

    /// <summary>The layer's file.</summary>
    internal LayerFile File => _file!;

    /// <summary>What the layer stands on.</summary>
    internal Disk Base { get; }

    /// <inheritdoc/>
    protected override bool TryReadAbsent(long offset, Span<byte> buffer) => Base.TryRead(offset, buffer);

    /// <inheritdoc/>
    protected override bool IsAbsentFar(long offset, long length) => Base.IsFar(offset, length, isWrite: false);

    /// <inheritdoc/>
    protected override ValueTask ReadAbsentAsync(long offset, Memory<byte> buffer, CancellationToken cancel)
        => Base.ReadAsync(offset, buffer, cancel);

    /// <inheritdoc/>
    protected override FileRange TryLocateAbsent(long offset, int length, bool findHoles)
        => Base.TryLocate(offset, length, findHoles);

    /// <inheritdoc/>
    protected override ValueTask PrefetchAbsentAsync(long offset, long length, CancellationToken cancel)
        => Base.PrefetchAsync(offset, length, cancel);

    /// <inheritdoc/>
    protected override ValueTask GetAbsentExtentsAsync(long offset, long length, ExtentList extents)
        => Base.GetExtentsAsync(offset, length, extents);

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (!disposing)
            return;
        _layer.Dispose();
        Base.Dispose();
    }
}
