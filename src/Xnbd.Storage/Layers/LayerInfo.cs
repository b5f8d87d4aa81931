using Xnbd.Linux;
using Xnbd.Storage.Maps;

namespace Xnbd.Storage.Layers;

/// <summary>What a layer's file says about itself.</summary>
/// <param name="Path">The file.</param>
/// <param name="BasePath">What the layer stands on.</param>
/// <param name="BaseIsLayer">The base is a layer itself.</param>
/// <param name="Length">Length of the disk in bytes.</param>
/// <param name="WrittenBytes">Bytes of the blocks that were written here.</param>
/// <param name="ZeroBytes">Bytes of the blocks that were made zero here.</param>
/// <param name="AllocatedBytes">Bytes that the file takes on its disk.</param>
/// <param name="IsDisposable">The layer is removed when its server ends.</param>
/// <param name="IsCommitting">A commit into its base was interrupted.</param>
/// <param name="IsDiscarding">The layer was being emptied, and that was interrupted.</param>
/// <param name="IsInUse">Another program is writing the layer: the figures are of a moment ago.</param>
/// <param name="Runs">
/// All blocks in order, as runs of one state, with their lengths in bytes. A run is made when the caller asks for it,
/// since there may be very many.
/// </param>
public sealed record LayerInfo(
    string Path,
    string BasePath,
    bool BaseIsLayer,
    long Length,
    long WrittenBytes,
    long ZeroBytes,
    long AllocatedBytes,
    bool IsDisposable,
    bool IsCommitting,
    bool IsDiscarding,
    bool IsInUse,
    IEnumerable<(long Length, BlockState State)> Runs)
{
    /// <summary>Reads what a layer holds. The layer may be in use.</summary>
    /// <exception cref="DiskException">There is no such file, it is no layer, or it is damaged.</exception>
    public static LayerInfo Read(string path)
    {
        using LayerFile layer = LayerFile.OpenUnlocked(path, out bool isInUse);
        BlockMap map = layer.Map;
        MapHeader header = map.Header;
        IEnumerable<(long Length, BlockState State)> runs =
            map.Runs().Select(r => (r.Run.LengthOn(header.Source.Length), r.State));
        long written = 0, zero = 0;
        foreach ((long length, BlockState state) in runs)
        {
            written += state == BlockState.Written ? length : 0;
            zero += state == BlockState.Zero ? length : 0;
        }

        _ = LinuxFile.Status(path, out FileStatus status);
        return new LayerInfo(
            path,
            header.Source.Path,
            (header.Flags & MapFlags.BaseIsLayer) != 0,
            header.Source.Length,
            written,
            zero,
            status.AllocatedBytes,
            (header.Flags & MapFlags.Disposable) != 0,
            (header.Flags & MapFlags.Committing) != 0,
            (header.Flags & MapFlags.Discarding) != 0,
            isInUse,
            runs);
    }
}
