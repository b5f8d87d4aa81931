using System.Globalization;

namespace Xnbd.Bench.Moves;

/// <summary>What a client does next.</summary>
/// <param name="Think">How long it works before, in milliseconds.</param>
/// <param name="Kind">R: it reads. W: it writes. S: it writes, and needs the data on stable storage (FUA).</param>
/// <param name="BlockIndex">The first block.</param>
/// <param name="BlockCount">The number of blocks.</param>
internal readonly record struct Operation(int Think, char Kind, int BlockIndex, int BlockCount)
{
    /// <summary>As a line of a trace: milliseconds, kind, offset and length in bytes.</summary>
    public override string ToString() => string.Create(
        CultureInfo.InvariantCulture,
        $"{Think} {Kind} {(long)BlockIndex * MovingDisk.BlockBytes} {BlockCount * MovingDisk.BlockBytes}");

    /// <summary>Reads a line of a trace.</summary>
    public static Operation Parse(string line)
    {
        string[] words = line.Split(' ');
        return new Operation(
            int.Parse(words[0], CultureInfo.InvariantCulture),
            words[1][0],
            (int)(long.Parse(words[2], CultureInfo.InvariantCulture) / MovingDisk.BlockBytes),
            int.Parse(words[3], CultureInfo.InvariantCulture) / MovingDisk.BlockBytes);
    }
}

/// <summary>
/// The loads of a disk that moves, as traces. Each is a fixed sequence of operations, one after the other; a client
/// that reaches the end begins again. The rules stand in docs/benchmarks.md.
/// </summary>
internal static class MoveTrace
{
    private const int RandomOperations = 100_000, StreamPieces = 8192, StreamBlocks = 64;
    private const int Sources = 6000, Headers = 500, FilesOfFolder = 20, UnitsOfLink = 40, Units = 12_000;
    private const int HeadersOfUnit = 12, UnitsInMemory = 200, JournalBlocks = 8192, PieceBlocks = 4, LinkBlocks = 32;

    /// <summary>The names of the loads, and what makes them.</summary>
    public static readonly IReadOnlyDictionary<string, Func<IEnumerable<Operation>>> All
        = new Dictionary<string, Func<IEnumerable<Operation>>>
        {
            ["random"] = RandomAccess,
            ["compile"] = Compile,
            ["stream"] = Stream,
        };

    /// <summary>Writes a load into a file, and reads it from there: the file says what was done.</summary>
    public static Operation[] Record(string load, string path)
    {
        if (!File.Exists(path))
            File.WriteAllLines(path, All[load]().Select(operation => operation.ToString()));
        return [.. File.ReadLines(path).Select(Operation.Parse)];
    }

    /// <summary>4 KiB anywhere, read or written synchronously, every 5 ms.</summary>
    private static IEnumerable<Operation> RandomAccess()
    {
        var random = new Random(1);
        for (int i = 0; i < RandomOperations; i++)
            yield return new Operation(5, random.Next(2) == 0 ? 'R' : 'S', random.Next(MovingDisk.BlockCount), 1);
    }

    /// <summary>
    /// A file is read from the start of the disk on, and another one is written from its middle on: 4 MiB of each in a
    /// second.
    /// </summary>
    private static IEnumerable<Operation> Stream()
    {
        for (int i = 0; i < StreamPieces; i++)
        {
            int at = i * StreamBlocks, opposite = (at + (MovingDisk.BlockCount / 2)) % MovingDisk.BlockCount;
            yield return new Operation(31, 'R', at, StreamBlocks);
            yield return new Operation(31, 'W', opposite, StreamBlocks);
        }
    }

    /// <summary>Many small files are read, objects are written behind each other, and programs are linked.</summary>
    private static IEnumerable<Operation> Compile()
    {
        var random = new Random(2);
        (int At, int Count)[] sources = Files(random, Sources, maxBlocks: 8), headers = Files(random, Headers, 4);
        int journal = Hole(random), journalAt = 0, output = Hole(random);
        var objects = new List<(int At, int Count)>();
        int[] lastReadBy = [.. Enumerable.Repeat(-UnitsInMemory, Headers)];
        for (int unit = 0; unit < Units; unit++)
        {
            if (unit % Sources == 0)
                random.Shuffle(sources); // folders stay: only the order of compilation is mixed
            foreach (Operation read in Pieces('R', sources[unit % Sources], PieceBlocks))
                yield return read;
            for (int i = 0; i < HeadersOfUnit; i++)
            {
                int header = (int)(Math.Pow(random.NextDouble(), 2) * Headers); // some are popular
                if (unit - lastReadBy[header] < UnitsInMemory)
                    continue; // the guest still has it in memory
                lastReadBy[header] = unit;
                foreach (Operation read in Pieces('R', headers[header], PieceBlocks))
                    yield return read;
            }

            objects.Add(Append(random.Next(1, 17)));
            foreach (Operation write in Pieces('W', objects[^1], PieceBlocks, think: 20))
                yield return write;
            yield return Journal();
            if (objects.Count < UnitsOfLink)
                continue;
            foreach (Operation read in objects.SelectMany(file => Pieces('R', file, LinkBlocks)))
                yield return read;
            objects.Clear();
            foreach (Operation write in Pieces('W', Append(random.Next(256, 1025)), LinkBlocks, think: 50))
                yield return write;
            yield return Journal();
        }

        Operation Journal() => new(1, 'S', journal + (journalAt++ % JournalBlocks), 1);

        (int At, int Count) Append(int count)
        {
            if (output + count > MovingDisk.BlockCount)
                output = Hole(random);
            output += count;
            return (output - count, count);
        }
    }

    /// <summary>Files in folders that lie anywhere in the data; the files of a folder follow each other.</summary>
    private static (int At, int Count)[] Files(Random random, int count, int maxBlocks)
    {
        var files = new (int, int)[count];
        int at = 0;
        for (int i = 0; i < count; i++)
        {
            if (i % FilesOfFolder == 0)
                at = Piece(random) + random.Next(MovingDisk.PieceBlocks - (FilesOfFolder * maxBlocks));
            files[i] = (at, random.Next(1, maxBlocks + 1));
            at += files[i].Item2;
        }

        return files;
    }

    /// <summary>The first block of a piece of data.</summary>
    private static int Piece(Random random)
        => random.Next(MovingDisk.BlockCount / MovingDisk.PieceBlocks / 2) * 2 * MovingDisk.PieceBlocks;

    /// <summary>The first block of a hole before the disk's last quarter.</summary>
    private static int Hole(Random random)
        => Math.Min(Piece(random), MovingDisk.BlockCount * 3 / 4) + MovingDisk.PieceBlocks;

    private static IEnumerable<Operation> Pieces(char kind, (int At, int Count) file, int max, int think = 1)
    {
        for (int done = 0; done < file.Count; done += max)
            yield return new Operation(
                done == 0 ? think : 1, kind, file.At + done, Math.Min(max, file.Count - done));
    }
}
