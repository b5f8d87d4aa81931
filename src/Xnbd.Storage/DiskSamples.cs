namespace Xnbd.Storage;

/// <summary>
/// Blocks of a disk, by which another server of the same disk is recognized. They are spread over what is known of the
/// disk. Blocks of zeroes are left out where there are others, since all disks have some.
/// </summary>
/// <param name="Blocks">Each block's offset in bytes, and its data.</param>
/// <param name="MayHoldWrites">
/// Some of them may hold what was written here: the machine has died, and nobody knows what was under way.
/// </param>
public sealed record DiskSamples(IReadOnlyList<(long Offset, byte[] Data)> Blocks, bool MayHoldWrites)
{
    /// <summary>How many blocks are compared at most.</summary>
    public const int MaxCount = 32;

    /// <summary>How many blocks are looked at, to find those that are not zero.</summary>
    public const int MaxCandidates = 256;

    /// <summary>Nothing is known of the disk.</summary>
    public static DiskSamples None { get; } = new([], false);

    /// <summary>Chooses from candidates, which come in the order of their offsets.</summary>
    /// <param name="candidates">Blocks that are spread over the disk.</param>
    /// <param name="mayHoldWrites">See <see cref="MayHoldWrites"/>.</param>
    public static DiskSamples Choose(IReadOnlyList<(long Offset, byte[] Data)> candidates, bool mayHoldWrites)
    {
        (long Offset, byte[] Data)[] telling =
            [.. candidates.Where(block => block.Data.AsSpan().ContainsAnyExcept((byte)0))];
        IReadOnlyList<(long Offset, byte[] Data)> from = telling.Length > 0 ? telling : candidates;
        int count = Math.Min(MaxCount, from.Count);
        return new([.. Enumerable.Range(0, count).Select(i => from[i * from.Count / count])], mayHoldWrites);
    }

    /// <summary>Compares the blocks with those of another disk.</summary>
    /// <param name="others">
    /// The other disk's data, in the order of <see cref="Blocks"/>; null where it is not known.
    /// </param>
    /// <returns>The offset of the first block that differs; null if it may be the same disk.</returns>
    public long? FindDifference(IReadOnlyList<byte[]?> others)
    {
        long? first = null;
        int known = 0, different = 0;
        for (int i = 0; i < Blocks.Count; i++)
        {
            if (others[i] is not { } other)
                continue;
            known++;
            if (Blocks[i].Data.AsSpan().SequenceEqual(other))
                continue;
            different++;
            first ??= Blocks[i].Offset;
        }

        int tolerated = MayHoldWrites ? known / 2 : 0; // of another disk nearly all of them differ
        return different > tolerated ? first : null;
    }
}
