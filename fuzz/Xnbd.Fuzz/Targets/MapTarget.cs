using Xnbd.Storage;
using Xnbd.Storage.Maps;

namespace Xnbd.Fuzz.Targets;

/// <summary>A block map from disk, damaged in any way, in memory (see <see cref="MapBytes"/>).</summary>
public sealed class MapTarget : FuzzTarget
{
    private static readonly Guid s_nextBoot = Guid.NewGuid();

    /// <inheritdoc/>
    public override void Run(byte[] input)
    {
        byte[] bytes = MapBytes.Build(input);
        byte[] before = [.. bytes];
        var store = new MemoryMapStore(bytes);
        BlockMap map;
        try
        {
            // Whoever opens a map has made sure that its file is as long as the header says.
            if (MapFile.ReadHeader(store) is not { } header
                || header.Source.Length is < 0 or > 1 << 20
                || MapLayout.FileLength(header.Source.Length) > bytes.Length)
            {
                MapBytes.CheckMayBeRefused(input);
                return;
            }

            RunHeader(header);
            map = BlockMap.Open(store, MapBytes.BootId);
        }
        catch (DiskException)
        {
            MapBytes.CheckMayBeRefused(input);
            Check.That(bytes.AsSpan().SequenceEqual(before), "a map that is refused stays as it was");
            return;
        }

        Check.That(bytes.AsSpan().SequenceEqual(before), "a map that is opened stays as it was");
        CheckRuns(map);

        // From here on each step is followed by a death of the process, or of the machine.
        BlockState[] states = StatesOf(map);
        map.PrepareToWrite();
        Check.That(states.SequenceEqual(StatesOf(Reopen(bytes, MapBytes.BootId))), "a map survives the process");
        map.Commit();
        Check.That(map.IsCommitted, "a map that was committed is committed");
        Check.That(
            states.SequenceEqual(StatesOf(Reopen(bytes, s_nextBoot))),
            "a map that was committed survives the machine");
        if (states.Length == 0)
            return;
        long first = input.Length % states.Length;
        map.Set(new BlockRange(first, states.Length - first), BlockState.Written);
        states.AsSpan((int)first).Fill(BlockState.Written);
        Check.That(states.SequenceEqual(StatesOf(Reopen(bytes, MapBytes.BootId))), "a change survives the process");
        map.Commit();
        Check.That(
            states.SequenceEqual(StatesOf(Reopen(bytes, s_nextBoot))),
            "a change that was committed survives the machine");
    }

    /// <inheritdoc/>
    public override IEnumerable<(string Name, byte[] Input)> Seeds() => MapBytes.Seeds();

    private static void RunHeader(MapHeader header)
    {
        byte[] copy = new byte[MapHeader.Size];
        if (!MapHeader.FitsPath(header.Source.Path))
            return; // broken text in a path may be longer when it is written again
        header.Write(copy);
        Check.That(MapHeader.TryRead(copy) == header, "a header is read as it was written");
    }

    private static void CheckRuns(BlockMap map)
    {
        long[] counts = new long[4];
        long next = 0;
        foreach ((BlockRange run, BlockState state) in map.Runs())
        {
            Check.That(run.First == next && run.Count > 0, "runs follow each other");
            Check.That(map.IsAll(run, state), "a run has one state");
            counts[(int)state] += run.Count;
            next = run.End;
        }

        Check.That(next == map.BlockCount, "runs cover the disk");
        Check.That(counts.SequenceEqual(map.CountAll()), "the counts are those of the runs");
    }

    private static BlockMap Reopen(byte[] bytes, Guid bootId) => BlockMap.Open(new MemoryMapStore([.. bytes]), bootId);

    private static BlockState[] StatesOf(BlockMap map)
    {
        var states = new BlockState[map.BlockCount];
        for (int i = 0; i < states.Length; i++)
            states[i] = map[i];
        return states;
    }
}
