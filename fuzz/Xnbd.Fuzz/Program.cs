using SharpFuzz;

namespace Xnbd.Fuzz;

/// <summary>
/// The fuzz targets as a program. Under afl-fuzz it runs one target on each input that it is given; by hand it replays
/// inputs from files, which needs no instrumented assemblies.
/// </summary>
public static class Program
{
    private const string Usage = """
        Xnbd.Fuzz TARGET              runs the target under afl-fuzz, or once on standard input
        Xnbd.Fuzz TARGET FILE...      replays inputs: exit code 1 when one of them fails
        Xnbd.Fuzz --list              prints the names of the targets
        Xnbd.Fuzz --make-corpus DIR   writes the seeds of each target to DIR/TARGET/
        """;

    public static int Main(string[] args)
    {
        switch (args)
        {
            case ["--list"]:
                foreach (string each in FuzzTarget.All.Keys)
                    Console.WriteLine(each);
                return 0;
            case ["--make-corpus", string folder]:
                MakeCorpus(folder);
                return 0;
            case [string name, .. string[] files] when FuzzTarget.All.TryGetValue(name, out Func<FuzzTarget>? make):
                var target = new Lazy<FuzzTarget>(make);
                if (files.Length > 0)
                    return files.Count(file => !Replay(name, target.Value, file)) == 0 ? 0 : 1;
                Fuzzer.OutOfProcess.Run(stream => target.Value.Run(ReadAll(stream)));
                return 0;
            default:
                Console.Error.WriteLine(Usage);
                return 2;
        }
    }

    private static bool Replay(string name, FuzzTarget target, string file)
    {
        try
        {
            target.Run(File.ReadAllBytes(file));
            return true;
        }
        catch (Exception failure)
        {
            Console.Error.WriteLine($"{name}: {file} fails: {failure}");
            return false;
        }
    }

    private static byte[] ReadAll(Stream stream)
    {
        using var memory = new MemoryStream();
        stream.CopyTo(memory);
        return memory.ToArray();
    }

    private static void MakeCorpus(string folder)
    {
        foreach ((string target, Func<FuzzTarget> make) in FuzzTarget.All)
        {
            string own = Directory.CreateDirectory(Path.Combine(folder, target)).FullName;
            foreach ((string name, byte[] input) in make().Seeds())
                File.WriteAllBytes(Path.Combine(own, name), input);
        }
    }
}
