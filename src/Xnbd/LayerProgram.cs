using System.CommandLine;
using System.CommandLine.Parsing;
using System.Globalization;
using System.Runtime.InteropServices;
using System.Text.Json;
using Spectre.Console;
using Xnbd.Storage;
using Xnbd.Storage.Layers;
using Xnbd.Storage.Maps;

namespace Xnbd.Programs;

/// <summary>
/// The program <c>xnbd-layer</c>: work on layers that are kept. To add a subcommand, see HACKING.md.
/// </summary>
internal static class LayerProgram
{
    /// <summary>The program's name.</summary>
    public const string Name = "xnbd-layer";

    private static readonly Argument<string> s_file = new("FILE") { Description = "The layer" };

    private static readonly Option<string?> s_base = new("--base")
    {
        Description = "Where its base stands now, if it has been moved",
        HelpName = "PATH",
    };

    private static readonly Option<bool> s_json = new("--json") { Description = "Print JSON, for programs" };

    /// <summary>Runs the program.</summary>
    /// <returns>Its exit code.</returns>
    public static int Run(string[] args)
    {
        using var interrupt = new CancellationTokenSource();
        void Interrupt(PosixSignalContext context)
        {
            context.Cancel = !interrupt.IsCancellationRequested; // a second signal ends the process, which does no harm
            interrupt.Cancel();
        }

        using var sigint = PosixSignalRegistration.Create(PosixSignal.SIGINT, Interrupt);
        using var sigterm = PosixSignalRegistration.Create(PosixSignal.SIGTERM, Interrupt);
        try
        {
            ParseResult? result = CommandLine.Parse(MakeCommand(interrupt.Token), args);
            var configuration = new InvocationConfiguration { EnableDefaultExceptionHandler = false };
            return result?.Invoke(configuration) ?? ExitCode.Success;
        }
        catch (UsageException failure)
        {
            Console.Error.WriteLine($"{Name}: {failure.Message}");
            Console.Error.WriteLine($"Try '{Name} --help' for more information.");
            return ExitCode.Usage;
        }
        catch (Exception failure) when (failure
            is FailureException or DiskException or IOException or UnauthorizedAccessException)
        {
            Console.Error.WriteLine($"{Name}: {Advice.Describe(failure)}");
            return ExitCode.Failure;
        }
        catch (OperationCanceledException)
        {
            Console.Error.WriteLine($"{Name}: interrupted; nothing is lost. Call it again to complete the work");
            return ExitCode.Failure;
        }
    }

    private static Command MakeCommand(CancellationToken cancel)
    {
        var output = new Argument<string>("OUT") { Description = "The file to write; it must not be there" };
        var format = new Option<string?>("--format")
        {
            Description = "raw or qcow2 (with qemu-img) [default: qcow2 if OUT ends so, else raw]",
            HelpName = "FORMAT",
        };
        var newBase = new Argument<string>("NEW_BASE") { Description = "The new base: an image" };
        var isLayer = new Option<bool>("--base-is-layer") { Description = "NEW_BASE is a layer, not an image" };

        return new Command(
            Name, "Shows, commits, discards, compares, exports and rebases copy-on-write layers of xnbd-server.")
        {
            Sub("info", "Show what a layer stands on and what it holds", [s_file, s_json], r => Info(r)),
            Sub(
                "commit",
                "Write a layer's changes into its base, and empty it",
                [s_file, s_base, s_json],
                r => Commit(r, cancel)),
            Sub(
                "discard",
                "Drop all changes: the layer is empty then",
                [s_file, s_base],
                r => LayerDiscard.Run(File(r), r.GetValue(s_base))),
            Sub(
                "diff",
                "List the ranges in which the disk differs from its base",
                [s_file, s_base, s_json],
                r => Diff(r, cancel)),
            Sub("export", "Write the whole disk, base and changes, into a new image", [s_file, output, format, s_base],
                r => Export(r, r.GetValue(output)!, r.GetValue(format), cancel)),
            Sub("rebase", "Put a layer on another base; its disk reads as before", [s_file, newBase, isLayer, s_base],
                r => Wait("rebasing", File(r), progress => LayerRebase.Run(
                    File(r), r.GetValue(s_base), r.GetValue(newBase)!, r.GetValue(isLayer), progress, cancel))),
        };
    }

    private static Command Sub(string name, string description, IEnumerable<Symbol> symbols, Action<ParseResult> action)
    {
        var command = new Command(name, description);
        foreach (Symbol symbol in symbols)
        {
            if (symbol is Argument<string> argument)
            {
                if (argument.Validators.Count == 0)
                    argument.Validators.Add(RefuseEmpty);
                command.Add(argument);
            }
            else
            {
                if (symbol is Option<string?> { Validators.Count: 0 } option)
                    option.Validators.Add(RefuseEmpty);
                command.Add((Option)symbol);
            }
        }

        command.SetAction(result =>
        {
            action(result);
            return ExitCode.Success;
        });
        return command;
    }

    private static string File(ParseResult result) => result.GetValue(s_file)!;

    /// <summary>Refuses an empty name: it is a mistake of a script, such as a variable that is not set.</summary>
    private static void RefuseEmpty(OptionResult option)
    {
        if (option.GetValueOrDefault<string?>() is "")
            option.AddError($"{option.Option.Name}: the name is empty");
    }

    private static void RefuseEmpty(ArgumentResult argument)
    {
        if (argument.GetValueOrDefault<string?>() is "")
            argument.AddError($"{argument.Argument.Name}: the name is empty");
    }

    private static void Info(ParseResult result)
    {
        LayerInfo info = LayerInfo.Read(File(result));
        string state = info.IsDiscarding ? "it was being emptied: complete that with 'xnbd-layer discard'"
            : info.IsCommitting ? "a commit was interrupted: complete it with 'xnbd-layer commit'"
            : info.IsInUse ? "in use" : "not in use";
        if (result.GetValue(s_json))
        {
            PrintJson(info);
            return;
        }

        Console.WriteLine($"layer:     {info.Path}{(info.IsDisposable ? " (removed when its server ends)" : "")}");
        Console.WriteLine($"base:      {info.BasePath}{(info.BaseIsLayer ? " (a layer)" : "")}");
        Console.WriteLine($"disk:      {ByteCount.DescribeExactly(info.Length)}");
        Console.WriteLine($"written:   {Blocks(info.WrittenBytes)}");
        Console.WriteLine($"zeroed:    {Blocks(info.ZeroBytes)}");
        Console.WriteLine($"on disk:   {ByteCount.DescribeExactly(info.AllocatedBytes)}");
        Console.WriteLine($"state:     {state}");
        Console.WriteLine();
        foreach (string line in LayerMap.Draw(info))
            Console.WriteLine(line);
    }

    private static string Blocks(long bytes)
        => $"{BlockRange.CountOf(bytes)} blocks, {ByteCount.DescribeExactly(bytes)}";

    private static void Commit(ParseResult result, CancellationToken cancel)
    {
        long committed = 0;
        Wait(
            "committing",
            File(result),
            async progress =>
            {
                committed = await LayerCommit.Run(File(result), result.GetValue(s_base), progress, cancel);
            });
        if (result.GetValue(s_json))
            Console.WriteLine($"{{ \"committed-bytes\": {committed.ToString(CultureInfo.InvariantCulture)} }}");
        else
            Console.WriteLine($"committed {ByteCount.DescribeExactly(committed)}; the layer is empty now");
    }

    private static void Diff(ParseResult result, CancellationToken cancel)
    {
        using Utf8JsonWriter? json = result.GetValue(s_json) ? OpenJson() : null;
        json?.WriteStartArray();
        LayerDiff.Run(File(result), result.GetValue(s_base), (offset, length, isZero) =>
        {
            string kind = isZero ? "zero" : "data";
            if (json is not null)
                WriteRange(json, offset, length, kind);
            else
                Console.WriteLine($"{offset,14} {length,14}  {kind}");
        }, cancel).GetAwaiter().GetResult();
        json?.WriteEndArray();
        json?.Flush();
        if (json is not null)
            Console.WriteLine();
    }

    private static void Export(ParseResult result, string output, string? format, CancellationToken cancel)
    {
        format ??= output.EndsWith(".qcow2", StringComparison.OrdinalIgnoreCase) ? "qcow2" : "raw";
        if (format is not ("raw" or "qcow2"))
            throw new UsageException($"--format {format}: raw and qcow2 are known");
        using Disk disk = LayerStack.OpenMerged(File(result), result.GetValue(s_base));
        if (format == "qcow2")
            LayerQcow2.Export(disk, output, cancel);
        else
            Wait("exporting", output, progress => LayerExport.WriteRaw(disk, output, progress, cancel));
    }

    /// <summary>Does long work, and draws its progress on stderr if that is a terminal.</summary>
    private static void Wait(string verb, string path, Func<Action<WorkProgress>, Task> work)
    {
        if (Console.IsErrorRedirected)
        {
            work(_ => { }).GetAwaiter().GetResult();
            return;
        }

        IAnsiConsole console = AnsiConsole.Create(
            new AnsiConsoleSettings { Out = new AnsiConsoleOutput(Console.Error) });
        console.Progress()
            .Columns(
                new TaskDescriptionColumn(),
                new ProgressBarColumn(),
                new PercentageColumn(),
                new DownloadedColumn(),
                new RemainingTimeColumn())
            .StartAsync(async context =>
            {
                ProgressTask task = context.AddTask(Markup.Escape($"{verb} {Path.GetFileName(path)}"));
                await work(progress =>
                {
                    task.MaxValue = Math.Max(1, progress.Total);
                    task.Value = progress.Done;
                });
            })
            .GetAwaiter().GetResult();
    }

    /// <summary>Prints JSON while it is made: a map may have very many ranges.</summary>
    private static void PrintJson(LayerInfo info)
    {
        using (Utf8JsonWriter json = OpenJson())
        {
            json.WriteStartObject();
            json.WriteString("path", info.Path);
            json.WriteString("base", info.BasePath);
            json.WriteBoolean("base-is-layer", info.BaseIsLayer);
            json.WriteNumber("size", info.Length);
            json.WriteNumber("block-size", BlockRange.BlockSize);
            json.WriteNumber("written-bytes", info.WrittenBytes);
            json.WriteNumber("zero-bytes", info.ZeroBytes);
            json.WriteNumber("allocated-bytes", info.AllocatedBytes);
            json.WriteBoolean("disposable", info.IsDisposable);
            json.WriteBoolean("commit-interrupted", info.IsCommitting);
            json.WriteBoolean("discard-interrupted", info.IsDiscarding);
            json.WriteBoolean("in-use", info.IsInUse);
            json.WriteStartArray("map");
            long offset = 0;
            foreach ((long length, BlockState state) in info.Runs)
            {
                if (state != BlockState.Absent)
                    WriteRange(json, offset, length, state == BlockState.Zero ? "zero" : "data");
                offset += length;
            }

            json.WriteEndArray();
            json.WriteEndObject();
        }

        Console.WriteLine();
    }

    private static Utf8JsonWriter OpenJson()
        => new(Console.OpenStandardOutput(), new JsonWriterOptions { Indented = true });

    private static void WriteRange(Utf8JsonWriter json, long offset, long length, string kind)
    {
        const int maxBuffered = 64 * 1024;
        json.WriteStartObject();
        json.WriteNumber("offset", offset);
        json.WriteNumber("length", length);
        json.WriteString("kind", kind);
        json.WriteEndObject();
        if (json.BytesPending > maxBuffered)
            json.Flush();
    }
}
