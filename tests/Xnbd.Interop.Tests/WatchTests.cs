using System.Diagnostics;
using System.Net.Sockets;
using System.Text;
using System.Text.RegularExpressions;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>xnbd-bgctl --watch in a real terminal, with a real proxy.</summary>
public sealed partial class WatchTests : IDisposable
{
    private const int Size = 8 << 20;

    private readonly TempFolder _folder = new();
    private readonly string _image;

    public WatchTests() => _image = _folder.Random("origin.img", Size);

    public void Dispose() => _folder.Dispose();

    private string Socket => Proxies.Socket(_folder);

    /// <summary>
    /// A terminal of 80 x 24 in which a shell runs the program. The shell says with which code it has ended, and
    /// whether the terminal is as it was before.
    /// </summary>
    private sealed partial class Terminal : IDisposable
    {
        private readonly Process _process;
        private readonly StringBuilder _shown = new();

        /// <param name="socket">The proxy's control socket.</param>
        /// <param name="options">Options of the program.</param>
        /// <param name="isStopped">The program will be stopped; it goes on when a line is typed.</param>
        public Terminal(string socket, string options = "", bool isStopped = false)
        {
            Skip.Unless(!ServerProcess.IsInterruptIgnored, "SIGINT is ignored here, as in a shell's background");
            Skip.Unless(Tool.Find("script") is not null, "script is absent");
            string program = $"{Proxies.Control} --watch {options} {socket}";
            if (isStopped)
                program = $"set -m; {program}; echo stopped=$?; read line; fg >/dev/null";
            string command = "trap : INT; stty cols 80 rows 24; before=$(stty -g); echo tty=$(tty); "
                + $"{program}; echo code=$?; [ \"$(stty -g)\" = \"$before\" ] && echo as before; stty -g";
            var start = new ProcessStartInfo("script", ["-qec", command, "/dev/null"])
            {
                RedirectStandardInput = true,
                RedirectStandardOutput = true,
                StandardOutputEncoding = Encoding.UTF8,
            };
            start.Environment["TERM"] = "xterm-256color";
            start.Environment["SHELL"] = "/bin/sh";
            start.Environment["LC_ALL"] = "C.UTF-8";
            _process = Process.Start(start)!;
            Task.Run(() =>
            {
                for (int c; (c = _process.StandardOutput.Read()) >= 0;)
                {
                    lock (_shown)
                        _shown.Append((char)c);
                }
            });
        }

        /// <summary>All that was shown, without colours.</summary>
        public string Text
        {
            get
            {
                lock (_shown)
                    return Colour().Replace(_shown.ToString(), "");
            }
        }

        /// <summary>The lines of the last picture that has all of its lines.</summary>
        public string[] Screen
        {
            get
            {
                string[] pictures = Text.Split("\e[H");
                return pictures.Length < 3 ? [] : pictures[^2].Split("\r\r\n");
            }
        }

        public void Until(string text) => Wait.Until(() => Text.Contains(text, StringComparison.Ordinal), text);

        public void UntilScreen(string text)
            => Wait.Until(() => Screen.Any(line => line.Contains(text, StringComparison.Ordinal)), $"it shows {text}");

        public void Type(string keys)
        {
            _process.StandardInput.Write(keys);
            _process.StandardInput.Flush();
        }

        /// <summary>Waits for the end.</summary>
        /// <returns>What was printed after the screen was left.</returns>
        public string End(int exitCode)
        {
            Until("code=");
            Assert.True(_process.WaitForExit(20_000));
            string end = Text[(Text.LastIndexOf("\e[?1049l", StringComparison.Ordinal) + 8)..];
            Assert.Contains($"code={exitCode}\r\nas before\r\n", end, StringComparison.Ordinal);
            foreach ((string on, string off) in ((string, string)[])
                [("\e[?1049h", "\e[?1049l"), ("\e[?25l", "\e[?25h"), ("\e[?7l", "\e[?7h")])
                Assert.Equal(Text.Split(on).Length, Text.Split(off).Length);
            return end;
        }

        public void Dispose()
        {
            if (!_process.HasExited)
                _process.Kill(entireProcessTree: true);
            _process.Dispose();
        }

        [GeneratedRegex("\e\\[[0-9;]*m")]
        private static partial Regex Colour();
    }

    [Theory]
    [InlineData("q")]
    [InlineData("\x03")]
    public void It_shows_the_copy_and_leaves_the_terminal_as_it_was(string key)
    {
        using var hurry = new ManualResetEventSlim();
        using FakeServer origin = new FakeServer(_folder.File("slow"), File.ReadAllBytes(_image))
        {
            Answer = (_, _, _) =>
            {
                hurry.Wait(50);
                return false;
            },
        }.Start();
        using ServerProcess proxy = Proxies.Start(_folder, "unix:" + origin.Path, "-");
        using NbdTestClient client = proxy.Open();
        client.Read(0, 4096);
        client.Write(4 << 20, new byte[64 << 10]);
        using var terminal = new Terminal(Socket);
        terminal.UntilScreen("what clients read is kept");
        Tool.Succeed(Proxies.Control, "--cache-all", "--detach", "--blocks-per-request", "4", Socket).Wait();
        terminal.UntilScreen("FETCHING ALL");
        terminal.UntilScreen("»"); // fetches under way
        string[] screen = terminal.Screen;
        Assert.Equal(24, screen.Length);
        Assert.All(screen, line => Assert.Equal(80, line.Length));
        foreach (string part in (string[])
            ["% local", "█ fetched", "▓ written here 64 KiB", "1 of 1 connections", "from remote", "misses took"])
            Assert.Contains(screen, line => line.Contains(part, StringComparison.Ordinal));
        Assert.Contains(screen[3..13], line => line.Contains('▓', StringComparison.Ordinal));

        // A larger window is filled at once.
        string tty = TtyName().Match(terminal.Text).Groups[1].Value;
        Tool.Succeed("stty", "-F", tty, "cols", "100", "rows", "30").Wait();
        Wait.Until(() => Fills(100, 30), "it is filled");
        Tool.Succeed("stty", "-F", tty, "cols", "20", "rows", "5").Wait();
        Wait.Until(() => Fills(20, 5), "it is filled");
        terminal.Type("x"); // no other key does anything
        terminal.Type(key);
        Assert.DoesNotContain("proxy", terminal.End(0), StringComparison.Ordinal);
        hurry.Set();
        Tool.Succeed(Proxies.Control, "--cache-all", Socket).Wait(); // and the proxy has noticed nothing

        bool Fills(int columns, int rows)
            => terminal.Screen is var lines && lines.Length == rows && lines.All(line => line.Length == columns);
    }

    [Fact]
    public void A_lost_remote_and_the_switch_are_seen()
    {
        ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using ServerProcess proxy = Proxies.Start(_folder, origin);
        using var terminal = new Terminal(Socket);
        terminal.UntilScreen("what clients read is kept");
        origin.Kill();
        terminal.UntilScreen("THE REMOTE IS LOST");
        terminal.UntilScreen("0 of 4 connections");
        using ServerProcess back = ServerProcess.Start(
            origin.SocketPath, ["--target", "--readonly", "--unix", origin.SocketPath, _image]);
        Wait.Until(() => terminal.Screen[1].Contains("is kept", StringComparison.Ordinal), "it is back");
        Tool.Succeed(Proxies.Control, "--move", Socket).Wait();
        string end = terminal.End(0);
        Assert.Contains("SWITCHED: this is a target now", end, StringComparison.Ordinal);
        Assert.Contains("100.0 % local", end, StringComparison.Ordinal);
        Assert.Contains("the proxy was switched: '", end, StringComparison.Ordinal);
        origin.Dispose();

        using var again = new Terminal(Socket); // of a target there is nothing to be seen
        again.Until("the proxy was switched: '");
        again.Until("code=0");
    }

    [Theory]
    [InlineData(9)]
    [InlineData(15)]
    public void A_proxy_that_ends_is_told_in_the_last_line(int signal)
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using ServerProcess proxy = Proxies.Start(_folder, origin);
        using var terminal = new Terminal(Socket);
        terminal.UntilScreen("what clients read is kept");
        proxy.Signal(signal);
        Assert.Contains(
            "xnbd-bgctl: the proxy has ended; when it was last seen, 0.0 % of the disk was local",
            terminal.End(1),
            StringComparison.Ordinal);
    }

    /// <summary>The proxy is stopped, and goes on.</summary>
    [Fact]
    public void A_proxy_that_hangs_is_told_and_can_be_left()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using ServerProcess proxy = Proxies.Start(_folder, origin);
        using var terminal = new Terminal(Socket, "--interval 1");
        terminal.UntilScreen("what clients read is kept");
        proxy.Signal(19); // SIGSTOP
        terminal.UntilScreen("THE PROXY DOES NOT ANSWER, for ");
        proxy.Signal(18); // SIGCONT
        Wait.Until(() => terminal.Screen[1].Contains("is kept", StringComparison.Ordinal), "it answers again");
        proxy.Signal(19);
        terminal.UntilScreen("THE PROXY DOES NOT ANSWER, for ");
        terminal.Type("q");
        terminal.End(0);
        proxy.Signal(18);
    }

    [Fact]
    public void Ctrl_Z_leaves_the_screen_until_the_program_goes_on()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using ServerProcess proxy = Proxies.Start(_folder, origin);
        using var terminal = new Terminal(Socket, isStopped: true);
        terminal.UntilScreen("what clients read is kept");
        terminal.Type("\x1a");
        terminal.Until("stopped=");
        Assert.Equal(terminal.Text.Split("\e[?1049h").Length, terminal.Text.Split("\e[?1049l").Length);
        terminal.Type("\n"); // the shell reads it, and lets the program go on
        Wait.Until(() => terminal.Text.Split("\e[?1049h").Length == 3, "it goes on");
        terminal.UntilScreen("what clients read is kept");
        terminal.Type("q");
        terminal.End(0);
    }

    /// <summary>The kernel does not stop a program that nobody could continue.</summary>
    [Fact]
    public void Ctrl_Z_without_job_control_changes_nothing()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using ServerProcess proxy = Proxies.Start(_folder, origin);
        using var terminal = new Terminal(Socket);
        terminal.UntilScreen("what clients read is kept");
        terminal.Type("\x1a");
        Wait.Until(() => terminal.Text.Split("\e[?1049h").Length == 3, "the screen is back");
        terminal.Type("q");
        terminal.End(0);
    }

    [Fact]
    public async Task Without_a_terminal_it_is_refused()
    {
        ToolResult result = await Tool.Run(Proxies.Control, "--watch", Socket);
        Assert.Equal((1, ""), (result.ExitCode, result.Output));
        Assert.Equal(
            "xnbd-bgctl: --watch needs a terminal: for programs there is --query --json, and for logs --move"
            + " --progress\n",
            result.Errors);
        ToolResult dumb = await Tool.Run(
            "script", "-qec", $"env TERM=dumb {Proxies.Control} --watch {Socket}", "/dev/null");
        Assert.Equal(1, dumb.ExitCode);
        Assert.Contains("can move its cursor", dumb.Output, StringComparison.Ordinal);
    }

    /// <summary>What stands in the place of a proxy.</summary>
    [Theory]
    [InlineData("""{"jsonrpc":"2.0","id":1,"error":{"code":-32601,"message":"no method 'watch'"}}""", "older")]
    [InlineData("""{"jsonrpc":"2.0","id":1,"result":{"mode":"proxy"}}""", "cannot be read")]
    [InlineData("""{"jsonrpc":"2.0","id":1,"result":null}""", "cannot be read")]
    [InlineData("""{"jsonrpc":"2.0","id":1,"error":7}""", "no control channel")]
    [InlineData("SSH-2.0-OpenSSH_9.2", "no control channel")]
    [InlineData("", "no control channel")]
    [InlineData("endless", "no control channel")]
    public void A_server_that_answers_something_else_is_told_in_one_line(string answer, string message)
    {
        using var listener = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        listener.Bind(new UnixDomainSocketEndPoint(Socket));
        listener.Listen();
        Task.Run(() =>
        {
            using System.Net.Sockets.Socket client = listener.Accept();
            client.Receive(new byte[1000]);
            client.Send(answer == "endless" ? new byte[2 << 20] : Encoding.UTF8.GetBytes(answer + "\n"));
            client.Receive(new byte[1000]);
        });
        using var terminal = new Terminal(Socket);
        terminal.Until("code=1");
        Assert.Contains("xnbd-bgctl: ", terminal.Text, StringComparison.Ordinal);
        Assert.Contains(message, terminal.Text, StringComparison.Ordinal);
        Assert.DoesNotContain("   at ", terminal.Text, StringComparison.Ordinal);
    }

    /// <summary>Each has a screen, and the client that works is not pushed out.</summary>
    [Fact]
    public async Task Ten_watch_at_once_and_the_proxy_works_on()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using ServerProcess proxy = Proxies.Start(_folder, origin);
        Terminal[] terminals = [.. Enumerable.Range(0, 10).Select(_ => new Terminal(Socket))];
        try
        {
            foreach (Terminal terminal in terminals)
                terminal.UntilScreen("what clients read is kept");
            Assert.Equal(0, (await Tool.Run(Proxies.Control, "--move", Socket)).ExitCode);
            foreach (Terminal terminal in terminals)
                terminal.End(0);
        }
        finally
        {
            Array.ForEach(terminals, terminal => terminal.Dispose());
        }
    }

    [GeneratedRegex("tty=(/dev/[a-z0-9/]+)")]
    private static partial Regex TtyName();
}
