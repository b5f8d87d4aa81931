using System.CommandLine;
using System.Globalization;
using System.Runtime.InteropServices;
using System.Text.Json;
using System.Text.Json.Serialization;
using Spectre.Console;
using Xnbd.Storage;

namespace Xnbd.Programs;

/// <summary>The program <c>xnbd-layer</c>: work on layers that are kept. To add a subcommand: a method here, a section in the man page.</summary>
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
            context.Cancel = !interrupt.IsCancellationRequested; // a second one ends the process: it does no harm
            interrupt.Cancel();
        }

        using var sigint = PosixSignalRegistration.Create(PosixSignal.SIGINT, Interrupt);
        using var sigterm = PosixSignalRegistration.Create(PosixSignal.SIGTERM, Interrupt);
        try
        {
            ParseResult? result = CommandLine.Parse(MakeCommand(interrupt.Token), args);
            return result?.Invoke(new InvocationConfiguration { EnableDefaultExceptionHandler = false }) ?? ExitCode.Success;
        }
        catch (UsageException failure)
        {
            Console.Error.WriteLine($"{Name}: {failure.Message}");
            Console.Error.WriteLine($"Try '{Name} --help' for more information.");
            return ExitCode.Usage;
        }
        catch (Exception failure) when (failure is FailureException or DiskException)
        {
            Console.Error.WriteLine($"{Name}: {failure.Message}");
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

        return new Command(Name, "Shows, commits, discards, compares, exports and rebases copy-on-write layers of xnbd-server.")
        {
            Sub("info", "Show what a layer stands on and what it holds", [s_file, s_json], r => Info(r)),
            Sub("commit", "Write a layer's changes into its base, and empty it", [s_file, s_base, s_json], r => Commit(r, cancel)),
            Sub("discard", "Drop all changes: the layer is empty then", [s_file, s_base], r => LayerWork.Discard(File(r), r.GetValue(s_base))),
            Sub("diff", "List the ranges in which the disk differs from its base", [s_file, s_base, s_json], r => Diff(r, cancel)),
            Sub("export", "Write the whole disk, base and changes, into a new image", [s_file, output, format, s_base],
                r => Export(r, r.GetValue(output)!, r.GetValue(format), cancel)),
            Sub("rebase", "Put a layer on another base; its disk reads as before", [s_file, newBase, isLayer, s_base],
                r => Wait("rebasing", File(r), progress => LayerWork.Rebase(
                    File(r), r.GetValue(s_base), r.GetValue(newBase)!, r.GetValue(isLayer), progress, cancel))),
        };
    }

    private static Command Sub(string name, string description, IEnumerable<Symbol> symbols, Action<ParseResult> action)
    {
        var command = new Command(name, description);
        foreach (Symbol symbol in symbols)
        {
            if (symbol is Argument argument)
                command.Add(argument);
            else
                command.Add((Option)symbol);
        }

        command.SetAction(result =>
        {
            action(result);
            return ExitCode.Success;
        });
        return command;
    }

    private static string File(ParseResult result) => result.GetValue(s_file)!;

    private static void Info(ParseResult result)
    {
        LayerInfo info = LayerWork.GetInfo(File(result));
        string state = info.IsCommitting ? "a commit was interrupted: complete it with 'xnbd-layer commit'"
            : info.IsInUse ? "in use" : "not in use";
        if (result.GetValue(s_json))
        {
            Print(new LayerInfoJson(
                info.Path, info.BasePath, info.BaseIsLayer, info.Length, BlockRange.BlockSize, info.WrittenBytes, info.ZeroBytes,
                info.AllocatedBytes, info.IsDisposable, info.IsCommitting, info.IsInUse,
                LayerMap.Ranges(info)), LayerJson.Default.LayerInfoJson);
            return;
        }

        Console.WriteLine($"layer:     {info.Path}{(info.IsDisposable ? " (goes when its server ends)" : "")}");
        Console.WriteLine($"base:      {info.BasePath}{(info.BaseIsLayer ? " (a layer)" : "")}");
        Console.WriteLine($"disk:      {Bytes(info.Length)}");
        Console.WriteLine($"written:   {Blocks(info.WrittenBytes)}");
        Console.WriteLine($"zeroed:    {Blocks(info.ZeroBytes)}");
        Console.WriteLine($"on disk:   {Bytes(info.AllocatedBytes)}");
        Console.WriteLine($"state:     {state}");
        Console.WriteLine();
        foreach (string line in LayerMap.Draw(info))
            Console.WriteLine(line);
    }

    private static string Bytes(long count)
    {
        string[] units = ["KiB", "MiB", "GiB", "TiB"];
        double value = count;
        int unit = -1;
        for (; value >= 1024 && unit < units.Length - 1; unit++)
            value /= 1024;
        string text = count.ToString(CultureInfo.InvariantCulture) + " bytes";
        return unit < 0 ? text : string.Create(CultureInfo.InvariantCulture, $"{value:0.#} {units[unit]} ({text})");
    }

    private static string Blocks(long bytes) => $"{BlockRange.CountOf(bytes)} blocks, {Bytes(bytes)}";

    private static void Commit(ParseResult result, CancellationToken cancel)
    {
        long committed = 0;
        Wait("committing", File(result), async progress => committed = await LayerWork.Commit(File(result), result.GetValue(s_base), progress, cancel));
        if (result.GetValue(s_json))
            Print(new LayerCommitJson(committed), LayerJson.Default.LayerCommitJson);
        else
            Console.WriteLine($"committed {Bytes(committed)}; the layer is empty now");
    }

    private static void Diff(ParseResult result, CancellationToken cancel)
    {
        var ranges = new List<LayerRangeJson>();
        bool isJson = result.GetValue(s_json);
        LayerWork.Diff(File(result), result.GetValue(s_base), (offset, length, isZero) =>
        {
            if (isJson)
                ranges.Add(new LayerRangeJson(offset, length, isZero ? "zero" : "data"));
            else
                Console.WriteLine($"{offset,14} {length,14}  {(isZero ? "zero" : "data")}");
        }, cancel).GetAwaiter().GetResult();
        if (isJson)
            Print([.. ranges], LayerJson.Default.LayerRangeJsonArray);
    }

    private static void Export(ParseResult result, string output, string? format, CancellationToken cancel)
    {
        format ??= output.EndsWith(".qcow2", StringComparison.OrdinalIgnoreCase) ? "qcow2" : "raw";
        if (format is not ("raw" or "qcow2"))
            throw new UsageException($"--format {format}: raw and qcow2 are known");
        using Disk disk = LayerWork.OpenMerged(File(result), result.GetValue(s_base));
        if (format == "qcow2")
            LayerQcow2.Export(disk, output, cancel);
        else
            Wait("exporting", output, progress => LayerWork.ExportRaw(disk, output, progress, cancel));
    }

    /// <summary>Does long work, and draws its progress on stderr, if that is a terminal.</summary>
    private static void Wait(string verb, string path, Func<Action<WorkProgress>, Task> work)
    {
        if (Console.IsErrorRedirected)
        {
            work(_ => { }).GetAwaiter().GetResult();
            return;
        }

        IAnsiConsole console = AnsiConsole.Create(new AnsiConsoleSettings { Out = new AnsiConsoleOutput(Console.Error) });
        console.Progress()
            .Columns(new TaskDescriptionColumn(), new ProgressBarColumn(), new PercentageColumn(), new DownloadedColumn(), new RemainingTimeColumn())
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

    private static void Print<T>(T value, System.Text.Json.Serialization.Metadata.JsonTypeInfo<T> type)
        => Console.WriteLine(JsonSerializer.Serialize(value, type));
}

/// <summary>What <c>xnbd-layer info --json</c> prints. Sizes are bytes.</summary>
internal sealed record LayerInfoJson(
    string Path, string Base, bool BaseIsLayer, long Size, int BlockSize, long WrittenBytes, long ZeroBytes, long AllocatedBytes,
    bool Disposable, bool CommitInterrupted, bool InUse, LayerRangeJson[] Map);

/// <summary>A range of the disk, in bytes, and what is there.</summary>
internal sealed record LayerRangeJson(long Offset, long Length, string Kind);

/// <summary>What <c>xnbd-layer commit --json</c> prints.</summary>
internal sealed record LayerCommitJson(long CommittedBytes);

/// <summary>JSON without reflection.</summary>
[JsonSourceGenerationOptions(WriteIndented = true, PropertyNamingPolicy = JsonKnownNamingPolicy.KebabCaseLower)]
[JsonSerializable(typeof(LayerInfoJson))]
[JsonSerializable(typeof(LayerRangeJson[]))]
[JsonSerializable(typeof(LayerCommitJson))]
internal sealed partial class LayerJson : JsonSerializerContext;
