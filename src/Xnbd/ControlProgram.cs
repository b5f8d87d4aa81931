using System.CommandLine;
using System.Net.Sockets;
using System.Text.Json.Nodes;
using Xnbd.Client;
using Xnbd.Control;
using Xnbd.Programs.Watch;
using Xnbd.Storage;
using static Xnbd.Programs.ControlReport;

namespace Xnbd.Programs;

/// <summary>The program <c>xnbd-bgctl</c>: queries and controls a server through its control socket.</summary>
internal static class ControlProgram
{
    /// <summary>The program's name.</summary>
    public const string Name = "xnbd-bgctl";

    /// <summary>Runs the program.</summary>
    /// <returns>Its exit code.</returns>
    public static int Run(string[] args) => Run(Name, () => Control(args));

    /// <summary>Runs a control program, and reports what goes wrong.</summary>
    /// <param name="name">The program's name.</param>
    /// <param name="control">What it does; returns the exit code.</param>
    internal static int Run(string name, Func<int> control)
    {
        try
        {
            return control();
        }
        catch (UsageException failure)
        {
            Console.Error.WriteLine($"{name}: {failure.Message}");
            Console.Error.WriteLine($"Try '{name} --help' for more information.");
            return ExitCode.Usage;
        }
        catch (Exception failure) when (failure is FailureException or ControlException or IOException)
        {
            Console.Error.WriteLine($"{name}: {failure.Message}");
            return ExitCode.Failure;
        }
    }

    private static int Control(string[] args)
    {
        var query = new Option<bool>("--query") { Description = "Show the mode, and what it does" };
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
            Description = "Stop what is being cached, verified or moved; what was fetched stays",
        };
        var invalidate = new Option<bool>("--invalidate")
        {
            Description = "The remote has changed: give up what was fetched",
        };
        var begin = new Option<bool>("--begin")
        {
            Description = "The machine has moved (see xnbd-server --incoming): keep what is read from now on",
        };
        var verify = new Option<bool>("--verify")
        {
            Description = "Read the remote once more, and compare what was fetched; differences are listed",
        };
        var move = new Option<bool>("--move")
        {
            Description = "Fetch all that is missing, verify it, and switch; then the remote can be switched off",
        };
        var noVerify = new Option<bool>("--no-verify") { Description = "With --move: do not verify" };
        var prefetch = new Option<string?>("--prefetch")
        {
            Description = "Fetch what a record lists (see xnbd-server --record), before anything else",
            HelpName = "FILE",
        };
        var setRate = new Option<string?>("--set-rate")
        {
            Description = "Bytes per second of the background copy, such as 50M; 0: as fast as the line",
            HelpName = "RATE",
        };
        var pause = new Option<bool>("--pause") { Description = "Stop copying in the background for a while" };
        var resume = new Option<bool>("--resume") { Description = "Go on copying" };
        var clients = new Option<bool>("--clients") { Description = "List the clients that are connected" };
        var snapshot = new Option<bool>("--snapshot")
        {
            Description = "Make a snapshot of the image beside it, and say its name; of targets only",
        };
        var progress = new Option<bool>("--progress")
        {
            Description = "With --cache-all, --prefetch, --verify and --move: show the progress",
        };
        var detach = new Option<bool>("--detach")
        {
            Description = "With --cache-all, --prefetch, --verify and --move: start it, and return at once",
        };
        var blocks = new Option<string?>("--blocks-per-request")
        {
            Description = "With --cache-all and --move: blocks of 4096 bytes that are fetched at a time, 1 to 256 "
                + "[default: 256]",
            HelpName = "NUMBER",
        };
        var watch = new Option<bool>("--watch")
        {
            Description = "Show on a live screen what the proxy does, until q, Ctrl-C, the switch or its end",
        };
        var interval = new Option<string?>("--interval")
        {
            Description = "With --watch: seconds from one look to the next, 1 to 3600 [default: 1]",
            HelpName = "SECONDS",
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
            Description = "The server's control socket",
            Arity = ArgumentArity.ZeroOrMore,
        };
        var command = new Command(Name, "Queries and controls a running xnbd-server.")
        {
            query, watch, begin, cacheAll, cacheAll2, prefetch, verify, switches, shutdown, move, reconnect, cancel,
            setRate, pause, resume, invalidate, clients, snapshot, interval, progress, detach, blocks, noVerify, force,
            exportName, json, words,
        };
        if (CommandLine.Parse(command, args) is not { } result)
            return ExitCode.Success;

        Option[] actions =
        [
            query, watch, begin, cacheAll, prefetch, verify, switches, move, reconnect, cancel, setRate, pause, resume,
            invalidate, clients, snapshot,
        ];
        bool IsGiven(Option action) => (action is Option<bool> flag
            ? result.GetValue(flag)
            : result.GetResult(action) is { Implicit: false })
            || (action == cacheAll && result.GetValue(cacheAll2))
            || (action == switches && result.GetValue(shutdown));
        Option[] given = [.. actions.Where(IsGiven)];
        if (given.Length != 1)
        {
            throw new UsageException(given.Length > 0 ? "only one thing can be done at a time"
                : $"say what to do: {string.Join(", ", actions.SkipLast(1).Select(action => action.Name))} or "
                    + actions[^1].Name);
        }

        foreach ((Option option, Option[] of) in ((Option, Option[])[])
        [
            (progress, [cacheAll, prefetch, verify, move]),
            (detach, [cacheAll, prefetch, verify, move]),
            (blocks, [cacheAll, move]),
            (noVerify, [move]),
            (force, [switches]),
            (exportName, [reconnect]),
            (interval, [watch]),
        ])
        {
            if (result.GetResult(option) is { Implicit: false } && !of.Contains(given[0]))
            {
                string names = string.Join(" and ", of.Select(other => other.Name));
                throw new UsageException($"{option.Name} goes with {names} only");
            }
        }

        if (result.GetValue(progress) && result.GetValue(detach))
            throw new UsageException("--progress shows what --detach does not wait for");
        if (given[0] == watch && result.GetValue(json))
            throw new UsageException("--watch shows a screen: for programs there is --query --json");
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

        long? rate = CommandLine.Rate(setRate.Name, result.GetValue(setRate));

        if (given[0] == watch)
        {
            int seconds = CommandLine.Number(interval.Name, result.GetValue(interval), 1, 3600) ?? 1;
            return WatchProgram.Run(() => Connect(arguments[0]), TimeSpan.FromSeconds(seconds));
        }

        using ControlClient client = Connect(arguments[0]);
        bool isJson = result.GetValue(json);
        if (given[0] == query)
            return Show(client.Call("query")!, isJson);
        if (given[0] == clients)
            return ShowClients(client.Call("clients")!, isJson);
        if (given[0] == snapshot)
            return FollowSnapshot(client, isJson);
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

        if (given[0] == begin)
        {
            JsonNode answer = client.Call("begin")!;
            return Say(answer, isJson, answer["begun"]?.GetValue<bool>() == false
                ? "nothing has changed: what is read is kept already"
                : "what is read from now on is kept");
        }

        if (given[0] == pause)
            return Say(client.Call("pause")!, isJson, "paused: nothing is copied in the background until --resume");
        if (given[0] == resume)
            return Say(client.Call("resume")!, isJson, "what is to be copied in the background goes on");
        if (rate is not null)
        {
            return Say(
                client.Call("set-rate", new JsonObject { ["bytes-per-second"] = rate })!,
                isJson,
                rate == 0 ? "the background copy is not limited"
                    : $"the background copy is limited to {ByteCount.Describe(rate.Value)} per second");
        }

        if (given[0] == invalidate)
            return Say(client.Call("invalidate")!, isJson, "invalidated: what was fetched will be fetched again");
        if (given[0] == cancel)
        {
            if (client.Call("query")!["job"] is not { } running || running["state"]!.GetValue<string>() != "running")
                throw new FailureException("nothing is being cached, fetched, verified or moved");
            JsonNode status = client.Call("job.cancel", new JsonObject { ["job"] = running["job"]!.GetValue<int>() })!;
            return Say(status, isJson, $"{ControlProgress.Doing(status)}: {status["state"]!.GetValue<string>()}");
        }

        (string method, JsonObject parameters) = given[0] == verify ? (ProxyJobs.VerifyKind, [])
            : given[0] == prefetch
                ? (ProxyJobs.PrefetchKind, new JsonObject { ["file"] = Path.GetFullPath(result.GetValue(prefetch)!) })
                : (ProxyJobs.CacheAllKind, new JsonObject { ["blocks-per-request"] = blocksPerRequest });
        if (given[0] == move)
            (method, parameters["verify"]) = (ProxyJobs.MoveKind, !result.GetValue(noVerify));
        JsonNode job = client.Call(method, parameters)!;
        if (given[0] == prefetch && job["kind"]!.GetValue<string>() != ProxyJobs.PrefetchKind)
            return Say(job, isJson, $"{ControlProgress.Doing(job)} already: what the list names comes first now");
        if (result.GetValue(detach))
            return Say(job, isJson, $"{ControlProgress.Doing(job)}: job {job["job"]!.GetValue<int>()} is running");
        return Follow(client, job, result.GetValue(progress), isJson);
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

    /// <summary>Connects to a control socket.</summary>
    /// <exception cref="FailureException">Nobody listens there.</exception>
    internal static ControlClient Connect(string path)
    {
        try
        {
            return new ControlClient(path);
        }
        catch (SocketException failure) when (failure.SocketErrorCode == SocketError.AccessDenied)
        {
            throw new FailureException(
                $"the control socket '{path}' belongs to another user: "
                + "run this program as the server's own user, or as root");
        }
        catch (Exception failure) when (failure is SocketException or ArgumentException)
        {
            throw new FailureException(File.Exists(path)
                ? $"nobody listens on '{path}': the server has ended, or this is not a control socket "
                    + $"({failure.Message})"
                : $"there is no control socket '{path}': is the server running?");
        }
    }

    /// <summary>Starts a snapshot, waits for it, and reports its end.</summary>
    internal static int FollowSnapshot(ControlClient client, bool isJson)
    {
        JsonNode status = client.Call("snapshot")!;
        while (status["state"]!.GetValue<string>() == "running")
            status = client.Call("snapshot.status", new JsonObject { ["wait-ms"] = 10_000 })!;
        return status["state"]!.GetValue<string>() == "done"
            ? Say(status, isJson, status["path"]!.GetValue<string>())
            : throw new FailureException($"no snapshot was made: {Snapshot(status)}");
    }

    /// <summary>Waits for a job, and reports its end.</summary>
    internal static int Follow(ControlClient client, JsonNode job, bool isShown, bool isJson)
    {
        JsonNode status = ControlProgress.WaitFor(client, job, isShown);
        JsonNode? comparison = status["verification"];
        if (status["state"]!.GetValue<string>() == "done")
        {
            return Say(status, isJson, status["kind"]?.GetValue<string>() switch
            {
                ProxyJobs.VerifyKind => $"verified: {Compared(comparison!)}",
                ProxyJobs.MoveKind when comparison is null
                    => "moved: the cache image is served as a target now; the remote can be switched off",
                ProxyJobs.MoveKind
                    => "moved: the cache image is served as a target now; the remote can be switched off\n"
                        + $"verified: {Compared(comparison)}",
                ProxyJobs.PrefetchKind => "what the list names is cached",
                _ => "all is cached",
            });
        }

        if (comparison is not null && comparison["different-blocks"]!.GetValue<long>() > 0)
            Say(status, isJson, Differences(comparison));
        throw new FailureException(
            $"{ControlProgress.Doing(status)}: {status["state"]!.GetValue<string>()}{ErrorOf(status)}");
    }
}
