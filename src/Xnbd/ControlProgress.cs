using System.Diagnostics;
using System.Globalization;
using System.Runtime.InteropServices;
using System.Text.Json.Nodes;
using Xnbd.Control;
using Xnbd.Storage;

namespace Xnbd.Programs;

/// <summary>
/// Waits for a job of the proxy, and shows how far it has come: on a terminal with a bar, otherwise with a line now and
/// then.
/// </summary>
internal sealed class ControlProgress
{
    /// <summary>The phases of jobs, in order.</summary>
    private static readonly string[] s_phases = ["fetch", "verify", "switch"];

    private static readonly TimeSpan s_lineTime = TimeSpan.FromSeconds(5);

    private readonly ControlClient _client;
    private readonly int _id;
    private readonly string _kind;
    private readonly bool _isShown;
    private readonly bool _isTerminal = !Console.IsErrorRedirected;
    private volatile bool _isInterrupted;
    private string _phase; // the present one, and what there was at its start
    private long _phaseStart;
    private long _fetchedBefore;
    private long _zeroesBefore;
    private long _lastLine;

    private ControlProgress(ControlClient client, JsonNode job, bool isShown)
    {
        (_client, _isShown) = (client, isShown);
        _id = Number(job, "job");
        _kind = KindOf(job);
        _phase = PhaseOf(job);
        Begin(job);
    }

    /// <summary>What a job does, for people.</summary>
    public static string Doing(JsonNode job) => KindOf(job) switch
    {
        ProxyJobs.VerifyKind => "verifying",
        ProxyJobs.MoveKind => "moving",
        ProxyJobs.PrefetchKind => "fetching the list",
        _ => "caching all",
    };

    /// <summary>Waits for the end of a job.</summary>
    /// <returns>The job in its last state.</returns>
    /// <exception cref="FailureException">The user has interrupted this program.</exception>
    public static JsonNode WaitFor(ControlClient client, JsonNode job, bool isShown)
        => new ControlProgress(client, job, isShown).Wait();

    private JsonNode Wait()
    {
        using var sigint = PosixSignalRegistration.Create(PosixSignal.SIGINT, context =>
        {
            context.Cancel = !_isInterrupted; // the second one ends the program, whatever it is doing
            _isInterrupted = true;
        });
        var question = new JsonObject { ["job"] = _id, ["wait-ms"] = 200 };
        while (true)
        {
            JsonNode status = _client.Call("job.status", (JsonObject)question.DeepClone())!;
            bool isRunning = status["state"]!.GetValue<string>() == "running";
            if (_isShown)
                Show(status, isRunning);
            if (!isRunning)
            {
                if (_isShown && _isTerminal)
                    Console.Error.WriteLine();
                return status;
            }

            if (_isInterrupted)
                throw Interrupted();
        }
    }

    private FailureException Interrupted()
    {
        (string work, string question) = _kind switch
        {
            ProxyJobs.VerifyKind => ("the comparison", "Stop verifying?"),
            ProxyJobs.MoveKind => ("the move", "Stop moving?"),
            ProxyJobs.PrefetchKind => ("the fetching", "Stop fetching?"),
            _ => ("the caching", "Stop caching?"),
        };
        if (_isTerminal && !Console.IsInputRedirected)
        {
            Console.Error.Write($"\n{question} (It goes on in the proxy otherwise.) [y/N] ");
            if (Console.ReadLine()?.Trim().StartsWith("y", StringComparison.OrdinalIgnoreCase) == true)
            {
                _client.Call("job.cancel", new JsonObject { ["job"] = _id });
                return new FailureException($"interrupted: {work} was stopped; what was fetched stays");
            }
        }

        return new FailureException(
            $"interrupted: {work} goes on in the proxy; --query shows the progress, --cancel stops it");
    }

    private void Show(JsonNode status, bool isRunning)
    {
        string phase = PhaseOf(status);
        while (_phase != phase && _phase != s_phases[^1])
        {
            Draw(status); // the end of the phase stays to be seen, however short it was
            if (_isTerminal)
                Console.Error.WriteLine();
            _phase = s_phases[Array.IndexOf(s_phases, _phase) + 1];
            Begin(status);
        }

        bool isLate = Stopwatch.GetElapsedTime(_lastLine) >= s_lineTime;
        if (!_isTerminal && isRunning && !isLate)
            return;
        _lastLine = Stopwatch.GetTimestamp();
        Draw(status);
    }

    /// <summary>A phase begins: rate and remaining time count from here.</summary>
    private void Begin(JsonNode status)
    {
        _phaseStart = _lastLine = Stopwatch.GetTimestamp();
        _fetchedBefore = status["fetched-bytes"]!.GetValue<long>();
        _zeroesBefore = ZeroBytes(status);
    }

    /// <summary>
    /// Rate and remaining time count what is read from the remote. Zeroes that the remote reports are not read, and are
    /// shown apart.
    /// </summary>
    private void Draw(JsonNode status)
    {
        long total = status["blocks"]!.GetValue<long>(), left = status["missing-blocks"]!.GetValue<long>();
        long read = status["fetched-bytes"]!.GetValue<long>() - _fetchedBefore;
        long zeroes = ZeroBytes(status) - _zeroesBefore;
        string verb = "fetched";
        JsonNode? comparison = status["verification"];
        if (_phase == "switch" || (_phase == "verify" && comparison is null))
            return; // nothing that takes a while
        if (_phase == "verify")
        {
            total = comparison!["blocks"]!.GetValue<long>();
            left = total - comparison["done-blocks"]!.GetValue<long>();
            (read, zeroes, verb) = (comparison["read-bytes"]!.GetValue<long>(), 0, "compared");
        }

        const int width = 30;
        double rate = read / Math.Max(0.001, Stopwatch.GetElapsedTime(_phaseStart).TotalSeconds);
        string holes = zeroes == 0 ? "" : $", zeroes {ByteCount.Describe(zeroes)}";
        double seconds = Math.Min(
            Math.Ceiling(left * (double)BlockRange.BlockSize / rate), TimeSpan.FromDays(9999).TotalSeconds);
        string rest = left <= 0 ? ""
            : status["paused"]?.GetValue<bool>() == true ? ", paused (--resume)"
            : rate < 1 ? ", ETA unknown" : $", ETA {TimeSpan.FromSeconds(seconds):c}";
        string text = string.Create(
            CultureInfo.InvariantCulture,
            $"{Percent(total - left, total)} %, {verb} {ByteCount.Describe(read)}, "
            + $"{rate / (1 << 20):0.#} MiB/s{holes}{rest}");
        if (!_isTerminal)
        {
            Console.Error.WriteLine($"{ControlProgram.Name}: {text}");
            return;
        }

        int filled = total == 0 ? width : (int)(width * (total - left) / total);
        Console.Error.Write($"\r\e[K[{new string('#', filled)}{new string('.', width - filled)}] {text}");
    }

    /// <summary>A proxy that was started before the last update may not report them.</summary>
    public static long ZeroBytes(JsonNode answer) => answer["zero-bytes"]?.GetValue<long>() ?? 0;

    /// <summary>A percentage that is 100.0 only for all.</summary>
    public static string Percent(long part, long all)
        => part == all ? "100.0" : (Math.Floor(1000.0 * part / all) / 10).ToString("0.0", CultureInfo.InvariantCulture);

    private static string KindOf(JsonNode job) => job["kind"]?.GetValue<string>() ?? ProxyJobs.CacheAllKind;

    private static string PhaseOf(JsonNode job) => job["phase"]?.GetValue<string>() ?? "fetch";

    private static int Number(JsonNode job, string name) => job[name]!.GetValue<int>();
}
