using System.Globalization;
using Xnbd.Bench.Moves;

namespace Xnbd.Bench;

/// <summary>The tables, in Markdown.</summary>
internal static class Report
{
    public static void Print(
        BenchOptions options, Machine machine, Results results, IReadOnlyList<MoveResult> moves, Footprints footprints)
    {
        Console.WriteLine(machine);
        if (moves.Count > 0)
        {
            PrintMoves(moves);
            return;
        }

        if (!options.IsFootprintsOnly)
        {
            Console.WriteLine(Line($"Medians of {options.Rounds} rounds of {options.Seconds:0.#} s."));
            PrintFigures(results);
        }

        PrintRatios(results, "best peer", results.ToBestPeer);
        PrintRatios(results, "its own", results.ToTargetMode);
        PrintShares(results);
        PrintBeside(results);
        PrintFootprints(footprints);
    }

    private static void PrintFigures(Results results)
    {
        Table(
            "workload", "transport", "server", "rate:", "p50 us:", "p99 us:", "server CPU us/request:",
            "client CPU us/request:", "peak MiB:");
        foreach (Case @case in results.Cases)
        {
            string name = @case.Workload.Name, transport = @case.TransportName;
            foreach ((Peer peer, Measurement m) in results.Servers(@case))
            {
                Row(
                    name, transport, peer.Name, Line($"{m.Rate:#,0} {@case.Workload.Unit}"), Text(m.P50, "0"),
                    Text(m.P99, "0"), Text(m.ServerCpu, "0.0"), Text(m.ClientCpu, "0.0"),
                    Text(m.PeakKibibytes / 1024, "0"));
                name = transport = "";
            }
        }
    }

    private static void PrintRatios(Results results, string other, Func<Case, Ratio?> ratioOf)
    {
        (Case Case, Ratio? Ratio)[] rows = [.. results.Cases.Select(@case => (@case, ratioOf(@case)))];
        if (rows.All(row => row.Ratio is null))
            return;
        Table(
            "workload", "transport", other, "rate : its:", "server CPU per byte : its:", "client CPU per byte : its:",
            "p99 : its:");
        foreach ((Case @case, Ratio? ratio) in rows)
        {
            if (ratio is not null)
                Row(
                    @case.Workload.Name, @case.TransportName, ratio.To.Name, Text(ratio.Rate, "0.00"),
                    Text(ratio.ServerCpu, "0.00"), Text(ratio.ClientCpu, "0.00"), Text(ratio.P99, "0.00"));
        }
    }

    /// <summary>Whether many connections get fair shares.</summary>
    private static void PrintShares(Results results)
    {
        Case[] cases = [.. results.Cases.Where(@case => results.Has(@case, m => m.SlowestToMedian))];
        if (cases.Length == 0)
            return;
        Table("workload", "transport", "server", "slowest : median connection:");
        foreach (Case @case in cases)
        {
            foreach ((Peer peer, Measurement m) in results.Servers(@case))
                Row(@case.Workload.Name, @case.TransportName, peer.Name, Text(m.SlowestToMedian, "0.00"));
        }
    }

    /// <summary>What small requests suffer from large ones beside them.</summary>
    private static void PrintBeside(Results results)
    {
        Case[] cases = [.. results.Cases.Where(@case => results.Has(@case, m => m.RateBeside))];
        if (cases.Length == 0)
            return;
        Table("workload", "transport", "server", "p99 us:", "p99 : alone:", "large reader, MiB/s:");
        foreach (Case @case in cases)
        {
            foreach ((Peer peer, Measurement m) in results.Servers(@case))
                Row(
                    @case.Workload.Name, @case.TransportName, peer.Name, Text(m.P99, "0"),
                    Text(results.P99ToAlone(@case, peer), "0.00"), Text(m.RateBeside, "#,0"));
        }
    }

    private static void PrintMoves(IReadOnlyList<MoveResult> moves)
    {
        Table(
            "move", "way", "first I/O, ms:", "hand-over, ms:", "total, s:", "total : ideal:", "over the ideal, MiB:",
            "operations lost:", "differences:", "operations/s:", "reads: p99, ms:", "of the worst tenth:",
            "writes: p99, ms:", "pause at the end, ms:");
        MoveCase? last = null;
        foreach ((MoveCase @case, string way, MoveFigures? figures, string failure) in moves)
        {
            string name = @case == last ? "" : @case.ToString()["move: ".Length..];
            last = @case;
            if (figures is not { } f)
            {
                Row([name, way, "", "", failure.Split('\n')[^1], .. Enumerable.Repeat("", 9)]);
                continue;
            }

            Row(
                name, way, Text(f.FirstReply, "#,0"), Text(f.HandOver, "#,0"), Text(f.Seconds, "0.0"),
                Text(f.ToIdeal, "0.00"), Text(f.BytesOverIdeal / (1 << 20), "#,0"), Line($"{f.Lost}"),
                Text(f.Differences, "0"), Text(f.OperationRate, "0"), Text(f.ReadP99, "0.0"),
                Text(f.WorstReadP99, "0.0"), Text(f.WriteP99, "0.0"), Text(f.PauseAtEnd, "0.0"));
        }
    }

    private static void PrintFootprints(Footprints footprints)
    {
        if (footprints.Idle.Count > 0)
        {
            Table(
                "server", "start to greeting, ms:", "idle, MiB:",
                Line($"with {Footprints.Clients:#,0} idle clients, MiB:"));
            foreach ((Peer peer, Footprint f) in footprints.Idle)
                Row(peer.Name, Text(f.StartMilliseconds, "0.0"), Text(f.Idle, "0.0"), Text(f.Used, "0.0"));
        }

        if (footprints.OfBigDisk.Count > 0)
        {
            Table(
                "disk of 16 TiB", "server", "start to greeting, ms:", "idle, MiB:",
                Line($"after {Footprints.Writes:#,0} random writes of 4 KiB, MiB:"),
                "start after a kill, ms:");
            foreach ((Mode mode, Peer peer, Footprint f) in footprints.OfBigDisk)
                Row(
                    mode.ToString().ToLowerInvariant(), peer.Name, Text(f.StartMilliseconds, "0.0"),
                    Text(f.Idle, "0.0"), Text(f.Used, "0.0"), Text(f.RestartMilliseconds, "0.0"));
        }
    }

    /// <summary>Begins a table. A column whose title ends with a colon has numbers.</summary>
    private static void Table(params string[] titles)
    {
        Console.WriteLine();
        Row([.. titles.Select(title => title.TrimEnd(':'))]);
        Console.WriteLine($"|{string.Concat(titles.Select(title => title.EndsWith(':') ? "---:|" : "---|"))}");
    }

    private static void Row(params string[] cells) => Console.WriteLine($"| {string.Join(" | ", cells)} |");

    private static string Text(double figure, string format)
        => double.IsNaN(figure) ? "" : figure.ToString(format, CultureInfo.InvariantCulture);

    /// <summary>A text with numbers as in the tables.</summary>
    public static string Line(FormattableString text) => text.ToString(CultureInfo.InvariantCulture);
}
