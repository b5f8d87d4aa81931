using System.Globalization;

namespace Xnbd.Bench;

/// <summary>What the benchmark is told to do.</summary>
internal sealed record BenchOptions
{
    public const string Usage = """
        usage: Xnbd.Bench [OPTION ...]
          --quick           the main workloads, 2 rounds of 1 s
          --json            the figures for programs
          --only TEXT       workloads whose name contains TEXT
          --rounds NUMBER   rounds of each workload, 1 to 1000 [default: 3]
          --seconds NUMBER  length of a run in seconds, 0.1 to 3600 [default: 3]
          --disk FOLDER     where the images for cold reads go [default: out]
          --help            show this
        """;

    public bool IsQuick { get; private init; }

    public bool IsJson { get; private init; }

    /// <summary>A part of a workload's name; null for all workloads.</summary>
    public string? Only { get; private init; }

    public int Rounds { get; private init; }

    public double Seconds { get; private init; }

    /// <summary>A folder on a disk; null for the default one.</summary>
    public string? Disk { get; private init; }

    /// <summary>Reads the command line.</summary>
    /// <param name="args">The words.</param>
    /// <param name="fault">What is wrong with them; null if nothing is, or if help was asked for.</param>
    /// <returns>Null when there is a fault, or when help was asked for.</returns>
    public static BenchOptions? Parse(string[] args, out string? fault)
    {
        bool isQuick = args.Contains("--quick");
        var options = new BenchOptions { IsQuick = isQuick, Rounds = isQuick ? 2 : 3, Seconds = isQuick ? 1 : 3 };
        fault = null;
        for (int i = 0; i < args.Length; i++)
        {
            string option = args[i];
            if (option == "--help")
                return null;
            if (option is "--quick" or "--json")
            {
                options = option == "--json" ? options with { IsJson = true } : options;
                continue;
            }

            if (option is not ("--only" or "--rounds" or "--seconds" or "--disk"))
                fault = $"unknown option '{option}'";
            else if (++i == args.Length)
                fault = $"{option} needs a value";
            else
                options = options.With(option, args[i], out fault);
            if (fault is not null)
                return null;
        }

        return options;
    }

    private BenchOptions With(string option, string value, out string? fault)
    {
        CultureInfo culture = CultureInfo.InvariantCulture;
        fault = null;
        switch (option)
        {
            case "--only":
                return this with { Only = value };
            case "--disk":
                return this with { Disk = value };
            case "--rounds" when int.TryParse(value, NumberStyles.None, culture, out int rounds)
                && rounds is >= 1 and <= 1000:
                return this with { Rounds = rounds };
            case "--seconds" when double.TryParse(value, culture, out double seconds) && seconds is >= 0.1 and <= 3600:
                return this with { Seconds = seconds };
            default:
                fault = $"{option} {value}: not a number in its range";
                return this;
        }
    }
}
