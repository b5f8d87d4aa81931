using System.CommandLine;
using System.Diagnostics;
using System.Globalization;
using System.Net.Sockets;
using System.Runtime.InteropServices;
using System.Text.Json;
using System.Text.Json.Nodes;
using Xnbd.Client;
using Xnbd.Control;
using Xnbd.Storage;

namespace Xnbd.Programs;

/// <summary>The program <c>xnbd-bgctl</c>: queries and controls a proxy through its control socket.</summary>
internal static class ControlProgram
{
    /// <summary>The program's name.</summary>
    public const string Name = "xnbd-bgctl";

    private static readonly TimeSpan s_lineTime = TimeSpan.FromSeconds(5);

    /// <summary>Runs the program.</summary>
    /// <returns>Its exit code.</returns>
    public static int Run(string[] args)
    {
        try
        {
            return Control(args);
        }
        catch (UsageException failure)
        {
            Console.Error.WriteLine($"{Name}: {failure.Message}");
            Console.Error.WriteLine($"Try '{Name} --help' for more information.");
            return ExitCode.Usage;
        }
        catch (Exception failure) when (failure is FailureException or ControlException or IOException)
        {
            Console.Error.WriteLine($"{Name}: {failure.Message}");
            return ExitCode.Failure;
        }
    }

    private static int Control(string[] args)
    {
        var query = new Option<bool>("--query") { Description = "Show mode, remote, and how much is cached" };
        var cacheAll = new Option<bool>("--cache-all")
        {
            Description = "Fetch all that is missing; return when that is done",
        };
        var cacheAll2 = new Option<bool>("--cache-all2") { Hidden = true };
        var switches = new Option<bool>("--switch")
        {
            Description = "Become a plain target; refused while blocks are missing",
        };
        var shutdown = new Option<bool>("--shutdown") { Hidden = true };
        var reconnect = new Option<bool>("--reconnect")
        {
            Description = "Use this remote from now on: SOCKET HOST PORT, or SOCKET URI",
        };
        var cancel = new Option<bool>("--cancel")
        {
            Description = "Stop a --cache-all that is under way; what was fetched stays",
        };
        var invalidate = new Option<bool>("--invalidate")
        {
            Description = "The remote has changed: give up what was fetched",
        };
        var progress = new Option<bool>("--progress") { Description = "With --cache-all: show the progress" };
        var detach = new Option<bool>("--detach") { Description = "With --cache-all: start it, and return at once" };
        var blocks = new Option<string?>("--blocks-per-request")
        {
            Description = "With --cache-all: blocks of 4096 bytes that are fetched at a time, 1 to 256 [default: 256]",
            HelpName = "NUMBER",
        };
        var force = new Option<bool>("--force")
        {
            Description = "With --switch: blocks that are missing become zeroes",
        };
        var exportName = new Option<string?>("--exportname")
        {
            Description = "With --reconnect: the remote's export [default: the same name; with a URI: its name]",
            HelpName = "NAME",
        };
        var json = new Option<bool>("--json") { Description = "Print JSON, for programs" };
        var words = new Argument<string[]>("SOCKET")
        {
            Description = "The proxy's control socket",
            Arity = ArgumentArity.ZeroOrMore,
        };
        var command = new Command(Name, "Controls a caching proxy of xnbd-server.")
        {
            query, cacheAll, cacheAll2, switches, shutdown, reconnect, cancel, invalidate, progress, detach, blocks,
            force, exportName, json, words,
        };
        if (CommandLine.Parse(command, args) is not { } result)
            return ExitCode.Success;

        Option<bool>[] actions = [query, cacheAll, switches, reconnect, cancel, invalidate];
        bool IsGiven(Option<bool> action) => result.GetValue(action)
            || (action == cacheAll && result.GetValue(cacheAll2))
            || (action == switches && result.GetValue(shutdown));
        Option<bool>[] given = [.. actions.Where(IsGiven)];
        if (given.Length != 1)
        {
            throw new UsageException(given.Length > 0 ? "only one thing can be done at a time"
                : "say what to do: --query, --cache-all, --switch, --reconnect, --cancel or --invalidate");
        }

        foreach ((Option option, Option of) in ((Option, Option)[])
            [(progress, cacheAll), (detach, cacheAll), (blocks, cacheAll), (force, switches), (exportName, reconnect)])
        {
            if (result.GetResult(option) is { Implicit: false } && given[0] != of)
                throw new UsageException($"{option.Name} goes with {of.Name} only");
        }

        if (result.GetValue(progress) && result.GetValue(detach))
            throw new UsageException("--progress shows what --detach does not wait for");
        int blocksPerRequest = CommandLine.Number(blocks.Name, result.GetValue(blocks), 1, 256) ?? 256;
        string[] arguments = result.GetValue(words) ?? [];
        bool takesOptions = !args.Contains("--");
        string? unknown = Array.Find(
            arguments, word => takesOptions && word.StartsWith("--", StringComparison.Ordinal));
        if (unknown is not null)
            throw new UsageException($"unknown option '{unknown}'");
        JsonObject? remote = given[0] == reconnect ? RemoteOf(arguments, result.GetValue(exportName)) : null;
        if (remote is null && arguments.Length != 1)
            throw new UsageException("the only argument is the path of the control socket");

        using ControlClient client = Connect(arguments[0]);
        bool isJson = result.GetValue(json);
        if (given[0] == query)
            return Show(client.Call("query")!, isJson);
        if (given[0] == switches)
        {
            JsonNode answer = client.Call("switch", new JsonObject { ["force"] = result.GetValue(force) })!;
            return Say(answer, isJson, "switched: the cache image is served as a target now");
        }

        if (remote is not null)
        {
            JsonNode answer = client.Call("reconnect", remote)!;
            return Say(answer, isJson, answer["remote"] is { } address
                ? $"the remote is {address.GetValue<string>()} now"
                : "this is a target now: there is no remote, and none is needed");
        }

        if (given[0] == invalidate)
            return Say(client.Call("invalidate")!, isJson, "invalidated: what was fetched will be fetched again");
        if (given[0] == cancel)
        {
            if (client.Call("query")!["job"] is not { } running || running["state"]!.GetValue<string>() != "running")
                throw new FailureException("nothing is being cached");
            JsonNode status = client.Call("job.cancel", new JsonObject { ["job"] = running["job"]!.GetValue<int>() })!;
            return Say(status, isJson, $"caching all: {status["state"]!.GetValue<string>()}");
        }

        JsonNode job = client.Call("cache-all", new JsonObject { ["blocks-per-request"] = blocksPerRequest })!;
        if (result.GetValue(detach))
            return Say(job, isJson, $"caching all: job {job["job"]!.GetValue<int>()} is running");
        return WaitFor(client, job, result.GetValue(progress), isJson);
    }

    /// <summary>
    /// The parameters of the method <c>reconnect</c>. Relative paths start at this program's folder, not at the
    /// proxy's.
    /// </summary>
    private static JsonObject RemoteOf(string[] arguments, string? exportName)
    {
        const string unix = "unix:";
        bool isUri = arguments.Length > 1 && RemoteUri.IsUri(arguments[1]);
        if (arguments.Length != (isUri ? 2 : 3))
            throw new UsageException("--reconnect takes SOCKET HOST PORT, or SOCKET URI");
        if (isUri)
        {
            try
            {
                return new JsonObject { ["uri"] = RemoteUri.Parse(arguments[1], exportName).ToString() };
            }
            catch (FormatException failure)
            {
                throw new UsageException(failure.Message);
            }
        }

        string host = arguments[1].StartsWith(unix, StringComparison.Ordinal) && arguments[1].Length > unix.Length
            ? unix + Path.GetFullPath(arguments[1][unix.Length..])
            : arguments[1];
        var parameters = new JsonObject { ["host"] = host, ["port"] = arguments[2] };
        if (exportName is not null)
            parameters["export-name"] = exportName;
        return parameters;
    }

    private static ControlClient Connect(string path)
    {
        try
        {
            return new ControlClient(path);
        }
        catch (SocketException failure) when (failure.SocketErrorCode == SocketError.AccessDenied)
        {
            throw new FailureException(
                $"the control socket '{path}' belongs to another user: "
                + "run this program as the proxy's own user, or as root");
        }
        catch (Exception failure) when (failure is SocketException or ArgumentException)
        {
            throw new FailureException(File.Exists(path)
                ? $"nobody listens on '{path}': the proxy has ended, or this is not a control socket "
                    + $"({failure.Message})"
                : $"there is no control socket '{path}': is the proxy running?");
        }
    }

    private static int WaitFor(ControlClient client, JsonNode job, bool showProgress, bool isJson)
    {
        var id = new JsonObject { ["job"] = job["job"]!.GetValue<int>(), ["wait-ms"] = 200 };
        using var interrupted = new ManualResetEventSlim();
        using var sigint = PosixSignalRegistration.Create(PosixSignal.SIGINT, context =>
        {
            context.Cancel = !interrupted.IsSet; // the second one ends the program, whatever it is doing
            interrupted.Set();
        });
        bool isTerminal = !Console.IsErrorRedirected;
        long start = Stopwatch.GetTimestamp(), lastLine = 0;
        long fetchedBefore = job["fetched-bytes"]!.GetValue<long>(), zeroesBefore = ZeroBytes(job);
        while (true)
        {
            JsonNode status = client.Call("job.status", (JsonObject)id.DeepClone())!;
            long total = status["blocks"]!.GetValue<long>(), missing = status["missing-blocks"]!.GetValue<long>();
            string state = status["state"]!.GetValue<string>();
            bool isLate = Stopwatch.GetElapsedTime(lastLine == 0 ? start : lastLine) >= s_lineTime;
            if (showProgress && (isTerminal || isLate || state != "running"))
            {
                lastLine = Stopwatch.GetTimestamp();
                Draw(
                    total,
                    missing,
                    status["fetched-bytes"]!.GetValue<long>() - fetchedBefore,
                    ZeroBytes(status) - zeroesBefore,
                    Stopwatch.GetElapsedTime(start),
                    isTerminal);
            }

            if (state != "running")
            {
                if (showProgress && isTerminal)
                    Console.Error.WriteLine();
                if (state != "done")
                    throw new FailureException(
                        $"caching all: {state}{ErrorOf(status)}");
                return Say(status, isJson, "all is cached");
            }

            if (!interrupted.IsSet)
                continue;
            if (isTerminal && !Console.IsInputRedirected)
            {
                Console.Error.Write("\nStop caching? (It goes on in the proxy otherwise.) [y/N] ");
                if (Console.ReadLine()?.Trim().StartsWith("y", StringComparison.OrdinalIgnoreCase) == true)
                {
                    client.Call("job.cancel", new JsonObject { ["job"] = id["job"]!.GetValue<int>() });
                    throw new FailureException("interrupted: the caching was stopped; what was fetched stays");
                }
            }

            throw new FailureException(
                "interrupted: the caching goes on in the proxy; --query shows the progress, --cancel stops it");
        }
    }

    /// <summary>
    /// Rate and remaining time count what is read from the remote. Zeroes that the remote reports are not read, and are
    /// shown apart.
    /// </summary>
    private static void Draw(long total, long missing, long fetched, long zeroes, TimeSpan time, bool isTerminal)
    {
        const int width = 30;
        double rate = fetched / Math.Max(0.001, time.TotalSeconds);
        string holes = zeroes == 0 ? "" : $", zeroes {ByteCount.Describe(zeroes)}";
        double seconds = Math.Ceiling(missing * (double)BlockRange.BlockSize / rate);
        string rest = missing == 0 ? "" : rate < 1 ? ", ETA unknown" : $", ETA {TimeSpan.FromSeconds(seconds):c}";
        string text = string.Create(
            CultureInfo.InvariantCulture,
            $"{Percent(total - missing, total)} %, fetched {ByteCount.Describe(fetched)}, "
            + $"{rate / (1 << 20):0.#} MiB/s{holes}{rest}");
        if (!isTerminal)
        {
            Console.Error.WriteLine($"{Name}: {text}");
            return;
        }

        int filled = total == 0 ? width : (int)(width * (total - missing) / total);
        Console.Error.Write($"\r\e[K[{new string('#', filled)}{new string('.', width - filled)}] {text}");
    }

    /// <summary>A proxy that was started before the last update may not report them.</summary>
    private static long ZeroBytes(JsonNode answer) => answer["zero-bytes"]?.GetValue<long>() ?? 0;

    /// <summary>A percentage that is 100.0 only for all.</summary>
    private static string Percent(long part, long all)
        => part == all ? "100.0" : (Math.Floor(1000.0 * part / all) / 10).ToString("0.0", CultureInfo.InvariantCulture);

    private static int Say(JsonNode answer, bool isJson, string text)
    {
        Console.WriteLine(isJson ? Indented(answer) : text);
        return ExitCode.Success;
    }

    private static int Show(JsonNode answer, bool isJson)
    {
        if (isJson)
        {
            Console.WriteLine(Indented(answer));
            return ExitCode.Success;
        }

        long Number(string name) => answer[name]!.GetValue<long>();
        static string Bytes(long count) => ByteCount.DescribeExactly(count);
        long blocks = Number("blocks"), cached = Number("cached-blocks"), written = Number("written-blocks");
        Console.WriteLine($"mode:         {answer["mode"]!.GetValue<string>()}");
        string remote = answer["remote"] is { } address
            ? $"{address.GetValue<string>()}, {Number("remote-connections")} connections"
            : "none: the proxy was switched";
        Console.WriteLine($"remote:       {remote}");
        Console.WriteLine($"cache image:  {answer["cache-image"]!.GetValue<string>()}");
        Console.WriteLine($"disk:         {Bytes(Number("size"))}, {blocks} blocks");
        string percent = Percent(cached, blocks);
        Console.WriteLine($"cached:       {Bytes(Number("cached-bytes"))}, {cached} blocks, {percent} %");
        Console.WriteLine($"written here: {Bytes(written * BlockRange.BlockSize)}, {written} blocks");
        Console.WriteLine($"fetched:      {Bytes(Number("fetched-bytes"))} since the start");
        Console.WriteLine($"zeroes:       {Bytes(ZeroBytes(answer))} that were not fetched");
        Console.WriteLine($"reads:        {Number("hits")} hits, {Number("misses")} misses");
        Console.WriteLine($"in flight:    {Number("requests-in-flight")} requests, {Bytes(Number("bytes-in-flight"))}");
        Console.WriteLine($"clients:      {Number("clients")} connections");
        long failures = Number("store-failures");
        if (failures > 0)
            Console.WriteLine($"NOT CACHED:   {failures} times fetched data could not be kept: see the proxy's log");
        if (answer["job"] is { } job)
            Console.WriteLine($"cache-all:    {job["state"]!.GetValue<string>()}{ErrorOf(job)}");
        return ExitCode.Success;
    }

    /// <summary>The error of a job, as the end of a line.</summary>
    private static string ErrorOf(JsonNode job)
        => job["error"] is { } error ? $": {error.GetValue<string>()}" : "";

    private static string Indented(JsonNode node)
    {
        using var stream = new MemoryStream();
        using (var writer = new Utf8JsonWriter(stream, new JsonWriterOptions { Indented = true }))
            node.WriteTo(writer);
        return System.Text.Encoding.UTF8.GetString(stream.ToArray());
    }
}
