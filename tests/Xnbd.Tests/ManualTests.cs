using System.Text.RegularExpressions;
using Xnbd.TestKit;

namespace Xnbd.Tests;

/// <summary>The manual says what the program does, no more and no less.</summary>
public partial class ManualTests
{
    private static string Page => Read("xnbd-server.8");

    private static string Read(string page) => File.ReadAllText(Path.Combine(Repository.Root, "docs", page));

    [Fact]
    public async Task The_servers_page_has_the_options_of_the_program()
        => Compare(await Tool.Succeed(ServerProcess.Executable, "--help"), Page);

    [Fact]
    public async Task The_layer_programs_page_has_its_commands_and_their_options()
    {
        string program = Path.Combine(ServerProcess.BinFolder, "xnbd-layer");
        string help = await Tool.Succeed(program, "--help");
        string page = Read("xnbd-layer.1");
        string[] commands = [.. CommandInHelp().Matches(help).Select(m => m.Groups[1].Value).Order()];
        Assert.Equal(commands, CommandInManual().Matches(page).Select(m => m.Groups[1].Value).Order());
        foreach (string command in commands)
        {
            string ofCommand = await Tool.Succeed(program, command, "--help");
            help += ofCommand;

            // And the synopsis names just those that the command has.
            string synopsis = page[page.IndexOf($".Cm {command}\n", StringComparison.Ordinal)..];
            synopsis = synopsis[..synopsis.IndexOf(".Ar FILE", StringComparison.Ordinal)];
            Assert.Equal(
                OptionInHelp().Matches(ofCommand).Select(m => m.Groups[1].Value).Where(o => o is not "--help").Order(),
                OptionInSynopsis().Matches(synopsis).Select(m => "--" + m.Groups[1].Value).Order());
        }

        Compare(help, page);
    }

    [Fact]
    public async Task The_control_programs_page_has_the_options_of_the_program()
        => Compare(
            await Tool.Succeed(Path.Combine(ServerProcess.BinFolder, "xnbd-bgctl"), "--help"), Read("xnbd-bgctl.1"));

    [Theory]
    [InlineData("xnbd-wrapper")]
    [InlineData("xnbd-wrapper-ctl")]
    public async Task The_wrappers_pages_have_the_options_of_the_programs(string program)
        => Compare(
            await Tool.Succeed(Path.Combine(ServerProcess.BinFolder, program), "--help"), Read(program + ".8"));

    private static void Compare(string help, string page)
    {
        string[] ofProgram =
        [
            .. OptionInHelp().Matches(help)
                .Select(match => match.Groups[1].Value + Argument(match.Groups[2].Value)).Distinct().Order(),
        ];
        string[] ofManual =
        [
            .. OptionInManual().Matches(page)
                .Select(match => "--" + match.Groups[1].Value + Argument(match.Groups[2].Value)).Order(),
        ];
        Assert.NotEmpty(ofProgram);
        Assert.Equal(ofProgram, ofManual);

        static string Argument(string text) => text.Length == 0 ? "" : " " + text;
    }

    [Fact]
    public async Task The_default_port_is_the_same_everywhere()
    {
        Assert.Contains(
            "[default: 8520]", await Tool.Succeed(ServerProcess.Executable, "--help"), StringComparison.Ordinal);
        Assert.Contains("8520", Page, StringComparison.Ordinal);
        Assert.Contains("8520", File.ReadAllText(Path.Combine(Repository.Root, "README.md")), StringComparison.Ordinal);
    }

    [Fact]
    public void The_manual_page_names_every_signal_and_exit_code()
    {
        string source = File.ReadAllText(Path.Combine(Repository.Root, "src", "Xnbd", "Serving", "ServerBase.cs"));
        foreach (string signal in SignalInSource().Matches(source).Select(m => m.Value).Distinct())
            Assert.Contains(signal, Page, StringComparison.Ordinal);
        foreach (string code in (string[])[".It 0", ".It 1", ".It 2"])
            Assert.Contains(code, Page, StringComparison.Ordinal);
    }

    [Fact]
    public async Task The_manual_pages_are_well_formed()
    {
        Assert.SkipWhen(Tool.Find("mandoc") is null, "mandoc is absent");
        string[] pages = [.. Directory.GetFiles(Path.Combine(Repository.Root, "docs"), "xnbd-*")];
        Assert.Equal(5, pages.Length);
        ToolResult lint = await Tool.Run("mandoc", ["-T", "lint", "-W", "warning", .. pages]);
        Assert.Equal("", lint.Output + lint.Errors);
    }

    [Fact]
    public async Task The_version_is_that_of_the_changelog()
    {
        string version = (await Tool.Succeed(ServerProcess.Executable, "--version")).Trim().Split(' ')[^1];
        Assert.Contains(
            $"## {version}", File.ReadAllText(Path.Combine(Repository.Root, "CHANGELOG.md")), StringComparison.Ordinal);
    }

    [GeneratedRegex(@"^  (?:-\?, -h, |-[a-z], )?(--[a-z-]+)(?: <([A-Z]+)>)?", RegexOptions.Multiline)]
    private static partial Regex OptionInHelp();

    [GeneratedRegex(@"^\.It Fl Fl ([a-z-]+)(?: Ar ([A-Z]+))?$", RegexOptions.Multiline)]
    private static partial Regex OptionInManual();

    [GeneratedRegex(@"^  ([a-z]+) <FILE>", RegexOptions.Multiline)]
    private static partial Regex CommandInHelp();

    [GeneratedRegex(@"^\.It Cm ([a-z]+)$", RegexOptions.Multiline)]
    private static partial Regex CommandInManual();

    [GeneratedRegex(@"^\.Op Fl Fl ([a-z-]+)", RegexOptions.Multiline)]
    private static partial Regex OptionInSynopsis();

    [GeneratedRegex(@"SIG[A-Z0-9]+")]
    private static partial Regex SignalInSource();
}
