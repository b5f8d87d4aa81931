using System.CommandLine;
using System.CommandLine.Help;
using System.Globalization;
using Xnbd.Storage;

namespace Xnbd.Programs;

/// <summary>What the command lines of all programs share.</summary>
internal static class CommandLine
{
    /// <summary>
    /// Reads a command line, and answers <c>--help</c> and <c>--version</c>, which every program has.
    /// </summary>
    /// <returns>Null when help or version was asked for, and printed.</returns>
    /// <exception cref="UsageException">The command line is wrong.</exception>
    public static ParseResult? Parse(Command program, string[] args)
    {
        var version = new Option<bool>("--version") { Description = "Show the version" };
        program.Add(new HelpOption());
        program.Add(version);
        ParseResult result = program.Parse(args, new ParserConfiguration { ResponseFileTokenReplacer = null });
        if (result.GetValue(version))
        {
            Console.WriteLine($"{program.Name} (xNBD) {typeof(CommandLine).Assembly.GetName().Version!.ToString(3)}");
            return null;
        }

        if (result.Action is HelpAction)
        {
            result.Invoke();
            return null;
        }

        if (program.Subcommands.Count > 0 && result.CommandResult.Command == program)
        {
            string known = string.Join(", ", program.Subcommands.Select(command => command.Name));
            string? unknown = result.UnmatchedTokens.FirstOrDefault();
            throw new UsageException(unknown is null ? $"no command was given: use one of {known}"
                : unknown.StartsWith('-') ? $"unknown option '{unknown}'"
                : $"unknown command '{unknown}': use one of {known}");
        }

        return result.Errors.Count == 0 ? result : throw new UsageException(result.Errors[0].Message.TrimEnd('.'));
    }

    /// <summary>Reads an option's path.</summary>
    /// <returns>The full path; null when the option was not given.</returns>
    /// <exception cref="UsageException">It is empty.</exception>
    public static string? FullPath(string option, string? word) => word switch
    {
        null => null,
        "" => throw new UsageException($"{option}: the name is empty"),
        _ => Path.GetFullPath(word),
    };

    /// <summary>Reads an option's number.</summary>
    /// <returns>Null when the option was not given.</returns>
    /// <exception cref="UsageException">It is not a number, or out of its range.</exception>
    public static int? Number(string option, string? word, int min, int max)
    {
        if (word is null)
            return null;
        bool isNumber = int.TryParse(word, NumberStyles.None, CultureInfo.InvariantCulture, out int number);
        return isNumber && number >= min && number <= max
            ? number
            : throw new UsageException($"{option} {word}: not a number from {min} to {max}");
    }

    /// <summary>Reads an option's rate, in bytes per second; 0 for no limit.</summary>
    /// <returns>Null when the option was not given.</returns>
    /// <exception cref="UsageException">It is not a rate.</exception>
    public static long? Rate(string option, string? word)
        => word is null ? null
            : ByteCount.TryParse(word, out long rate) ? rate
            : throw new UsageException($"{option} {word}: not a number of bytes per second, such as 50M");
}
