using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;
using Xnbd.Storage.Images;
using Xnbd.Storage.Maps;

namespace Xnbd.Storage.Layers;

/// <summary>What a layer's file says of itself.</summary>
/// <param name="Path">The file.</param>
/// <param name="BasePath">What it stands on.</param>
/// <param name="BaseIsLayer">That is a layer itself.</param>
/// <param name="Length">The disk's length, in bytes.</param>
/// <param name="WrittenBytes">Bytes of the blocks that were written here.</param>
/// <param name="ZeroBytes">Bytes of the blocks that were made zero here.</param>
/// <param name="AllocatedBytes">Space that the file takes.</param>
/// <param name="IsDisposable">It goes when its server ends.</param>
/// <param name="IsCommitting">A commit into its base was interrupted.</param>
/// <param name="IsDiscarding">It was being emptied, and that was interrupted.</param>
/// <param name="IsInUse">Somebody is writing it: the figures are of a moment ago.</param>
/// <param name="Runs">All blocks in order, as runs of one state, lengths in bytes; made while they are looked at, as there may be very many.</param>
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
    IEnumerable<(long Length, BlockState State)> Runs);

/// <summary>How far long work has come.</summary>
/// <param name="Done">Bytes of the disk that have been passed.</param>
/// <param name="Total">The disk's length.</param>
public readonly record struct WorkProgress(long Done, long Total);

/// <summary>
/// Work on layers that are not being served. All of it may be interrupted at any moment, by the death of the process or of
/// the machine: the disk then reads as before, or as after; what is only half done is said here, and can be done again.
/// <para>All methods throw <see cref="DiskException"/>, and <see cref="OperationCanceledException"/> when cancelled.</para>
/// </summary>
public static class LayerWork
{
    /// <summary>What is read and written at a time, in bytes.</summary>
    private const int PieceBytes = 1 << 20;

    /// <summary>How far is looked at once for extents, in bytes.</summary>
    private const long ExtentsBytes = 1L << 30;

    /// <summary>So many ranges are let go of at once, each batch with a commit of its own: memory stays bounded.</summary>
    private const int RangesAtOnce = 64 * 1024;

    /// <summary>How much is committed, in bytes, until it is made durable and noted, so that a resumed commit begins there.</summary>
    private const long CheckpointBytes = 64L << 20;

    /// <summary>Tells what a layer holds. It may be in use.</summary>
    public static LayerInfo GetInfo(string path)
    {
        LayerFile layer = LayerFile.OpenUnlocked(path, out bool isInUse);
        using (layer)
        {
            BlockMap map = layer.Map;
            MapHeader header = map.Header;
            IEnumerable<(long Length, BlockState State)> runs = map.Runs().Select(r => (r.Run.LengthOn(header.Source.Length), r.State));
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

    /// <summary>
    /// Writes all that a layer holds into its base, and empties it. Interrupted, the layer still holds everything; it
    /// is marked, and nothing serves it until the commit has been completed by calling this again.
    /// </summary>
    /// <param name="path">The layer.</param>
    /// <param name="basePath">Where its base stands now; null for where its header says.</param>
    /// <param name="progress">Told how far it has come.</param>
    /// <param name="cancel">Interrupts it.</param>
    /// <returns>Bytes that were committed, in this call.</returns>
    public static async Task<long> Commit(string path, string? basePath, Action<WorkProgress> progress, CancellationToken cancel)
    {
        using CowDisk disk = LayerStack.OpenByHeader(path, basePath, readOnly: false, writableBase: true, resumes: true);
        LayerFile layer = disk.File;
        MapHeader header = layer.Map.Header;
        string below = Path.GetFullPath(basePath ?? header.Source.Path);
        if ((header.Flags & MapFlags.Committing) == 0)
        {
            // The base's time and contents will change; what the layer does not hold stays, and tells it from others.
            UInt128 sample = LayerStack.SampleAbsent(layer.Map, disk.Base);
            layer.Map.ChangeHeader(h => h with
            {
                Flags = h.Flags | MapFlags.Committing,
                CommitPosition = 0,
                Source = h.Source with { Path = below, Sample = sample },
            });
            header = layer.Map.Header;

            // Who else stands on it will notice.
            if (disk.Base is CowDisk { File.Map: var lower })
                lower.ChangeHeader(h => h with { Generation = h.Generation + 1 });
            else
                (disk.Base as ImageFile)?.MarkChanged();
        }

        long committed = 0, sinceCheckpoint = 0;
        using var buffer = new NativeBuffer(PieceBytes);
        foreach ((BlockRange run, BlockState state) in layer.Map.Runs())
        {
            long offset = Math.Max(run.Offset, header.CommitPosition), end = run.Offset + run.LengthOn(disk.Length);
            while (state != BlockState.Absent && offset < end)
            {
                cancel.ThrowIfCancellationRequested();
                int length = (int)Math.Min(end - offset, state == BlockState.Zero ? CheckpointBytes : PieceBytes);
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
                layer.Map.ChangeHeader(h => h with { CommitPosition = position });
                sinceCheckpoint = 0;
            }
        }

        await disk.Base.FlushAsync();
        progress(new WorkProgress(disk.Length, disk.Length));
        layer.Clear(LayerStack.Identify(below, disk.Base));
        return committed;
    }

    /// <summary>Empties a layer, and binds it to its base as that is now.</summary>
    /// <param name="path">The layer.</param>
    /// <param name="basePath">Where its base stands now; null for where its header says.</param>
    public static void Discard(string path, string? basePath)
    {
        LayerFile layer = LayerFile.Open(path, readOnly: false);
        using (layer)
        {
            MapHeader header = layer.Map.Header;
            if ((header.Flags & MapFlags.Disposable) != 0)
                throw new DiskException(DiskError.Permission, $"layer '{path}' was made to be thrown away: the next server on its base removes it");
            if ((header.Flags & MapFlags.Committing) != 0)
            {
                throw new DiskException(
                    DiskError.Permission,
                    $"a commit of '{path}' was interrupted: its base holds a part of the changes, and needs the rest; nothing was discarded");
            }

            string below = Path.GetFullPath(basePath ?? header.Source.Path);
            bool isLayer = (header.Flags & MapFlags.BaseIsLayer) != 0;
            using Disk baseDisk = LayerStack.OpenBase(below, isLayer, isStackWritten: true);
            if (baseDisk.Length != header.Source.Length)
                throw new DiskException(DiskError.Mismatch, $"'{below}' has {baseDisk.Length} bytes; '{path}' is of a disk of {header.Source.Length} bytes");
            layer.Map.PrepareToWrite();
            layer.Clear(LayerStack.Identify(below, baseDisk));
        }
    }

    /// <summary>Where a layer's disk differs from its base, block by block.</summary>
    /// <param name="path">The layer.</param>
    /// <param name="basePath">Where its base stands now; null for where its header says.</param>
    /// <param name="found">Told of each range that differs, in bytes, in order, and whether it is zero now.</param>
    /// <param name="cancel">Interrupts it.</param>
    public static async Task Diff(string path, string? basePath, Action<long, long, bool> found, CancellationToken cancel)
    {
        using CowDisk disk = LayerStack.OpenByHeader(path, basePath);
        (long Offset, long Length, bool IsZero) pending = default;
        await Compare(disk, disk.Base, disk.File.Map, skipAbsent: true, _ => { }, cancel, (block, data, other) =>
        {
            if (data.SequenceEqual(other))
                return;
            bool isZero = !data.ContainsAnyExcept((byte)0);
            long offset = block * BlockRange.BlockSize;
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

    /// <summary>A layer's disk, read-only: base and changes together.</summary>
    /// <param name="path">The layer.</param>
    /// <param name="basePath">Where its base stands now; null for where its header says.</param>
    public static Disk OpenMerged(string path, string? basePath) => LayerStack.OpenByHeader(path, basePath);

    /// <summary>Writes a disk into a new file, as a sparse raw image; it appears under its name when it is complete and durable.</summary>
    /// <param name="disk">The disk.</param>
    /// <param name="outputPath">The file; it must not be there.</param>
    /// <param name="progress">Told how far it has come.</param>
    /// <param name="cancel">Interrupts it; nothing is left behind.</param>
    public static async Task ExportRaw(Disk disk, string outputPath, Action<WorkProgress> progress, CancellationToken cancel)
    {
        await WriteNew(outputPath, async (_, file) =>
        {
            Check(LinuxFile.Truncate(file, disk.Length), outputPath);
            using var buffer = new NativeBuffer(PieceBytes);
            for (long offset = 0; offset < disk.Length;)
            {
                // All that one question answered is used before the next: it may have to look far.
                var extents = new ExtentList(1024);
                await disk.GetExtentsAsync(offset, Math.Min(disk.Length - offset, ExtentsBytes), extents);
                foreach (Extent extent in extents.Extents)
                {
                    for (long end = offset + extent.Length; offset < end;)
                    {
                        cancel.ThrowIfCancellationRequested();
                        long length = extent.IsHole ? end - offset : Math.Min(end - offset, PieceBytes);
                        if (!extent.IsHole)
                        {
                            await disk.ReadAsync(offset, buffer.Memory[..(int)length]);
                            WriteSparse(file, outputPath, offset, buffer.Slice(0, (int)length));
                        }

                        offset += length;
                        progress(new WorkProgress(offset, disk.Length));
                    }
                }
            }
        });
    }

    /// <summary>Makes a new file, which appears under its name when it is complete and durable.</summary>
    /// <param name="path">The file; it must not be there.</param>
    /// <param name="write">Writes it: to the path that it is given, or to the open file.</param>
    public static async Task WriteNew(string path, Func<string, SafeFileHandle, Task> write)
    {
        if (LinuxFile.Status(path, out _) == Errno.None)
            throw LockedFile.Failure(Errno.EEXIST, "write", path);
        using SafeFileHandle file = LockedFile.CreateBeside(Path.GetFullPath(path), out string partial);
        try
        {
            await write(partial, file);
            Check(LinuxFile.Sync(file), path);
            Check(LinuxFile.RenameNoReplace(partial, path), path);
            LinuxFile.SyncDirectoryOf(path);
            LinuxFile.Unlock(file);
        }
        catch
        {
            _ = LinuxFile.Unlink(partial);
            throw;
        }
    }

    /// <summary>
    /// Puts a layer on another base, so that its disk reads as before: takes in what the new base lacks, and lets go of
    /// what it has. Interrupted, the layer stands whole on the old base or on the new one; calling this again goes on.
    /// </summary>
    /// <param name="path">The layer.</param>
    /// <param name="basePath">Where its present base stands now; null for where its header says.</param>
    /// <param name="newBasePath">The new base.</param>
    /// <param name="newBaseIsLayer">That is a layer, not an image.</param>
    /// <param name="progress">Told how far it has come.</param>
    /// <param name="cancel">Interrupts it.</param>
    public static async Task Rebase(
        string path, string? basePath, string newBasePath, bool newBaseIsLayer, Action<WorkProgress> progress, CancellationToken cancel)
    {
        newBasePath = Path.GetFullPath(newBasePath);
        using CowDisk disk = LayerStack.OpenByHeader(path, basePath, readOnly: false);
        BlockMap map = disk.File.Map;
        using Disk newBase = LayerStack.OpenBase(newBasePath, newBaseIsLayer, isStackWritten: true);
        if (newBase.Length != disk.Length)
            throw new DiskException(DiskError.Mismatch, $"'{newBasePath}' has {newBase.Length} bytes; '{path}' is of a disk of {disk.Length} bytes");
        SourceIdentity source = LayerStack.Identify(newBasePath, newBase);

        // Until the header names the new base, a block that is taken in holds what the old base has: nothing has changed.
        await Compare(disk, newBase, map, skipAbsent: false, progress, cancel, (block, data, other) =>
        {
            if (map[block] == BlockState.Absent && !data.SequenceEqual(other))
                disk.WriteAsync(block * BlockRange.BlockSize, data.ToArray(), durable: false).AsTask().GetAwaiter().GetResult();
        });
        await disk.FlushAsync();
        (newBase as ImageFile)?.SyncContents(); // the layer will let go of what stands there; a layer was synced when it was opened
        map.ChangeHeader(header => header with
        {
            Source = source,
            Flags = newBaseIsLayer ? header.Flags | MapFlags.BaseIsLayer : header.Flags & ~MapFlags.BaseIsLayer,
        });

        // From here on a block that equals the new base's may go: first from the map, and durably so, then its space.
        var equal = new List<BlockRange>();
        await Compare(disk, newBase, map, skipAbsent: true, _ => { }, cancel, (block, data, other) =>
        {
            if (!data.SequenceEqual(other))
                return;
            if (equal.Count > 0 && equal[^1].End == block)
            {
                equal[^1] = equal[^1] with { Count = equal[^1].Count + 1 };
                return;
            }

            if (equal.Count == RangesAtOnce)
                LetGo(equal);
            equal.Add(new BlockRange(block, 1));
        });
        LetGo(equal);

        // The space of all that is not in the layer: also of what an interrupted rebase has left.
        foreach ((BlockRange run, BlockState state) in map.Runs())
        {
            if (state == BlockState.Absent)
                await disk.File.Data.TrimAsync(run.Offset, run.LengthOn(disk.Length), durable: false);
        }

        progress(new WorkProgress(disk.Length, disk.Length));

        void LetGo(List<BlockRange> ranges)
        {
            foreach (BlockRange range in ranges)
                map.Set(range, BlockState.Absent);
            disk.FlushAsync().AsTask().GetAwaiter().GetResult();
            ranges.Clear();
        }
    }

    private delegate void BlockPair(long block, ReadOnlySpan<byte> data, ReadOnlySpan<byte> other);

    /// <summary>Reads a layer's disk and another one of the same length, and hands over block by block.</summary>
    private static async Task Compare(
        CowDisk disk, Disk other, BlockMap map, bool skipAbsent, Action<WorkProgress> progress, CancellationToken cancel, BlockPair compare)
    {
        using var data = new NativeBuffer(PieceBytes);
        using var otherData = new NativeBuffer(PieceBytes);
        foreach ((BlockRange run, BlockState state) in map.Runs())
        {
            if (skipAbsent && state == BlockState.Absent)
                continue;
            long end = run.Offset + run.LengthOn(disk.Length);
            for (long offset = run.Offset; offset < end; offset += PieceBytes)
            {
                cancel.ThrowIfCancellationRequested();
                int length = (int)Math.Min(end - offset, PieceBytes);
                await disk.ReadAsync(offset, data.Memory[..length]);
                await other.ReadAsync(offset, otherData.Memory[..length]);
                for (int at = 0; at < length; at += BlockRange.BlockSize)
                {
                    int part = Math.Min(BlockRange.BlockSize, length - at);
                    compare((offset + at) / BlockRange.BlockSize, data.Slice(at, part), otherData.Slice(at, part));
                }

                progress(new WorkProgress(offset + length, disk.Length));
            }
        }
    }

    private static void WriteSparse(SafeFileHandle file, string path, long offset, Span<byte> data)
    {
        for (int at = 0; at < data.Length;)
        {
            // A run of blocks that are not zero goes out at once; zero blocks stay holes.
            int end = at;
            while (end < data.Length && data[end..Math.Min(end + BlockRange.BlockSize, data.Length)].ContainsAnyExcept((byte)0))
                end = Math.Min(end + BlockRange.BlockSize, data.Length);
            if (end > at && LinuxFile.Write(file, data[at..end], offset + at) is < 0 and var failed)
                throw new DiskException("write", path, offset + at, end - at, Errno.Of(failed));
            at = end + BlockRange.BlockSize;
        }
    }

    private static void Check(Errno errno, string path)
    {
        if (errno != Errno.None)
            throw LockedFile.Failure(errno, "write", path);
    }
}
