using System.Text.Json.Nodes;
using Spectre.Console;
using Xnbd.Programs.Watch;

namespace Xnbd.Tests;

/// <summary>The screen of <c>xnbd-bgctl --watch</c>, as text, for a window of a given size.</summary>
public class WatchScreenTests
{
    private static readonly WatchReport s_report = new()
    {
        UptimeMs = 10_000,
        Mode = "proxy",
        Remote = "nbd://old:8520",
        RemoteWanted = 2,
        RemoteConnections = [new WatchConnection(1, 3, 0, 1000), new WatchConnection(2, 0, 0, 0)],
        RemoteLostMs = null,
        RemoteFailure = null,
        RemoteWaitingReads = 0,
        Incoming = false,
        CacheImage = "/srv/disk.img",
        Size = 4096 * 1000,
        Blocks = 1000,
        MissingBlocks = 750,
        FetchedBlocks = 200,
        WrittenBlocks = 50,
        ZeroedBlocks = 10,
        FetchedBytes = 0,
        ZeroBytes = 0,
        RequestsInFlight = 3,
        BytesInFlight = 12288,
        Hits = 900,
        Misses = 100,
        MissLatency = [new WatchLatency(20_000, 5)],
        Clients = 1,
        ClientReadBytes = 0,
        ClientWrittenBytes = 0,
        StoreFailures = 0,
        CopyPaused = false,
        Job = new WatchJob("move", "fetch", "running", null, 0, 0, 0, 0, 0),
        Map = "FfWwZz.*",
    };

    /// <summary>The same proxy, five seconds later.</summary>
    private static readonly WatchReport s_later = s_report with
    {
        UptimeMs = 15_000,
        RemoteConnections = [new WatchConnection(1, 3, 0, 1000 + (5 << 20)), new WatchConnection(2, 1, 4500, 0)],
        MissingBlocks = 500,
        FetchedBlocks = 450,
        Hits = 1900,
        Misses = 200,
        MissLatency = [new WatchLatency(20_000, 103), new WatchLatency(300_000, 7)],
        ClientReadBytes = 10 << 20,
        ClientWrittenBytes = 5 << 10,
    };

    private static WatchHistory HistoryOf(params WatchReport[] reports)
    {
        var history = new WatchHistory();
        foreach (WatchReport report in reports)
            history.Add(report);
        return history;
    }

    private static string[] Draw(
        WatchHistory history, int columns = 80, int rows = 24, int unanswered = 0, WatchSigns? signs = null)
    {
        var text = new StringWriter();
        IAnsiConsole console = AnsiConsole.Create(new AnsiConsoleSettings
        {
            Ansi = AnsiSupport.No,
            ColorSystem = ColorSystemSupport.NoColors,
            Out = new AnsiConsoleOutput(text),
        });
        console.Profile.Width = columns;
        console.Write(new WatchScreen(
            history, columns, rows, TimeSpan.FromSeconds(unanswered), signs ?? WatchSigns.Unicode));
        return text.ToString().ReplaceLineEndings("\n").Split('\n');
    }

    private static string State(WatchReport report, int unanswered = 0)
        => Draw(HistoryOf(report), unanswered: unanswered)[1].Trim();

    [Fact]
    public void A_copy_shows_progress_map_rates_latency_and_connections()
    {
        string[] lines = Draw(HistoryOf(s_report, s_later));
        Assert.Equal(24, lines.Length);
        Assert.All(lines, line => Assert.Equal(80, line.Length));
        string all = string.Join('\n', lines);
        foreach (string part in (string[])
        [
            "nbd://old:8520 -> /srv/disk.img",
            "up 00:00:15, q quits",
            " THE REMOTE IS SILENT, for 4 s",
            " 50.0 % local ██████",
            "░ 2 MiB of 3.9 MiB",
            "\n█▄▓▄░▄·»   ",
            "█ fetched 1.8 MiB  ▓ written here 160 KiB  ░ zeroed here 40 KiB  ▄ in part",
            "» being fetched 12 KiB",
            "to clients         2 MiB/s",
            "from clients       1 KiB/s",
            "from remote        1 MiB/s",
            "max 1 MiB/s",
            "reads         200 hits/s, 20 misses/s; 90.4 % of 2,100 were hits; 1 client",
            "misses took   median 20.0 ms, p99 300.0 ms (105 in the last 10 s)",
            "remote        2 of 2 connections, 3 fetches (12 KiB) under way",
            "  #1 3 requests, 1 MiB/s                #2 silent for 4 s, 1 request, 0 bytes/s",
        ])
            Assert.True(all.Contains(part, StringComparison.Ordinal), $"'{part}' is not in:\n{all}");
        WatchReport calm = s_later with { RemoteConnections = s_report.RemoteConnections };
        Assert.Equal("MOVING: 50.0 % is local, ETA 00:00:10", Draw(HistoryOf(s_report, calm))[1].Trim());
        Assert.Contains("#W+0+.*", string.Join('\n', Draw(HistoryOf(s_report), signs: WatchSigns.Ascii)).Replace(
            "#+W", "#W", StringComparison.Ordinal), StringComparison.Ordinal);
    }

    [Fact]
    public void What_matters_most_is_said_in_the_second_line()
    {
        WatchReport calm = s_report with { Job = null };
        Assert.Equal("what clients read is kept; --move fetches all", State(calm));
        Assert.StartsWith("incoming: nothing is kept", State(calm with { Incoming = true }), StringComparison.Ordinal);
        Assert.StartsWith("ALL IS LOCAL", State(calm with { MissingBlocks = 0 }), StringComparison.Ordinal);
        Assert.Equal("MOVING: 25.0 % is local", State(s_report));
        Assert.Equal("MOVING: 25.0 % is local, PAUSED (--resume)", State(s_report with { CopyPaused = true }));
        WatchJob list = new("prefetch", "fetch", "running", null, 200, 50, 0, 0, 0);
        Assert.Equal("FETCHING A LIST: 75.0 % of it is asked for", State(calm with { Job = list }));
        WatchJob verify = new("verify", "verify", "running", null, 0, 0, 200, 50, 0);
        Assert.Equal("VERIFYING: 25.0 % is verified", State(calm with { Job = verify }));
        Assert.Equal(
            "3 BLOCKS ARE NOT AS THE REMOTE HAS THEM: first at 0",
            State(calm with { Job = verify with { State = "failed", DifferentBlocks = 3, Error = "first at 0" } }));
        Assert.Equal(
            "cache-all HAS FAILED: no space",
            State(calm with { Job = new WatchJob("cache-all", "fetch", "failed", "no space", 0, 0, 0, 0, 0) }));
        Assert.StartsWith(
            "FETCHED DATA CANNOT BE KEPT", State(calm with { StoreFailures = 1 }), StringComparison.Ordinal);
        WatchReport lost = s_report with
        {
            RemoteConnections = [],
            RemoteLostMs = 72_900,
            RemoteFailure = "old: refused",
            RemoteWaitingReads = 4,
        };
        Assert.Equal("THE REMOTE IS LOST, for 72 s, 4 reads wait: old: refused", State(lost));
        Assert.Equal("THE PROXY DOES NOT ANSWER, for 12 s", State(lost, unanswered: 12));
        WatchReport switched = s_report with
        {
            Mode = "target",
            Remote = null,
            RemoteConnections = [],
            MissingBlocks = 0,
            Map = "FFFF",
        };
        Assert.Equal("SWITCHED: this is a target now; the remote is no longer used", State(switched));
        Assert.Contains("100.0 % local", string.Join('\n', Draw(HistoryOf(switched))), StringComparison.Ordinal);
    }

    /// <summary>The picture fills the window exactly; the state is there in the smallest one.</summary>
    [Fact]
    public void Any_window_is_filled_exactly()
    {
        WatchHistory history = HistoryOf(s_report, s_later);
        for (int columns = 1; columns < 260; columns += 1 + (columns / 7))
        {
            for (int rows = 1; rows < 100; rows += 1 + (rows / 7))
            {
                string[] lines = Draw(history, columns, rows);
                Assert.Equal(rows, lines.Length);
                Assert.All(lines, line => Assert.Equal(columns, line.Length));
                if (columns >= 20)
                    Assert.Contains(lines, line => line.StartsWith(" THE REMOTE IS SILEN", StringComparison.Ordinal));
                var screen = new WatchScreen(history, columns, rows, TimeSpan.Zero, WatchSigns.Ascii);
                Assert.InRange(screen.Cells, 1, columns * rows);
            }
        }

        string[] small = Draw(history, 20, 5);
        Assert.StartsWith(" 50.0 % local", small[1], StringComparison.Ordinal);
        Assert.Equal("█▄▓▄░▄·»", small[2].Trim());
    }

    [Fact]
    public void A_map_of_another_size_than_the_window_is_shown_as_a_whole()
    {
        string map = new string('F', 5000) + new string('.', 5000);
        string[] lines = Draw(HistoryOf(s_report with { Map = map }), 40, 24);
        string drawn = string.Concat(lines.Where(line => line.StartsWith('█') || line.StartsWith('·'))
            .Where(line => !line.Contains("fetched", StringComparison.Ordinal)
                && !line.Contains("missing", StringComparison.Ordinal)));
        Assert.Equal(drawn.Count(sign => sign == '█'), drawn.Count(sign => sign == '·'));
    }

    /// <summary>A proxy that lies does no more than look strange.</summary>
    [Fact]
    public void Absurd_reports_are_drawn_without_harm()
    {
        WatchReport absurd = s_report with
        {
            UptimeMs = long.MaxValue,
            Remote = "\e[2Jevil\n\r\a" + new string('x', 100_000),
            CacheImage = "\u0000\u009b\ud83d",
            Size = -1,
            Blocks = long.MinValue,
            MissingBlocks = long.MaxValue,
            FetchedBlocks = long.MaxValue,
            WrittenBlocks = long.MinValue,
            ZeroedBlocks = long.MaxValue,
            BytesInFlight = long.MinValue,
            Hits = long.MaxValue,
            Misses = long.MaxValue,
            RemoteConnections =
                [.. Enumerable.Range(0, 2000).Select(i => new WatchConnection(i / 2, -1, long.MaxValue, -5))],
            MissLatency = [new(-1, long.MaxValue), new(-1, 3), new(long.MaxValue, long.MaxValue), new(5, -7)],
            Map = "\e[31m" + new string('?', 9999),
            Job = new WatchJob(
                "\e", "\e", "running", "\e", long.MinValue, long.MaxValue, long.MinValue, long.MaxValue, -1),
        };
        WatchReport[] all =
        [
            absurd, s_report with { UptimeMs = long.MinValue }, absurd with { Size = long.MaxValue, Map = "" },
            absurd with { RemoteLostMs = long.MinValue, RemoteFailure = "\e" }, absurd with { Blocks = 0, Size = 0 },
        ];
        var history = new WatchHistory();
        foreach (WatchReport report in all)
        {
            history.Add(report);
            foreach ((int columns, int rows) in ((int, int)[])[(80, 24), (20, 5), (1, 1), (200, 60)])
            {
                string[] lines = Draw(history, columns, rows);
                Assert.Equal(rows, lines.Length);
                Assert.DoesNotContain(lines, line => line.Any(char.IsControl));
            }
        }
    }

    [Fact]
    public void What_is_no_report_is_not_read()
    {
        JsonObject Whole() => System.Text.Json.JsonSerializer.SerializeToNode(
            s_report, WatchJson.Default.WatchReport)!.AsObject();
        Assert.NotNull(WatchReport.TryRead(Whole()));
        foreach (string member in Whole().Select(member => member.Key).ToList())
        {
            JsonObject report = Whole();
            report.Remove(member);
            Assert.Null(WatchReport.TryRead(report));
            foreach (JsonNode? wrong in (JsonNode?[])[new JsonArray(null, 1), new JsonObject { ["x"] = 1 }, 1.5])
            {
                report = Whole();
                report[member] = wrong;
                Assert.Null(WatchReport.TryRead(report));
            }
        }

        foreach (JsonNode? other in (JsonNode?[])[null, 7, "text", new JsonArray(), new JsonObject()])
            Assert.Null(WatchReport.TryRead(other));
        JsonObject later = Whole();
        later["new-member"] = 1;
        Assert.NotNull(WatchReport.TryRead(later));
    }

    [Fact]
    public void A_history_forgets_what_is_old_and_what_was_before_a_restart()
    {
        var history = new WatchHistory();
        for (int i = 0; i < 1000; i++)
        {
            history.Add(s_report with
            {
                UptimeMs = i * 1000,
                ClientReadBytes = i * 100L,
                RemoteConnections = [new WatchConnection(i / 100, 0, 0, i % 100 * 1000)],
            });
        }

        Assert.Equal(100, history.Rate(WatchHistory.ToClients), 3);
        double?[] rates = history.Rates(WatchHistory.ToClients, 60);
        Assert.All(rates, rate => Assert.Equal(100, rate!.Value, 3));
        Assert.All(history.Rates(WatchHistory.FromRemote, 9), rate => Assert.InRange(rate!.Value, 900, 1000));
        history.Add(s_report with { UptimeMs = 100, ClientReadBytes = 0 });
        Assert.Equal(0, history.Rate(WatchHistory.ToClients));
        history.Add(s_report with { UptimeMs = 1100, ClientReadBytes = 50 });
        Assert.Equal(50, history.Rate(WatchHistory.ToClients), 3);
        Assert.Equal(1, history.Rates(WatchHistory.ToClients, 180).Count(rate => rate > 0));
    }

    [Fact]
    public void Only_the_misses_of_the_last_seconds_count()
    {
        WatchReport Report(int second, params (long Us, long Count)[] buckets) => s_report with
        {
            UptimeMs = second * 1000,
            MissLatency = [.. buckets.Select(bucket => new WatchLatency(bucket.Us, bucket.Count))],
        };
        WatchHistory history = HistoryOf(
            Report(0, (1000, 50)), Report(5, (1000, 60)), Report(16, (1000, 60), (2000, 98), (9000, 2)));
        Assert.Equal(100, history.Latency(out long median, out long p99));
        Assert.Equal((2000, 9000), (median, p99));
        history.Add(Report(40, (1000, 60), (2000, 98), (9000, 2)));
        Assert.Equal(0, history.Latency(out _, out _));
    }
}
