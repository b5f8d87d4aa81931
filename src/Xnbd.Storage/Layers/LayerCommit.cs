using Xnbd.Linux;
using Xnbd.Storage.Images;
using Xnbd.Storage.Maps;

namespace Xnbd.Storage.Layers;

/// <summary>
/// Writes all that a layer holds into its base, and empties the layer. The layer is not being served.
/// <para>
/// What survives: if the process or the machine dies, the layer still holds everything. It is marked
/// (<see cref="MapFlags.Committing"/>), and nothing serves it until a second call has completed the commit. The second
/// call begins at the last checkpoint.
/// </para>
/// </summary>
public static class LayerCommit
{
    /// <summary>After this many bytes the base is synced and the position is noted: a checkpoint.</summary>
    private const long CheckpointBytes = 64L << 20;

    /// <summary>Commits a layer, or completes a commit that was interrupted.</summary>
    /// <param name="path">The layer.</param>
    /// <param name="basePath">Where the base stands now; null for where the layer's header says.</param>
    /// <param name="progress">Receives how far the commit has come.</param>
    /// <param name="cancel">Interrupts it.</param>
    /// <returns>How many bytes this call has committed.</returns>
    /// <exception cref="DiskException">A file cannot be opened, or a read or a write failed.</exception>
    /// <exception cref="OperationCanceledException">It was interrupted.</exception>
    public static async Task<long> Run(
        string path, string? basePath, Action<WorkProgress> progress, CancellationToken cancel)
    {
        using CowDisk disk = LayerStack.OpenByHeader(
            path, basePath, readOnly: false, writableBase: true, resumes: true);
        LayerFile layer = disk.File;
        string below = Path.GetFullPath(basePath ?? layer.Map.Header.Source.Path);
        if ((layer.Map.Header.Flags & MapFlags.Committing) == 0)
            Begin(disk, below);

        long committed = 0, sinceCheckpoint = 0, resumeAt = layer.Map.Header.CommitPosition;
        using var buffer = new NativeBuffer(WorkProgress.PieceBytes);
        foreach ((BlockRange run, BlockState state) in layer.Map.Runs())
        {
            long offset = Math.Max(run.Offset, resumeAt), end = run.Offset + run.LengthOn(disk.Length);
            while (state != BlockState.Absent && offset < end)
            {
                cancel.ThrowIfCancellationRequested();
                long max = state == BlockState.Zero ? CheckpointBytes : WorkProgress.PieceBytes;
                int length = (int)Math.Min(end - offset, max);
                if (state == BlockState.Zero)
                {
                    await disk.Base.ZeroAsync(offset, length, ZeroMode.MayPunch, durable: false);
                }
                else
                {
                    await layer.Data.ReadAsync(offset, buffer.Memory[..length]);
                    await disk.Base.WriteAsync(offset, buffer.Memory[..length], durable: false);
                }

                offset += length;
                committed += length;
                sinceCheckpoint += length;
                progress(new WorkProgress(offset, disk.Length));
                if (sinceCheckpoint < CheckpointBytes)
                    continue;
                await disk.Base.FlushAsync();
                long position = offset;
                layer.Map.ChangeHeader(header => header with { CommitPosition = position });
                sinceCheckpoint = 0;
            }
        }

        await disk.Base.FlushAsync();
        progress(new WorkProgress(disk.Length, disk.Length));
        layer.Clear(BaseIdentity.Of(below, disk.Base));
        return committed;
    }

    /// <summary>
    /// Marks the layer, and then the base: other layers on the base notice that it is not what it was.
    /// </summary>
    private static void Begin(CowDisk disk, string below)
    {
        // The base's time and contents will change. What the layer does not hold stays, and tells this base from
        // others.
        UInt128 sample = BaseIdentity.SampleAbsent(disk.Map, disk.Base);
        disk.Map.ChangeHeader(header => header with
        {
            Flags = header.Flags | MapFlags.Committing,
            CommitPosition = 0,
            Source = header.Source with { Path = below, Sample = sample },
        });
        if (disk.Base is CowDisk lower)
            lower.Map.ChangeHeader(header => header with { Generation = header.Generation + 1 });
        else
            (disk.Base as ImageFile)?.MarkChanged();
    }
}
