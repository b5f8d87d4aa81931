using System.Diagnostics;
using System.Globalization;
using System.Net.Sockets;
using Xnbd.Protocol;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>The server as a process: its socket, its pid file, its signals and its log.</summary>
public sealed class DaemonTests : IDisposable
{
    private readonly TempFolder _folder = new();
    private readonly string _image;

    public DaemonTests() => _image = _folder.Sparse("disk.img", 1 << 20);

    public void Dispose() => _folder.Dispose();

    private static string Text(int number) => number.ToString(CultureInfo.InvariantCulture);

    private string[] On(string socket) => ["--target", "--readonly", "--unix", socket, _image];

    [Fact]
    public void A_socket_that_has_taken_the_place_of_another_one_is_left_alone()
    {
        string socket = _folder.File("s");
        using ServerProcess first = ServerProcess.Start(socket, On(socket));
        File.Delete(socket);
        using ServerProcess second = ServerProcess.Start(socket, On(socket));
        Assert.Equal(0, first.Stop());
        second.Open().Dispose();
        Assert.Equal(0, second.Stop());
        Assert.False(Path.Exists(socket));
    }

    /// <summary>
    /// The server waits for another program's lock on the directory, but not for ever, and not at its end.
    /// </summary>
    [Fact]
    public async Task A_locked_directory_is_reported_and_does_not_delay_the_end()
    {
        string folder = Directory.CreateDirectory(_folder.File("d")).FullName, socket = Path.Combine(folder, "s");
        using ServerProcess server = ServerProcess.Start(socket, On(socket));
        using Process holder =
            Process.Start(new ProcessStartInfo("flock", [folder, "cat"]) { RedirectStandardInput = true })!;
        try
        {
            Wait.Until(() => Tool.Run("flock", "-n", folder, "true").Result.ExitCode != 0, "it is locked");
            ToolResult refused = await Tool.Run(ServerProcess.Executable, On(Path.Combine(folder, "t")));
            Assert.Equal(1, refused.ExitCode);
            Assert.Contains(
                $"the directory '{folder}' has been locked by another process",
                refused.Errors,
                StringComparison.Ordinal);
            long start = Stopwatch.GetTimestamp();
            Assert.Equal(0, server.Stop());
            Assert.InRange(Stopwatch.GetElapsedTime(start).TotalSeconds, 0, 4);
        }
        finally
        {
            holder.StandardInput.Close();
            await holder.WaitForExitAsync(TestContext.Current.CancellationToken);
        }

        using ServerProcess next = ServerProcess.Start(socket, On(socket)); // in place of what was left
        Assert.Equal(0, next.Stop());
        Assert.False(Path.Exists(socket));
    }

    /// <summary>Whoever has killed the start has given it up, and will use the image.</summary>
    [Fact]
    public void A_server_that_does_not_serve_yet_ends_with_the_parent_that_waits_for_it()
    {
        string socket = _folder.File("s"), remote = _folder.File("absent");
        using Process parent = Process.Start(new ProcessStartInfo(
            ServerProcess.Executable,
            ["--proxy", "--daemonize", "--wait-remote", "60", "--unix", socket, "unix:" + remote, "-",
            _folder.File("cache"), _folder.File("map"), _folder.File("control")]))!;
        int child = 0;
        Wait.Until(() => (child = ChildOf(parent.Id)) != 0, "the child runs");
        Thread.Sleep(300); // it waits for its remote
        parent.Kill();
        parent.WaitForExit();
        Wait.Until(() => !Directory.Exists($"/proc/{child}") || IsZombie(child), "the child has ended");

        static int ChildOf(int id)
            => int.TryParse(
                File.ReadAllText($"/proc/{id}/task/{id}/children").Trim(), CultureInfo.InvariantCulture, out int child)
                ? child : 0;

        static bool IsZombie(int id)
        {
            try
            {
                return File.ReadAllText($"/proc/{id}/stat").Split(") ")[^1][0] == 'Z';
            }
            catch (IOException)
            {
                return true;
            }
        }
    }

    [Fact]
    public async Task Of_many_servers_that_start_together_on_a_stale_socket_one_serves()
    {
        string socket = _folder.File("s");
        for (int round = 0; round < 15; round++)
        {
            using (ServerProcess killed = ServerProcess.Start(socket, On(socket)))
                killed.Kill();
            Process[] all = [.. Enumerable.Range(0, 4).Select(_ => Process.Start(
                new ProcessStartInfo(ServerProcess.Executable, On(socket)) { RedirectStandardError = true })!)];
            try
            {
                Wait.Until(() => all.Count(p => p.HasExited) >= 3 && ServerProcess.Listens(socket), "one is left");
                Assert.Equal(3, all.Count(p => p.HasExited));
                foreach (Process loser in all.Where(p => p.HasExited))
                {
                    Assert.Equal(1, loser.ExitCode);
                    Assert.Contains(
                        $"cannot listen on '{socket}': another process listens there",
                        await loser.StandardError.ReadToEndAsync(TestContext.Current.CancellationToken),
                        StringComparison.Ordinal);
                }
            }
            finally
            {
                foreach (Process process in all)
                {
                    if (!process.HasExited)
                        process.Kill();
                    await process.WaitForExitAsync(TestContext.Current.CancellationToken);
                    process.Dispose();
                }
            }
        }
    }

    [Fact]
    public async Task A_socket_that_cannot_be_created_is_explained()
    {
        async Task Refused(string path, string why)
        {
            ToolResult result = await Tool.Run(ServerProcess.Executable, On(path));
            Assert.Equal((1, $"xnbd-server: cannot listen on '{path}': {why}\n"), (result.ExitCode, result.Errors));
        }

        await Refused("/nosuch/dir/s", "there is no directory '/nosuch/dir'");
        await Refused(_image + "/s", $"'{_image}' is not a directory");
        await Refused(_image, "there is another file of that name");
        string link = _folder.File("link");
        File.CreateSymbolicLink(link, _folder.File("nowhere"));
        await Refused(link, "there is another file of that name");
        Assert.False(File.Exists(_folder.File("nowhere")));
        string path = "/tmp/" + new string('x', 103);
        await Refused(path, "the path of a Unix socket has 1 to 107 bytes");

        // A listener of another kind, and one that accepts nobody, count as listeners, too.
        string other = _folder.File("other"), deaf = _folder.File("deaf");
        using var datagrams = new Socket(AddressFamily.Unix, SocketType.Dgram, ProtocolType.Unspecified);
        datagrams.Bind(new UnixDomainSocketEndPoint(other));
        await Refused(other, "another process listens there");
        using var listener = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        listener.Bind(new UnixDomainSocketEndPoint(deaf));
        listener.Listen(0);
        using NbdTestClient waiting = NbdTestClient.Connect(deaf);
        await Refused(deaf, "another process listens there");
    }

    [Fact]
    public async Task The_longest_path_of_a_socket_is_that_of_the_kernel()
    {
        string folder = Directory.CreateDirectory(_folder.File(new string('d', 40))).FullName;
        string socket = Path.Combine(folder, new string('s', 107 - folder.Length - 1));
        using ServerProcess server = ServerProcess.Start(socket, On(socket));
        await Tool.Succeed("nbdinfo", server.Uri);
        Assert.Equal(0, server.Stop());
        Assert.Empty(Directory.GetFileSystemEntries(folder));
    }

    [Fact]
    public async Task A_daemon_is_found_by_its_pid_file_and_by_its_name()
    {
        string socket = _folder.File("s"), pidFile = _folder.File("pid"), log = _folder.File("log");
        File.WriteAllText(pidFile, "123456789\n"); // left by a killed server
        string[] args = ["--daemonize", "--pidfile", pidFile, "--logpath", log, .. On(socket)];
        ToolResult started = await Tool.Run(ServerProcess.Executable, args);
        Assert.Equal((0, "", ""), (started.ExitCode, started.Output, started.Errors));
        int process = int.Parse(File.ReadAllText(pidFile), CultureInfo.InvariantCulture);
        try
        {
            Assert.Equal("xnbd-server\n", File.ReadAllText($"/proc/{process}/comm"));
            Assert.Equal("xnbd-server", Path.GetFileName(File.ReadAllText($"/proc/{process}/cmdline").Split('\0')[0]));
            if (Tool.Find("pidof") is not null)
                Assert.Contains(Text(process), (await Tool.Succeed("pidof", "xnbd-server")).Trim().Split(' '));

            // A second server is refused, and touches nothing.
            ToolResult second = await Tool.Run(
                ServerProcess.Executable,
                "--target",
                "--readonly",
                "--pidfile",
                pidFile,
                "--unix",
                _folder.File("t"),
                _image);
            Assert.Equal(
                (1, $"xnbd-server: the pid file '{pidFile}' belongs to another server, process {process}\n"),
                (second.ExitCode, second.Errors));
            Assert.Equal($"{process}\n", File.ReadAllText(pidFile));
        }
        finally
        {
            await Tool.Succeed("kill", Text(process));
        }

        Wait.Until(() => !Directory.Exists($"/proc/{process}"), "the daemon has ended");
        Assert.False(File.Exists(pidFile));

        // Without a link of that name the process gets the program's name, too.
        await Tool.Succeed(Path.Combine(ServerProcess.BinFolder, "xnbd"), ["xnbd-server", .. args]);
        process = int.Parse(File.ReadAllText(pidFile), CultureInfo.InvariantCulture);
        Assert.Equal("xnbd-server\n", File.ReadAllText($"/proc/{process}/comm"));

        // A pid file that another program has replaced is not removed.
        File.Move(pidFile, _folder.File("old"));
        File.WriteAllText(pidFile, "another's");
        await Tool.Succeed("kill", Text(process));
        Wait.Until(() => !Directory.Exists($"/proc/{process}"), "the daemon has ended");
        Assert.Equal("another's", File.ReadAllText(pidFile));
    }

    /// <summary>
    /// Without stderr, the first file that is opened gets its number, and the log would be written to the image.
    /// Without stdin, the runtime's source of random numbers gets its number, and a daemon must not redirect that.
    /// </summary>
    [Fact]
    public async Task Closed_standard_streams_harm_neither_the_image_nor_the_clients()
    {
        byte[] before = File.ReadAllBytes(_image);
        foreach (string closed in (string[])["2>&-", "<&-", "<&- >&- 2>&-"])
        {
            string socket = _folder.File("closed");
            using (ServerProcess server = ServerProcess.StartCommand(
                socket,
                [
                    "sh", "-c", $"exec \"$@\" {closed}", "sh",
                    ServerProcess.Executable, "--target", "--unix", socket, _image,
                ]))
            {
                using (NbdTestClient client = server.Open())
                    Assert.Equal(before[..4096], client.Read(0, 4096)); // not the log
                Assert.Equal(0, server.Stop());
            }

            string pidFile = _folder.File("closed.pid");
            await Tool.Succeed(
                "sh", "-c", $"exec \"$@\" {closed}", "sh",
                ServerProcess.Executable, "--daemonize", "--pidfile", pidFile, "--target", "--unix", socket, _image);
            using (NbdTestClient client = NbdTestClient.Open(socket))
                Assert.Equal(before[..4096], client.Read(0, 4096)); // the session has begun
            string process = File.ReadAllText(pidFile).Trim();
            await Tool.Succeed("kill", process);
            Wait.Until(() => !Directory.Exists($"/proc/{process}"), "the daemon has ended");
            Assert.Equal(before, File.ReadAllBytes(_image));
        }
    }

    [Fact]
    public async Task The_pid_file_of_a_server_that_fails_is_removed_and_strange_files_are_refused()
    {
        string pidFile = _folder.File("pid");
        ToolResult failed = await Tool.Run(
            ServerProcess.Executable, "--pidfile", pidFile, "--target", "--unix", "/nosuch/s", _image);
        Assert.Equal(1, failed.ExitCode);
        Assert.False(File.Exists(pidFile));
        string precious = _folder.Random("precious.img", 5000);
        byte[] before = File.ReadAllBytes(precious);
        ToolResult notOurs = await Tool.Run(
            ServerProcess.Executable, "--pidfile", precious, "--target", "--unix", _folder.File("s"), _image);
        Assert.Equal(1, notOurs.ExitCode);
        Assert.Contains("is not a pid file", notOurs.Errors, StringComparison.Ordinal);
        Assert.Equal(before, File.ReadAllBytes(precious)); // it is neither emptied nor removed
        ToolResult folder = await Tool.Run(
            ServerProcess.Executable, "--pidfile", _folder.Path, "--target", "--unix", _folder.File("s"), _image);
        Assert.Equal(
            (1, $"xnbd-server: the pid file '{_folder.Path}' is not a regular file\n"),
            (folder.ExitCode, folder.Errors));
        string fifo = _folder.File("fifo");
        await Tool.Succeed("mkfifo", fifo);
        ToolResult pipe = await Tool.Run(
            ServerProcess.Executable, "--pidfile", fifo, "--target", "--unix", _folder.File("s"), _image);
        Assert.Equal((1, $"xnbd-server: the pid file '{fifo}' is not a regular file\n"), (pipe.ExitCode, pipe.Errors));
    }

    private Process StartWaiting(string pidFile, params string[] remote) => Process.Start(new ProcessStartInfo(
        ServerProcess.Executable,
        [
            "--proxy", "--wait-remote", "60", "--pidfile", pidFile, "--unix", _folder.File("p"),
            .. remote, _folder.File("c"), _folder.File("m"), _folder.File("ctl"),
        ])
    { RedirectStandardError = true })!;

    [Fact]
    public async Task Signals_work_while_the_server_waits_for_the_remote()
    {
        string remote = _folder.File("remote"), pidFile = _folder.File("pid");
        using Process waiting = StartWaiting(pidFile, "unix:" + remote, "-");
        try
        {
            Assert.Contains(
                "waiting for the remote",
                await waiting.StandardError.ReadLineAsync(TestContext.Current.CancellationToken),
                StringComparison.Ordinal);
            foreach (int signal in (int[])[1, 10, 12])
                ServerProcess.Signal(waiting.Id, signal);
            for (int i = 0; i < 2; i++)
                Assert.Contains(
                    "the server is starting",
                    await waiting.StandardError.ReadLineAsync(TestContext.Current.CancellationToken),
                    StringComparison.Ordinal);
            Assert.False(waiting.HasExited);

            using (ServerProcess.Start(remote, On(remote)))
                Wait.Until(() => ServerProcess.Listens(_folder.File("p")), "it serves");
            ServerProcess.Signal(waiting.Id, 15);
            Assert.True(waiting.WaitForExit(20_000));
            Assert.Equal(0, waiting.ExitCode);
        }
        finally
        {
            if (!waiting.HasExited)
                waiting.Kill();
        }
    }

    /// <summary>The server is told to end while it waits: between two attempts, and during a long one.</summary>
    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public async Task It_ends_at_once_while_it_waits_for_the_remote(bool isDeaf)
    {
        string remote = _folder.File("remote"), pidFile = _folder.File("pid");
        using var deaf = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        if (isDeaf)
        {
            deaf.Bind(new UnixDomainSocketEndPoint(remote));
            deaf.Listen(1); // it never greets a client
        }

        using Process waiting = StartWaiting(pidFile, "unix:" + remote, "-");
        try
        {
            if (isDeaf)
                deaf.Accept(); // the proxy waits for a greeting now
            else
                Assert.Contains(
                    "waiting for the remote",
                    await waiting.StandardError.ReadLineAsync(TestContext.Current.CancellationToken),
                    StringComparison.Ordinal);
            long start = Stopwatch.GetTimestamp();
            ServerProcess.Signal(waiting.Id, 15);
            Assert.True(waiting.WaitForExit(20_000));
            Assert.InRange(Stopwatch.GetElapsedTime(start).TotalSeconds, 0, 5);
            Assert.Equal(0, waiting.ExitCode);
            Assert.False(File.Exists(pidFile));
            Assert.False(File.Exists(_folder.File("c")));
        }
        finally
        {
            if (!waiting.HasExited)
                waiting.Kill();
        }
    }

    /// <summary>From the first instruction of the program, as far as a test can send a signal that early.</summary>
    [Fact]
    public void Signals_at_any_moment_of_the_start_leave_a_server_or_a_clean_end()
    {
        var random = new Random(5);
        string socket = _folder.File("s");
        for (int round = 0; round < 40; round++)
        {
            bool isEnd = round % 2 == 0;
            using var server = Process
                .Start(new ProcessStartInfo(ServerProcess.Executable, On(socket)) { RedirectStandardError = true })!;
            // The test waits until the signals are blocked. Until then the program has the default behaviour.
            Wait.Until(() => ServerProcess.BlocksInAllThreads(server.Id, 15), "signals are blocked");
            Thread.SpinWait(random.Next(200_000));
            ServerProcess.Signal(server.Id, isEnd ? 15 : 1 + (9 * random.Next(2)));
            if (isEnd)
            {
                ServerProcess.Signal(server.Id, 15);
                Assert.True(server.WaitForExit(20_000));
                Assert.Equal(0, server.ExitCode);
                Assert.False(Path.Exists(socket));
                continue;
            }

            Wait.Until(() => ServerProcess.Listens(socket), "it serves");
            server.Kill();
            server.WaitForExit();
        }
    }

    [Fact]
    public void All_threads_block_the_signals_that_one_of_them_takes()
    {
        using ServerProcess server = ServerProcess.Start(_folder, _image);
        using NbdTestClient client = server.Open();
        foreach (int signal in (int[])[1, 10, 12, 15])
            Assert.True(ServerProcess.BlocksInAllThreads(server.Id, signal));
    }

    /// <summary>Trimmed blocks make the switch take a while.</summary>
    [Fact]
    public async Task A_server_that_is_told_to_end_during_a_switch_ends_in_good_order()
    {
        const int size = 16 << 20;
        string image = _folder.Random("origin.img", size), remote = _folder.File("o"), socket = _folder.File("p");
        using ServerProcess origin = ServerProcess.Start(remote, ["--target", "--readonly", "--unix", remote, image]);
        var random = new Random(9);
        for (int round = 0; round < 12; round++)
        {
            using ServerProcess proxy =
                ServerProcess.Start(socket, ["--proxy", "--clear-bitmap", "--unix", socket, "unix:" + remote, "-",
                _folder.File("c"), _folder.File("m"), _folder.File("ctl")]);
            await Tool.Succeed(Proxies.Control, "--cache-all", _folder.File("ctl"));
            using (NbdTestClient client = proxy.Open())
            {
                for (int at = 0; at < size; at += 8192)
                    client.SendRequest(NbdCommand.Trim, (ulong)at, 4096);
                for (int at = 0; at < size; at += 8192)
                    Assert.Equal(NbdError.None, client.ReceiveReply().Error);
            }

            proxy.Signal(12);
            Thread.Sleep(random.Next(15));
            proxy.Signal(15);
            proxy.Signal(15);
            Assert.Equal(0, proxy.WaitForExit());
            Assert.DoesNotContain("exception", proxy.Log, StringComparison.OrdinalIgnoreCase);
            Assert.Matches("(switched: |not switched: |the signal is ignored)", proxy.Log);
        }
    }

    [Fact]
    public async Task The_log_on_stderr_has_time_and_level_unless_they_are_recorded_elsewhere()
    {
        string socket = _folder.File("s"), log = _folder.File("log");
        async Task<string> FirstLine(string command)
        {
            // The shell's variables turn a file into the journal.
            string waiting = $"until [ -S '{socket}' ]; do sleep 0.05; done; sleep 0.2";
            await Tool.Run("timeout", ["10", "bash", "-c", $"{command} & p=$!; {waiting}; kill $p; wait $p"]);
            return File.ReadLines(log).First(line => line.Contains("serving '", StringComparison.Ordinal));
        }

        string server = $"{ServerProcess.Executable} --target --readonly --unix {socket} {_image} 2>{log}";
        Assert.Matches(@"^\d{4}-\d\d-\d\dT[0-9:.]+[+-]\d\d:\d\d xnbd-server: info: serving '", await FirstLine(server));
        Assert.StartsWith(
            "xnbd-server: serving '",
            await FirstLine($"touch {log}; JOURNAL_STREAM=$(stat -c %d:%i {log}) {server}"),
            StringComparison.Ordinal);
        Assert.Matches("^2.* info: ", await FirstLine($"JOURNAL_STREAM=1:2 {server}"));
        if (Tool.Find("script") is not null)
        {
            string command = $"{ServerProcess.Executable} --target --readonly --unix {socket} {_image}";
            Assert.StartsWith(
                "xnbd-server: serving '",
                await FirstLine($"script -qfc '{command}' {log} >/dev/null"),
                StringComparison.Ordinal);
        }
    }

    [Theory]
    [InlineData("")]
    [InlineData("my disk/1")]
    public async Task The_log_names_the_URIs_to_connect_to(string name)
    {
        string socket = _folder.File("a socket&more"), port = Text(ServerProcess.FreePort());
        using ServerProcess server = ServerProcess.Start(
            socket,
            ["--target", "--unix", socket, "--laddr", "127.0.0.1", "--lport", port, "--export-name", name, _image]);
        Wait.Until(() => server.Log.Contains("serving", StringComparison.Ordinal), "it is logged");
        string[] uris =
        [
            .. server.Log.Split('\n').Where(line => line.Contains("listening on", StringComparison.Ordinal))
                .Select(line => line[(line.LastIndexOf(' ') + 1)..].TrimEnd('\r')),
        ];
        Assert.Equal(2, uris.Length);
        Assert.StartsWith("nbd+unix:///", uris[0], StringComparison.Ordinal);
        Assert.StartsWith($"nbd://127.0.0.1:{port}", uris[1], StringComparison.Ordinal);
        foreach (string uri in uris)
            Assert.Equal("1048576", (await Tool.Succeed("nbdinfo", "--size", uri)).Trim());
    }

    [Fact]
    public async Task The_log_names_an_export_that_was_refused()
    {
        using ServerProcess server = ServerProcess.Start(_folder, _image, "--export-name", "disk");
        Assert.NotEqual(0, (await Tool.Run("nbdinfo", $"nbd+unix:///dusk?socket={server.SocketPath}")).ExitCode);
        Wait.Until(() => server.Log.Contains("'dusk'", StringComparison.Ordinal), "it is named");
        using NbdTestClient old = NbdTestClient.Connect(server.SocketPath); // like clients that do not know GO
        old.Start();
        old.Send(NbdTestClient.Bytes(b => b.U64(NbdMagic.Option).U32((uint)NbdOption.ExportName).U32(4)));
        old.Send("mist"u8);
        Wait.Until(() => server.Log.Contains("'mist'", StringComparison.Ordinal), "it is named");
    }

    [Fact]
    public async Task The_other_programs_explain_wrong_usage()
    {
        ToolResult layer = await Tool.Run(Path.Combine(ServerProcess.BinFolder, "xnbd-layer"), "foo");
        Assert.Equal(2, layer.ExitCode);
        Assert.StartsWith(
            "xnbd-layer: unknown command 'foo': use one of info, commit,", layer.Errors, StringComparison.Ordinal);
        ToolResult none = await Tool.Run(Path.Combine(ServerProcess.BinFolder, "xnbd-layer"));
        Assert.Equal(2, none.ExitCode);
        Assert.StartsWith(
            "xnbd-layer: no command was given: use one of info, commit,", none.Errors, StringComparison.Ordinal);
        ToolResult option = await Tool.Run(Path.Combine(ServerProcess.BinFolder, "xnbd-layer"), "--frob");
        Assert.StartsWith("xnbd-layer: unknown option '--frob'", option.Errors, StringComparison.Ordinal);

        string program = Path.Combine(ServerProcess.BinFolder, "xnbd");
        ToolResult help = await Tool.Run(program, "--help");
        Assert.Equal((0, ""), (help.ExitCode, help.Errors));
        Assert.Contains("xnbd-server", help.Output, StringComparison.Ordinal);
        ToolResult frob = await Tool.Run(program, "frob");
        Assert.Equal((2, ""), (frob.ExitCode, frob.Output));
        Assert.StartsWith("xnbd: there is no program 'frob'", frob.Errors, StringComparison.Ordinal);
    }
}
