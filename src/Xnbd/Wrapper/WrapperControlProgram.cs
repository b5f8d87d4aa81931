using System.CommandLine;
using System.Globalization;
using System.Text.Json.Nodes;
using Xnbd.Control;
using Xnbd.Storage;
using static Xnbd.Programs.ControlReport;

namespace Xnbd.Programs.Wrapper;

/// <summary>The program <c>xnbd-wrapper-ctl</c>: controls a running <c>xnbd-wrapper</c>.</summary>
internal sealed class WrapperControlProgram
{
    /// <summary>The program's name.</summary>
    public const string Name = "xnbd-wrapper-ctl";

    private const string NameWord = "NAME";

    private readonly Option<string?> _socket = new("--socket", "-s")
    {
        Description = $"The wrapper's control socket [default: {WrapperOptions.DefaultSocket}]",
        HelpName = "PATH",
    };
    private readonly Option<bool> _json = new("--json") { Description = "Print JSON, for programs" };
    private readonly Option<string?> _targetName = new("--target-exportname")
    {
        Description = "With --add-proxy and --bgctl-reconnect: the remote's export",
        HelpName = NameWord,
    };
    private readonly Option<string?> _layer = new("--layer")
    {
        Description = "With --add-cow: a layer that is kept; it is made if it is absent",
        HelpName = "FILE",
    };
    private readonly Option<string?> _cowDirectory = new("--cow-dir")
    {
        Description = "With --add-cow: where a layer that is not kept goes [default: beside BASE]",
        HelpName = "DIR",
    };
    private readonly Option<bool> _readOnly = new("--readonly")
    {
        Description = "With --add-target, --add-cow and --add-proxy: refuse writes",
    };
    private readonly Option<string?> _grace = new("--grace")
    {
        Description = "With --remove-by-exportname, --remove-by-file and --shutdown: how long clients may go on "
            + "[default: until they leave]",
        HelpName = "SECONDS",
    };
    private readonly Option<bool> _force = new("--force")
    {
        Description = "With the same, and --bgctl-switch: do not wait for clients, or for missing blocks",
    };
    private readonly Option<bool> _progress = new("--progress")
    {
        Description = "With --bgctl-cache-all: show the progress",
    };
    private readonly Argument<string[]> _words = new("ARGUMENTS")
    {
        Description = "What the command needs",
        Arity = ArgumentArity.ZeroOrMore,
    };
    private readonly List<WrapperCommand> _commands;
    private ParseResult _result = null!;

    private WrapperControlProgram() => _commands =
    [
        new("--list", "-l", "List the exports", [], (client, _) => List(client)),
        new("--clients", null, "List the clients that are connected", [], (client, _)
            => ShowClients(client.Call("clients")!, IsJson)),
        new("--add-target", null, "Export an image or a device", ["NAME", "FILE"], AddTarget),
        new("--add-cow", null, "Export a base that never changes, under a layer", ["NAME", "BASE"], AddCow),
        new(
            "--add-proxy",
            null,
            "Export a remote disk, and keep what was read or written in a cache",
            ["NAME", "REMOTE_HOST", "REMOTE_PORT", "CACHE_IMAGE", "BITMAP_IMAGE", "CONTROL_SOCKET_PATH"],
            AddProxy),
        new("--add", "-a", "", ["FILE"], (client, words)
            => AddTarget(client, [words[0], words[0]])) { IsHidden = true }, // deprecated in the original already
        new("--remove-by-exportname", null, "Remove an export; its clients may go on", ["NAME"], (client, words)
            => Remove(client, words[0])),
        new("--remove-by-file", null, "Remove the exports of a file", ["FILE"], RemoveByFile),
        new("--bgctl-query", null, "Show the state of an export, as xnbd-bgctl --query does", ["NAME"], (client, words)
            => Show(Of(client, words[0]).Call("query")!, IsJson)),
        new("--bgctl-switch", null, "Make a target of a proxy, as xnbd-bgctl --switch does", ["NAME"], Switch),
        new("--bgctl-cache-all", null, "Fetch all that is missing, as xnbd-bgctl --cache-all does", ["NAME"], CacheAll),
        new(
            "--bgctl-reconnect",
            null,
            "Use another remote, as xnbd-bgctl --reconnect does",
            ["NAME", "REMOTE_HOST", "REMOTE_PORT"],
            Reconnect),
        new("--snapshot", null, "Make a snapshot of an export's image, and say its name", ["NAME"], (client, words)
            => ControlProgram.FollowSnapshot(Of(client, words[0]), IsJson)),
        new("--save", null, "Write the state file now", [], (client, _)
            => Say(client.Call("save")!, IsJson, "saved")),
        new("--load", null, "Add the exports of a state file", ["FILE"], Load),
        new("--reload", null, "Read the state file again, and change what differs", [], Reload),
        new("--orphan", null, "End when all clients have left; return at once", [], (client, _)
            => Say(client.Call("shutdown")!, IsJson, "the wrapper ends when its clients have left")),
        new("--shutdown", "-d", "End when all clients have left; return when it has ended", [], (client, _)
            => ShutDown(client)),
    ];

    private bool IsJson => _result.GetValue(_json);

    /// <summary>Runs the program.</summary>
    /// <returns>Its exit code.</returns>
    public static int Run(string[] args)
        => ControlProgram.Run(Name, () => new WrapperControlProgram().Control(args));

    private int Control(string[] args)
    {
        var program = new Command(Name, "Controls a running xnbd-wrapper.");
        foreach (WrapperCommand command in _commands)
            program.Add(command.Option);
        foreach (Option option in (Option[])
            [_targetName, _layer, _cowDirectory, _readOnly, _grace, _force, _progress, _json, _socket])
            program.Add(option);
        program.Add(_words);
        if (CommandLine.Parse(program, args) is not { } result)
            return ExitCode.Success;
        _result = result;
        WrapperCommand[] given = [.. _commands.Where(command => result.GetValue(command.Option))];
        if (given.Length != 1)
        {
            throw new UsageException(given.Length > 1 ? "only one thing can be done at a time"
                : $"say what to do, such as {_commands[0].Option.Name}");
        }

        string[] words = result.GetValue(_words) ?? [];
        if (Array.Find(words, word => word.StartsWith("--", StringComparison.Ordinal)) is { } unknown
            && !args.Contains("--"))
            throw new UsageException($"unknown option '{unknown}'");
        string name = given[0].Option.Name;
        if (words.Length != given[0].Words.Length)
        {
            throw new UsageException(given[0].Words.Length == 0
                ? $"{name} takes no arguments"
                : $"{name} takes {string.Join(' ', given[0].Words)}; {words.Length} were given");
        }

        if (words.Contains(""))
            throw new UsageException("an argument is empty");
        ValidateOptions(name);
        string path = CommandLine.FullPath("--socket", result.GetValue(_socket)) ?? WrapperOptions.DefaultSocket;
        using ControlClient client = ControlProgram.Connect(path);
        return given[0].Run(client, words);
    }

    private void ValidateOptions(string command)
    {
        string[] additions = ["--add-target", "--add-cow", "--add-proxy", "--add"];
        string[] ends = ["--remove-by-exportname", "--remove-by-file", "--shutdown"];
        foreach ((Option option, string[] of) in ((Option, string[])[])
        [
            (_targetName, ["--add-proxy", "--bgctl-reconnect"]),
            (_layer, ["--add-cow"]),
            (_cowDirectory, ["--add-cow"]),
            (_readOnly, additions),
            (_grace, ends),
            (_force, [.. ends, "--bgctl-switch"]),
            (_progress, ["--bgctl-cache-all"]),
        ])
        {
            if (_result.GetResult(option) is { Implicit: false } && !of.Contains(command))
                throw new UsageException($"{option.Name} does not go with {command}");
        }

        if (_result.GetValue(_force) && _result.GetValue(_grace) is not null)
            throw new UsageException("--force gives no --grace");
        if (_result.GetValue(_layer) is not null && _result.GetValue(_cowDirectory) is not null)
            throw new UsageException("--cow-dir is for layers that are not kept: --layer has a path");
    }

    private static ControlClient Of(ControlClient client, string export)
    {
        client.Export = export;
        return client;
    }

    private int AddTarget(ControlClient client, string[] words)
        => Add(client, words[0], ExportDefinition.Target, ("image_path", Path.GetFullPath(words[1])));

    private int AddCow(ControlClient client, string[] words)
        => Add(
            client,
            words[0],
            ExportDefinition.CowTarget,
            ("image_path", Path.GetFullPath(words[1])),
            ("layer_path", CommandLine.FullPath(_layer.Name, _result.GetValue(_layer))),
            ("cow_dir", CommandLine.FullPath(_cowDirectory.Name, _result.GetValue(_cowDirectory))));

    private int AddProxy(ControlClient client, string[] words)
        => Add(
            client,
            words[0],
            ExportDefinition.Proxy,
            ("remote_host", FullHost(words[1])),
            ("remote_port", words[2]),
            ("remote_export_name", _result.GetValue(_targetName)),
            ("image_path", Path.GetFullPath(words[3])),
            ("bitmap_path", Path.GetFullPath(words[4])),
            ("control_socket_path", Path.GetFullPath(words[5])));

    private int Add(
        ControlClient client, string name, string mode, params (string Member, string? Value)[] members)
    {
        var definition = new JsonObject { ["mode"] = mode };
        foreach ((string member, string? value) in members)
        {
            if (value is not null)
                definition[member] = value;
        }

        if (_result.GetValue(_readOnly))
            definition["read_only"] = true;
        JsonNode answer = client.Call("add", new JsonObject { ["name"] = name, ["definition"] = definition })!;
        return Say(answer, IsJson, string.Join('\n', answer["uris"]!.AsArray().Select(u => u!.GetValue<string>())));
    }

    /// <summary>A relative path of a Unix socket starts at this program's folder, not at the wrapper's.</summary>
    private static string FullHost(string host)
    {
        const string unix = "unix:";
        return host.StartsWith(unix, StringComparison.Ordinal) && host.Length > unix.Length
            ? unix + Path.GetFullPath(host[unix.Length..])
            : host;
    }

    private JsonObject WithGrace(JsonObject parameters)
    {
        if (_result.GetValue(_force))
            parameters["grace-ms"] = 0;
        else if (CommandLine.Number(_grace.Name, _result.GetValue(_grace), 0, int.MaxValue) is { } seconds)
            parameters["grace-ms"] = 1000L * seconds;
        return parameters;
    }

    private int Remove(ControlClient client, string name)
    {
        JsonNode answer = client.Call("remove", WithGrace(new JsonObject { ["name"] = name }))!;
        bool isBounded = _result.GetValue(_force) || _result.GetValue(_grace) is not null;
        while (isBounded && Entries(client).Any(entry => IsLeaving(entry, name)))
            Thread.Sleep(50);
        long clients = isBounded ? 0 : answer["clients"]!.GetValue<long>();
        return Say(answer, IsJson, clients == 0
            ? $"removed: {name}"
            : $"removed: {name}; {clients} clients go on until they leave");
    }

    private static bool IsLeaving(JsonNode entry, string name)
        => entry["name"]!.GetValue<string>() == name && entry["state"]!.GetValue<string>() == "leaving"
            && (entry["problem"] is not { } problem ? true : throw new FailureException(problem.GetValue<string>()));

    private int RemoveByFile(ControlClient client, string[] words)
    {
        string[] names =
        [
            .. client.Call("names-of", new JsonObject { ["file"] = Path.GetFullPath(words[0]) })!.AsArray()
                .Select(name => name!.GetValue<string>()),
        ];
        if (names.Length == 0)
            throw new FailureException($"no export is of the file '{words[0]}'");
        foreach (string name in names)
            Remove(client, name);
        return ExitCode.Success;
    }

    private int Switch(ControlClient client, string[] words)
    {
        JsonNode answer = Of(client, words[0]).Call("switch", new JsonObject { ["force"] = _result.GetValue(_force) })!;
        return Say(answer, IsJson, "switched: the cache image is served as a target now");
    }

    private int CacheAll(ControlClient client, string[] words)
    {
        JsonNode job = Of(client, words[0]).Call("cache-all")!;
        return ControlProgram.Follow(client, job, _result.GetValue(_progress), IsJson);
    }

    private int Reconnect(ControlClient client, string[] words)
    {
        var parameters = new JsonObject { ["host"] = FullHost(words[1]), ["port"] = words[2] };
        if (_result.GetValue(_targetName) is { } name)
            parameters["export-name"] = name;
        JsonNode answer = Of(client, words[0]).Call("reconnect", parameters)!;
        return Say(answer, IsJson, answer["remote"] is { } remote
            ? $"the remote is {remote.GetValue<string>()} now"
            : "this is a target now: there is no remote, and none is needed");
    }

    /// <summary>Adds the exports of a state file. Those that are there already are left alone.</summary>
    private int Load(ControlClient client, string[] words)
    {
        int failed = 0, added = 0;
        foreach ((string name, JsonNode? json) in StateFile.ReadImages(Path.GetFullPath(words[0])))
        {
            try
            {
                client.Call("add", new JsonObject { ["name"] = name, ["definition"] = json?.DeepClone() });
                added++;
            }
            catch (ControlException failure)
            {
                failed++;
                Console.Error.WriteLine($"{Name}: {name}: {failure.Message}");
            }
        }

        Say(new JsonObject { ["added"] = added, ["failed"] = failed }, IsJson, $"added: {added}");
        return failed == 0 ? ExitCode.Success : ExitCode.Failure;
    }

    private int Reload(ControlClient client, string[] words)
    {
        JsonArray changes = client.Call("reload")!.AsArray();
        return Say(changes, IsJson, changes.Count == 0
            ? "nothing has changed"
            : string.Join('\n', changes.Select(change => change!.GetValue<string>())));
    }

    private int ShutDown(ControlClient client)
    {
        JsonNode answer = client.Call("shutdown", WithGrace([]))!;
        try
        {
            while (true)
            {
                client.Call("list"); // the channel closes when the wrapper ends
                Thread.Sleep(50);
            }
        }
        catch (IOException)
        {
            return Say(answer, IsJson, "the wrapper has ended");
        }
    }

    private static IEnumerable<JsonNode> Entries(ControlClient client)
        => client.Call("list")!.AsArray().Select(entry => entry!);

    private int List(ControlClient client)
    {
        JsonNode list = client.Call("list")!;
        if (IsJson)
            return Say(list, IsJson, "");
        List<string[]> rows = [["NAME", "MODE", "FILE", "SIZE", "CLIENTS", "READ", "WRITTEN", "STATE"]];
        foreach (JsonNode? entry in list.AsArray())
        {
            string Bytes(string member)
                => entry![member] is { } count ? ByteCount.Describe(count.GetValue<long>()) : "-";
            string state = entry!["state"]!.GetValue<string>();
            if (entry["cached-percent"] is { } percent)
                state += $", {percent.GetValue<double>().ToString("0.0", CultureInfo.InvariantCulture)} % cached";
            if (entry["problem"] is { } problem)
                state += $": {problem.GetValue<string>()}";
            rows.Add(
            [
                entry["name"]!.GetValue<string>(),
                entry["mode"]?.GetValue<string>() ?? "-",
                entry["file"]?.GetValue<string>() ?? "-",
                Bytes("size"),
                entry["clients"]?.GetValue<long>().ToString(CultureInfo.InvariantCulture) ?? "-",
                Bytes("read-bytes"),
                Bytes("written-bytes"),
                state,
            ]);
        }

        Console.Write(Table(rows));
        return ExitCode.Success;
    }
}

/// <summary>A command of <c>xnbd-wrapper-ctl</c>.</summary>
internal sealed class WrapperCommand
{
    /// <summary>Declares it.</summary>
    /// <param name="name">Its option.</param>
    /// <param name="alias">A short form; null for none.</param>
    /// <param name="description">For <c>--help</c>.</param>
    /// <param name="words">Its arguments.</param>
    /// <param name="run">Carries it out, and returns the exit code.</param>
    public WrapperCommand(
        string name, string? alias, string description, string[] words, Func<ControlClient, string[], int> run)
    {
        string arguments = words.Length == 0 ? "" : $": {string.Join(' ', words)}";
        Option = new Option<bool>(name, alias is null ? [] : [alias]) { Description = description + arguments };
        (Words, Run) = (words, run);
    }

    /// <summary>Its option.</summary>
    public Option<bool> Option { get; }

    /// <summary>Its arguments.</summary>
    public string[] Words { get; }

    /// <summary>Carries it out, and returns the exit code.</summary>
    public Func<ControlClient, string[], int> Run { get; }

    /// <summary>It is not shown by <c>--help</c>.</summary>
    public bool IsHidden
    {
        init => Option.Hidden = value;
    }
}
