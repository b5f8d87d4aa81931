using System.Text;
using CliWrap;

namespace Xnbd.TestKit;

/// <summary>What a program printed, and how it ended.</summary>
public sealed record ToolResult(int ExitCode, string Output, string Errors);

/// <summary>Real programs of other projects.</summary>
public static class Tool
{
    private static readonly string s_path = Environment.GetEnvironmentVariable("PATH") + ":/usr/sbin:/sbin";

    /// <summary>Where a program is; null when it is absent.</summary>
    public static string? Find(string program) => s_path.Split(':')
        .Select(folder => Path.Combine(folder, program)).FirstOrDefault(File.Exists);

    /// <summary>Runs a program.</summary>
    /// <exception cref="OperationCanceledException">It took longer than two minutes; it was killed.</exception>
    public static async Task<ToolResult> Run(string program, params string[] args)
    {
        using var deadline = new CancellationTokenSource(TimeSpan.FromMinutes(2));
        return await Run(program, args, deadline.Token);
    }

    /// <summary>Runs a program that may take as long as the caller says.</summary>
    /// <exception cref="OperationCanceledException">It was told to stop; the program was killed.</exception>
    public static async Task<ToolResult> Run(string program, string[] args, CancellationToken stop)
    {
        var output = new StringBuilder();
        var errors = new StringBuilder();
        CommandResult result = await Cli.Wrap(Find(program) ?? program).WithArguments(args)
            .WithValidation(CommandResultValidation.None)
            .WithStandardOutputPipe(PipeTarget.ToStringBuilder(output))
            .WithStandardErrorPipe(PipeTarget.ToStringBuilder(errors))
            .ExecuteAsync(stop);
        return new ToolResult(result.ExitCode, output.ToString(), errors.ToString());
    }

    /// <summary>Runs a program that must succeed.</summary>
    /// <returns>What it printed to stdout.</returns>
    public static async Task<string> Succeed(string program, params string[] args)
        => OutputOf(await Run(program, args), program, args);

    /// <summary>The same, for as long as the caller says.</summary>
    public static async Task<string> Succeed(string program, string[] args, CancellationToken stop)
        => OutputOf(await Run(program, args, stop), program, args);

    private static string OutputOf(ToolResult result, string program, string[] args) => result.ExitCode == 0
        ? result.Output
        : throw new InvalidOperationException(
            $"{program} {string.Join(' ', args)} ended with {result.ExitCode}:\n{result.Output}{result.Errors}");
}
