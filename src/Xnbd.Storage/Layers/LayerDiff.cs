namespace Xnbd.Storage.Layers;

/// <summary>Lists where a layer's disk differs from its base, block by block. Nothing is written.</summary>
public static class LayerDiff
{
    /// <summary>Compares the two.</summary>
    /// <param name="path">The layer.</param>
    /// <param name="basePath">Where the base stands now; null for where the layer's header says.</param>
    /// <param name="found">
    /// Receives each range that differs, in order: its offset and length in bytes, and whether the disk is zero there.
    /// </param>
    /// <param name="cancel">Interrupts it.</param>
    /// <exception cref="DiskException">A file cannot be opened, or a read failed.</exception>
    /// <exception cref="OperationCanceledException">It was interrupted.</exception>
    public static async Task Run(
        string path, string? basePath, Action<long, long, bool> found, CancellationToken cancel)
    {
        using CowDisk disk = LayerStack.OpenByHeader(path, basePath);
        (long Offset, long Length, bool IsZero) pending = default;
        await BlockComparison.Run(disk, disk.Base, skipAbsent: true, _ => { }, cancel, (blockIndex, data, other) =>
        {
            if (data.SequenceEqual(other))
                return;
            bool isZero = !data.ContainsAnyExcept((byte)0);
            long offset = blockIndex * BlockRange.BlockSize;
            if (pending.Length > 0 && pending.Offset + pending.Length == offset && pending.IsZero == isZero)
            {
                pending.Length += data.Length;
                return;
            }

            if (pending.Length > 0)
                found(pending.Offset, pending.Length, pending.IsZero);
            pending = (offset, data.Length, isZero);
        });
        if (pending.Length > 0)
            found(pending.Offset, pending.Length, pending.IsZero);
    }
}
