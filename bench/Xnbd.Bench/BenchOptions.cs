using System.CommandLine;
using System.CommandLine.Help;
using System.Globalization;
using Xnbd.Bench.Moves;
using Xnbd.TestKit;

namespace Xnbd.Bench;

/// <summary>The command line is wrong; the message says why.</summary>
internal sealed class UsageException(string message) : Exception(message);

/// <summary>What the benchmark is told to do.</summary>
internal sealed record BenchOptions
{
    public required bool IsQuick { get; init; }

    public required bool IsJson { get; init; }

    /// <summary>The workloads are printed, and not run.</summary>
    public required bool IsList { get; init; }

    /// <summary>No workloads are run: only starts and sizes are measured.</summary>
    public required bool IsFootprintsOnly { get; init; }

    /// <summary>Starts and sizes are measured, too: nothing was chosen that only workloads have.</summary>
    public bool HasFootprints => Only.Length == 0 && Sizes.Count == 0;

    public required IReadOnlyList<Transport> Transports { get; init; }

    /// <summary>Sizes of requests, as in <see cref="Workload.Size"/>; empty for all workloads.</summary>
    public required IReadOnlyList<string> Sizes { get; init; }

    public required IReadOnlyList<Mode> Modes { get; init; }

    /// <summary>Peers are chosen whose names begin with one of these; empty for all peers.</summary>
    public required IReadOnlyList<string> Peers { get; init; }

    /// <summary>A part of a workload's name; empty for all workloads.</summary>
    public required string Only { get; init; }

    public required int Rounds { get; init; }

    /// <summary>Length of one run in seconds.</summary>
    public required double Seconds { get; init; }

    /// <summary>A folder on a disk, for the images of cold reads.</summary>
    public required string Disk { get; init; }

    /// <summary>Whether a peer takes part.</summary>
    public bool Includes(Peer peer)
        => peer.IsOwn || peer.IsReference || Peers.Count == 0
            || Peers.Any(name => peer.Name.StartsWith(name, StringComparison.Ordinal));

    /// <summary>Whether a way to move a disk takes part. A move takes minutes, so xNBD must be named, too.</summary>
    public bool Includes(MoveWay way)
        => Peers.Count == 0 || Peers.Any(name => way.Name.StartsWith(name, StringComparison.Ordinal));

    /// <summary>Whether a move is run. Moves take minutes each, so they must be asked for.</summary>
    public bool Includes(MoveCase move)
        => IsOfMoves(Only) && !IsQuick && Sizes.Count == 0
            && move.ToString().Contains(Only, StringComparison.Ordinal);

    private static bool IsOfMoves(string only) => only.StartsWith("move", StringComparison.Ordinal);

    /// <summary>Whether a workload is run.</summary>
    public bool Includes(Workload workload)
        => !IsFootprintsOnly && (!IsQuick || workload.IsQuick) && Modes.Contains(workload.Mode)
            && (Sizes.Count == 0 || Sizes.Contains(workload.Size))
            && workload.Name.Contains(Only, StringComparison.Ordinal);

    /// <summary>Reads the command line.</summary>
    /// <returns>Null when help was asked for, and printed.</returns>
    /// <exception cref="UsageException">The command line is wrong.</exception>
    public static BenchOptions? Parse(string[] args)
    {
        string sizes = string.Join(",", Workloads.Sizes);
        string modes = Names<Mode>();
        var quick = new Option<bool>("--quick")
        {
            Description = "A cross-section: 2 rounds of 0.5 s, and the peers that are ahead",
        };
        var json = new Option<bool>("--json") { Description = "Print the figures as JSON, for programs" };
        var list = new Option<bool>("--list") { Description = "Print the chosen workloads; run nothing" };
        var footprints = new Option<bool>("--footprints")
        {
            Description = "Only the time of a start and the size, also with a disk of 16 TiB; no workloads",
        };
        Option<string?> transport = Text(
            "--transport", "LIST", $"How clients reach the servers: {Names<Transport>()} [default: unix,tcp]");
        Option<string?> size = Text("--sizes", "LIST", $"Only requests of these sizes: {sizes}");
        Option<string?> mode = Text("--mode", "LIST", $"Only these modes: {modes}");
        Option<string?> peers = Text(
            "--peers", "LIST",
            "Only peers whose names begin so, such as nbdkit,qemu-nbd; xnbd always takes part, other than in moves");
        Option<string?> only = Text("--only", "TEXT", "Only workloads whose names contain this; move: moves of a disk");
        Option<string?> rounds = Text(
            "--rounds", "NUMBER", "Rounds of each workload, 1 to 1000 [default: 3; 1 of moves]");
        Option<string?> seconds = Text("--seconds", "NUMBER", "Length of a run, 0.1 to 3600 [default: 1]");
        Option<string?> disk = Text("--disk", "FOLDER", "Where the images for cold reads go [default: out]");
        var command = new Command("script/bench", "Measures xNBD and its peers side by side, on this machine.")
        {
            quick, json, list, footprints, transport, size, mode, peers, only, rounds, seconds, disk, new HelpOption(),
        };
        ParseResult result = command.Parse(args, new ParserConfiguration { ResponseFileTokenReplacer = null });
        if (result.Action is HelpAction)
        {
            result.Invoke();
            return null;
        }

        if (result.Errors.Count > 0)
            throw new UsageException(result.Errors[0].Message.TrimEnd('.'));
        bool isQuick = result.GetValue(quick);
        string onlyNames = result.GetValue(only) ?? "";
        var options = new BenchOptions
        {
            IsQuick = isQuick,
            IsJson = result.GetValue(json),
            IsList = result.GetValue(list),
            IsFootprintsOnly = result.GetValue(footprints),
            Transports = [.. Words(transport, "unix,tcp", Names<Transport>()).Select(Value<Transport>)],
            Sizes = Words(size, "", sizes),
            Modes = [.. Words(mode, modes, modes).Select(Value<Mode>)],
            Peers = Words(peers, isQuick ? "nbdkit,nbd-server" : "", null),
            Only = onlyNames,
            Rounds = (int)Number(rounds, isQuick ? 2 : IsOfMoves(onlyNames) ? 1 : 3, 1, 1000, NumberStyles.None),
            Seconds = Number(seconds, isQuick ? 0.5 : 1, 0.1, 3600, NumberStyles.AllowDecimalPoint),
            Disk = result.GetValue(disk) ?? Path.Combine(Repository.Root, "out"),
        };
        if (options.IsFootprintsOnly && !options.HasFootprints)
            throw new UsageException("--footprints runs no workloads: it cannot be used with --only or --sizes");
        return options;

        // known: the words that are allowed; null for the beginnings of peers' names
        string[] Words(Option<string?> option, string @default, string? known)
        {
            string[] words = (result.GetValue(option) ?? @default).Split(',', StringSplitOptions.RemoveEmptyEntries);
            foreach (string word in words)
            {
                bool isKnown = known?.Split(',').Contains(word)
                    ?? Peer.All.Any(peer => peer.Name.StartsWith(word, StringComparison.Ordinal));
                if (!isKnown)
                    throw new UsageException($"{option.Name} {word}: unknown; known are {known ?? Peer.Names}");
            }

            return words;
        }

        double Number(Option<string?> option, double @default, double min, double max, NumberStyles style)
        {
            if (result.GetValue(option) is not { } word)
                return @default;
            return double.TryParse(word, style, CultureInfo.InvariantCulture, out double number)
                && number >= min && number <= max
                    ? number
                    : throw new UsageException($"{option.Name} {word}: not a number from {min} to {max}");
        }
    }

    private static Option<string?> Text(string name, string value, string description)
        => new(name) { Description = description, HelpName = value };

    private static string Names<T>() where T : struct, Enum => string.Join(",", Enum.GetNames<T>()).ToLowerInvariant();

    private static T Value<T>(string word) where T : struct, Enum => Enum.Parse<T>(word, ignoreCase: true);
}
