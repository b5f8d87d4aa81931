using Xnbd.Storage.Images;
using Xnbd.Storage.Maps;

namespace Xnbd.Storage.Layers;

/// <summary>
/// Puts a layer that is not being served on another base, so that its disk reads as before.
/// <para>
/// The order: 1. the layer takes over the blocks in which the new base differs from the old one; 2. these are made
/// durable; 3. the header names the new base; 4. the layer lets go of the blocks that equal those of the new base, and
/// of their space. If the process or the machine dies, the layer is complete, on the old base or on the new one. A
/// second call finishes the work.
/// </para>
/// </summary>
public static class LayerRebase
{
    /// <summary>
    /// The layer lets go of so many ranges of blocks at a time, each time with a commit of the map: memory stays
    /// bounded.
    /// </summary>
    private const int MaxRanges = 64 * 1024;

    /// <summary>Rebases a layer.</summary>
    /// <param name="path">The layer.</param>
    /// <param name="basePath">Where its present base stands now; null for where the layer's header says.</param>
    /// <param name="newBasePath">The new base.</param>
    /// <param name="newBaseIsLayer">The new base is a layer, not an image.</param>
    /// <param name="progress">Receives how far this has come.</param>
    /// <param name="cancel">Interrupts it.</param>
    /// <exception cref="DiskException">
    /// A file cannot be opened, the lengths differ, or a read or a write failed.
    /// </exception>
    /// <exception cref="OperationCanceledException">It was interrupted.</exception>
    public static async Task Run(
        string path,
        string? basePath,
        string newBasePath,
        bool newBaseIsLayer,
        Action<WorkProgress> progress,
        CancellationToken cancel)
    {
        newBasePath = Path.GetFullPath(newBasePath);
        using CowDisk disk = LayerStack.OpenByHeader(path, basePath, readOnly: false);
        using Disk newBase = LayerStack.OpenBase(newBasePath, newBaseIsLayer, isStackWritten: true);
        BaseIdentity.ValidateLength(path, disk.Length, newBasePath, newBase.Length);
        SourceIdentity source = BaseIdentity.Of(newBasePath, newBase);

        await TakeOver(disk, newBase, progress, cancel);
        await disk.FlushAsync();
        (newBase as ImageFile)?.SyncContents(); // a layer was synced when it was opened
        disk.Map.ChangeHeader(header => header with
        {
            Source = source,
            Flags = newBaseIsLayer ? header.Flags | MapFlags.BaseIsLayer : header.Flags & ~MapFlags.BaseIsLayer,
        });
        await LetGo(disk, newBase, cancel);
        progress(new WorkProgress(disk.Length, disk.Length));
    }

    /// <summary>
    /// Writes into the layer what the new base lacks. As long as the header names the old base, such a block holds what
    /// the old base has: nothing has changed.
    /// </summary>
    private static Task TakeOver(CowDisk disk, Disk newBase, Action<WorkProgress> progress, CancellationToken cancel)
        => BlockComparison.Run(disk, newBase, skipAbsent: false, progress, cancel, (blockIndex, data, other) =>
        {
            if (disk.Map[blockIndex] == BlockState.Absent && !data.SequenceEqual(other))
                Wait(disk.WriteAsync(blockIndex * BlockRange.BlockSize, data.ToArray(), durable: false));
        });

    /// <summary>
    /// Makes absent the blocks that equal the new base's: first in the map, durably, and then their space is given
    /// back.
    /// </summary>
    private static async Task LetGo(CowDisk disk, Disk newBase, CancellationToken cancel)
    {
        var equal = new List<BlockRange>();
        await BlockComparison.Run(disk, newBase, skipAbsent: true, _ => { }, cancel, (blockIndex, data, other) =>
        {
            if (!data.SequenceEqual(other))
                return;
            if (equal.Count > 0 && equal[^1].End == blockIndex)
            {
                equal[^1] = equal[^1] with { Count = equal[^1].Count + 1 };
                return;
            }

            if (equal.Count == MaxRanges)
                MakeAbsent();
            equal.Add(new BlockRange(blockIndex, 1));
        });
        MakeAbsent();

        // All space that belongs to no block of the layer, including what an interrupted rebase has left.
        foreach ((BlockRange run, BlockState state) in disk.Map.Runs())
        {
            if (state == BlockState.Absent)
                await disk.File.Data.TrimAsync(run.Offset, run.LengthOn(disk.Length), durable: false);
        }

        void MakeAbsent()
        {
            foreach (BlockRange range in equal)
                disk.Map.Set(range, BlockState.Absent);
            Wait(disk.FlushAsync());
            equal.Clear();
        }
    }

    private static void Wait(ValueTask task) => task.AsTask().GetAwaiter().GetResult();
}
