using System.Globalization;

namespace Xnbd.Bench;

/// <summary>The tables, in Markdown.</summary>
internal static class Report
{
    public static void Print(BenchOptions options, Machine machine, Results results)
    {
        Console.WriteLine(machine);
        Console.WriteLine(Line($"Medians of {options.Rounds} rounds of {options.Seconds:0.#} s."));
        PrintFigures(results);
        PrintRatios(results, "best peer", results.ToBestPeer);
        PrintRatios(results, "its own", results.ToTargetMode);
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

    private static string Line(FormattableString text) => text.ToString(CultureInfo.InvariantCulture);
}
