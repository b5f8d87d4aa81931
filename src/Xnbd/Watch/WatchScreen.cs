using System.Globalization;
using Spectre.Console;
using Spectre.Console.Rendering;
using Xnbd.Storage;

namespace Xnbd.Programs.Watch;

/// <summary>
/// The picture of a proxy for a window of a given size: exactly so many lines of exactly so many columns. What does not
/// fit is left out, the least important first. Text of the proxy is shown without control characters. Pure: a history
/// in, text out.
/// </summary>
/// <param name="history">What has been seen of the proxy; at least one report.</param>
/// <param name="columns">Columns of the window, at least 1.</param>
/// <param name="rows">Rows of the window, at least 1.</param>
/// <param name="unanswered">How long the proxy has not answered; zero if it does.</param>
/// <param name="signs">How things are drawn.</param>
internal sealed class WatchScreen(
    WatchHistory history, int columns, int rows, TimeSpan unanswered, WatchSigns signs) : Renderable
{
    private const int LabelColumns = 14;
    private const int RateColumns = 12; // as many as '1023.9 KiB/s' has
    private const int MaxColumns = 18;
    private const int ConnectionColumns = 38;

    private static readonly Style s_label = new(decoration: Decoration.Dim);

    private readonly WatchReport _report = history.Last!;

    /// <summary>How many cells of the map the window has room for, at least 1.</summary>
    public int Cells
    {
        get
        {
            List<Part> parts = Parts();
            return Math.Max(1, Math.Max(1, rows - parts.Sum(part => part.Lines.Count)) * columns);
        }
    }

    /// <inheritdoc/>
    protected override IEnumerable<Segment> Render(RenderOptions options, int maxWidth)
    {
        var lines = new List<List<Segment>>();
        List<Part> parts = Parts();
        int mapRows = rows - parts.Sum(part => part.Lines.Count);
        foreach (Part part in parts)
        {
            lines.AddRange(part.Lines);
            if (part.Rank == Rank.Progress)
                lines.AddRange(Map(mapRows));
        }

        while (lines.Count < rows)
            lines.Add([]);
        foreach ((int index, List<Segment> line) in lines.Take(rows).Index())
        {
            int left = columns;
            foreach (Segment segment in line)
            {
                if ((segment.CellCount() <= left ? segment : Segment.Truncate(segment, left)) is not { } fitting)
                    break;
                left -= fitting.CellCount();
                yield return fitting;
            }

            Style rest = line.Count > 0 && line[^1].Style.Background != Color.Default ? line[^1].Style : Style.Plain;
            yield return new Segment(new string(' ', Math.Max(0, left)), rest);
            if (index < rows - 1)
                yield return Segment.LineBreak;
        }
    }

    /// <summary>The parts of the screen, from what is kept longest to what is left out first.</summary>
    private enum Rank
    {
        State,
        Progress,
        Latency,
        Remote,
        Rates,
        Reads,
        Connections,
        Legend,
        Title,
    }

    private readonly record struct Part(Rank Rank, List<List<Segment>> Lines);

    /// <summary>The parts that fit, from top to bottom; at least one row is left for the map, if there are two.
    /// </summary>
    private List<Part> Parts()
    {
        List<Part> parts =
        [
            new(Rank.Title, [Title()]),
            new(Rank.State, [State()]),
            new(Rank.Progress, [Progress()]),
            new(Rank.Legend, Legend()),
            new(Rank.Rates,
            [
                .. Chart("to clients", WatchHistory.ToClients),
                .. Chart("from clients", WatchHistory.FromClients),
                .. Chart("from remote", WatchHistory.FromRemote),
            ]),
            new(Rank.Reads, [Reads()]),
            new(Rank.Latency, [Latency()]),
            new(Rank.Remote, [Remote()]),
            new(Rank.Connections, Connections()),
        ];
        while (parts.Count > 1 && parts.Sum(part => part.Lines.Count) >= rows)
            parts.Remove(parts.MaxBy(part => part.Rank));
        return parts;
    }

    private List<Segment> Title()
    {
        string remote = _report.Remote is { } uri ? Plain(uri) + " -> " : "", image = Plain(_report.CacheImage);
        string time = $" up {TimeSpan.FromSeconds(Math.Clamp(Math.Floor(history.Now), 0, 1e9)):c}, q quits";
        int room = Math.Max(0, columns - time.Length);
        string left = remote + image;
        if (left.Length > room)
            left = remote + Path.GetFileName(image);
        left = left.Length > room ? left[..room] : left.PadRight(room);
        return [new Segment(left, new Style(decoration: Decoration.Bold)), new Segment(time, s_label)];
    }

    private List<Segment> State()
    {
        var state = WatchState.Of(history, unanswered);
        Style style = state.Mood switch
        {
            WatchMood.Alarm => new Style(Color.White, Color.Maroon, Decoration.Bold),
            WatchMood.Warning => new Style(Color.Black, Color.Olive, Decoration.Bold),
            WatchMood.Done => new Style(Color.Black, Color.Green, Decoration.Bold),
            WatchMood.Busy => new Style(Color.White, Color.Navy, Decoration.Bold),
            _ => new Style(Color.White, Color.Grey, Decoration.None),
        };
        return [new Segment($" {Plain(state.Text)}", style)];
    }

    private List<Segment> Progress()
    {
        long local = _report.Blocks - _report.MissingBlocks;
        string percent = $"{ControlProgress.Percent(local, _report.Blocks)} % local ".PadLeft(LabelColumns);
        string bytes = $" {Size(local)} of {ByteCount.Describe(Math.Max(0, _report.Size))}";
        int width = Math.Max(0, columns - percent.Length - bytes.Length);
        double share = _report.Blocks > 0 ? Math.Clamp((double)local / _report.Blocks, 0, 1) : 1;
        int filled = (int)(width * share);
        return
        [
            new Segment(percent, new Style(decoration: Decoration.Bold)),
            new Segment(new string(signs.Bar, filled), new Style(Color.Green)),
            new Segment(new string(signs.BarRest, width - filled), s_label),
            new Segment(bytes),
        ];
    }

    /// <summary>The disk. If there are other cells than asked for, as after a change of the window, some are shown.
    /// </summary>
    private IEnumerable<List<Segment>> Map(int mapRows)
    {
        int area = (int)Math.Min((long)mapRows * columns, int.MaxValue), cells = Math.Min(area, _report.Map.Length);
        for (int at = 0; at < cells; at += columns)
        {
            var line = new List<Segment>();
            int end = Math.Min(at + columns, cells);
            for (int i = at; i < end;)
            {
                char cell = CellAt(i);
                int first = i;
                while (i < end && CellAt(i) == cell)
                    i++;
                (char sign, Style style) = signs.Cell(cell);
                line.Add(new Segment(new string(sign, i - first), style));
            }

            yield return line;
        }

        for (int drawn = (cells + columns - 1) / columns; drawn < mapRows; drawn++)
            yield return [];

        char CellAt(int index) => _report.Map[(int)((long)index * _report.Map.Length / cells)];
    }

    private List<List<Segment>> Legend()
    {
        (char Cell, string Text)[] entries =
        [
            ('F', $"fetched {Size(_report.FetchedBlocks)}"),
            ('W', $"written here {Size(_report.WrittenBlocks - _report.ZeroedBlocks)}"),
            ('Z', $"zeroed here {Size(_report.ZeroedBlocks)}"),
            ('f', "in part"),
            ('.', $"missing {Size(_report.MissingBlocks)}"),
            ('*', $"being fetched {ByteCount.Describe(Math.Max(0, _report.BytesInFlight))}"),
        ];
        var lines = new List<List<Segment>> { new() };
        foreach ((char cell, string text) in entries)
        {
            (char sign, Style style) = signs.Cell(cell);
            if (Segment.CellCount(lines[^1]) + text.Length + 2 > columns)
                lines.Add([]);
            lines[^1].Add(new Segment($"{sign} ", style));
            lines[^1].Add(new Segment($"{text}  "));
        }

        return lines;
    }

    /// <summary>A rate, now and in the last minutes; several rows high in a large window.</summary>
    private IEnumerable<List<Segment>> Chart(string label, Func<WatchHistory.Sample, double> what)
    {
        int height = Math.Clamp((rows - 20) / 8, 1, 4);
        int width = columns - LabelColumns - RateColumns - 1 - MaxColumns;
        double?[] rates = width > 0 ? history.Rates(what, width) : [];
        double max = rates.Max() is { } highest and > 0 ? highest : 1;
        double top = max * 8 / 7; // a gap stays between this chart and the one above
        for (int row = 0; row < height; row++)
        {
            bool isLast = row == height - 1;
            string text = isLast ? Bytes(history.Rate(what)).PadLeft(RateColumns) : new string(' ', RateColumns);
            char[] drawn = Array.ConvertAll(rates, rate => signs.Level(rate, top, height - 1 - row, height));
            yield return
            [
                new Segment((isLast ? label : "").PadRight(LabelColumns), s_label),
                new Segment($"{text} "),
                new Segment(new string(drawn), new Style(Color.Teal)),
                new Segment(row == 0 && width > 0 && max > 1 ? $" max {Bytes(max)}" : "", s_label),
            ];
        }
    }

    private List<Segment> Reads()
    {
        double all = (double)_report.Hits + _report.Misses;
        string share = all > 0 ? string.Create(
            CultureInfo.InvariantCulture,
            $"; {Math.Floor(1000.0 * _report.Hits / all) / 10:0.0} % of {Count(all)} were hits") : "";
        string clients = _report.Clients == 1 ? "1 client" : $"{_report.Clients} clients";
        return Labelled(
            "reads",
            $"{Count(history.Rate(WatchHistory.Hits))} hits/s, {Count(history.Rate(WatchHistory.Misses))} misses/s"
            + $"{share}; {clients}");
    }

    private List<Segment> Latency()
    {
        long misses = history.Latency(out long median, out long p99);
        string last = $"{WatchHistory.LatencySpan:0} s";
        return Labelled(
            "misses took",
            misses == 0 ? $"none was answered in the last {last}"
                : $"median {Time(median)}, p99 {Time(p99)} ({Count(misses)} in the last {last})");
    }

    private List<Segment> Remote()
    {
        if (_report.Remote is null)
            return Labelled("remote", "none: this is a target");
        string waiting = _report.RemoteWaitingReads == 0 ? "" : $", {_report.RemoteWaitingReads} wait";
        return Labelled(
            "remote",
            $"{_report.RemoteConnections.Length} of {_report.RemoteWanted} connections, {_report.RequestsInFlight} "
            + $"fetches ({ByteCount.Describe(Math.Max(0, _report.BytesInFlight))}) under way{waiting}");
    }

    private List<List<Segment>> Connections()
    {
        int perLine = Math.Max(1, (columns - 2) / ConnectionColumns);
        var lines = new List<List<Segment>>();
        foreach (WatchConnection[] some in _report.RemoteConnections.Take(4 * rows).Chunk(perLine))
        {
            lines.Add([new Segment("  ")]);
            foreach (WatchConnection connection in some)
            {
                bool isSilent = connection.SilentMs >= 1000;
                string requests = connection.Requests == 1 ? "1 request" : $"{connection.Requests} requests";
                string state = isSilent ? $"silent for {connection.SilentMs / 1000} s, {requests}"
                    : connection.Requests == 0 ? "idle" : requests;
                string text = $"#{connection.Id} {state}, {Bytes(history.ReceiveRate(connection.Id))}";
                Style style = isSilent ? new Style(Color.Olive) : Style.Plain;
                lines[^1].Add(new Segment(text.PadRight(ConnectionColumns), style));
            }
        }

        return lines;
    }

    private static List<Segment> Labelled(string label, string text)
        => [new Segment(label.PadRight(LabelColumns), s_label), new Segment(text)];

    private static string Size(long blocks)
        => ByteCount.Describe((long)Math.Min(Math.Max(0, (double)blocks) * BlockRange.BlockSize, long.MaxValue / 2));

    private static string Bytes(double rate) => $"{ByteCount.Describe((long)Math.Clamp(rate, 0, long.MaxValue / 2))}/s";

    private static string Count(double count) => count.ToString("#,0", CultureInfo.InvariantCulture);

    private static string Time(long microseconds)
        => microseconds < 1000 ? $"{microseconds} us" : microseconds < 1_000_000
            ? string.Create(CultureInfo.InvariantCulture, $"{microseconds / 1000.0:0.0} ms")
            : string.Create(CultureInfo.InvariantCulture, $"{microseconds / 1e6:0.0} s");

    /// <summary>Without control characters, which a terminal would obey, and not too long to be looked at.</summary>
    internal static string Plain(string text)
    {
        const int max = 1000;
        return string.Concat(text.Take(max).Select(c => char.IsControl(c) || char.IsSurrogate(c) ? '?' : c));
    }
}
