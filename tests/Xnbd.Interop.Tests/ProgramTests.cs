using System.Diagnostics;
using System.Globalization;
using System.Net.Sockets;
using Xnbd.Protocol;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>The program: options, signals, exit codes, and what it costs.</summary>
public sealed class ProgramTests : IDisposable
{
    private readonly TempFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    private static string Text(int number) => number.ToString(CultureInfo.InvariantCulture);

    /// <summary>Starts a server without waiting until it listens.</summary>
    private static Process StartAnother(string socket, string image)
    {
        string[] args = ["--target", "--unix", socket, image];
        return Process.Start(new ProcessStartInfo(ServerProcess.Executable, args) { RedirectStandardError = true })!;
    }

    [Theory]
    [InlineData(2, "no mode")]
    [InlineData(2, "unknown option '-t'", "-t")]
    [InlineData(2, "unknown option '--help-me'", "--help-me")]
    [InlineData(2, "--pidfile is for servers that listen", "--target", "--inetd", "--pidfile", "p", "a")]
    [InlineData(2, "--pidfile: the name is empty", "--target", "--pidfile", "", "a")]
    [InlineData(
        1,
        "cannot create the pid file '/nosuch/pid': No such file or directory",
        "--target", "--pidfile", "/nosuch/pid", "a")]
    [InlineData(2, "no disk image", "--target")]
    [InlineData(2, "only one disk image", "--target", "a", "b")]
    [InlineData(2, "--bogus", "--target", "--bogus", "a")]
    [InlineData(2, "-x", "--target", "-x", "a")]
    [InlineData(2, "--lport 99999", "--target", "--lport", "99999", "a")]
    [InlineData(2, "--lport abc", "--target", "--lport", "abc", "a")]
    [InlineData(2, "--lport 0", "--target", "--lport", "0", "a")]
    [InlineData(2, "--lport", "--target", "a", "--lport")]
    [InlineData(2, "exclude each other", "--target", "--inetd", "--daemonize", "a")]
    [InlineData(2, "only one mode", "--target", "--proxy", "a")]
    [InlineData(2, "--connected-fd -1", "--target", "--connected-fd=-1", "a")]
    [InlineData(2, "does not listen", "--target", "--inetd", "--lport", "1234", "a")]
    [InlineData(1, "No such file", "--target", "/nonexistent/image")]
    [InlineData(1, "Is a directory", "--target", "/tmp")]
    [InlineData(1, "Is a directory", "--target", "--readonly", "/tmp")]
    [InlineData(1, "neither", "--target", "/dev/null")]
    [InlineData(2, "only one mode", "--target", "--cow-target", "a")]
    [InlineData(2, "go with --cow-target", "--target", "--cow-layer", "l", "a")]
    [InlineData(2, "go with --cow-target", "--target", "--cow-dir", "/tmp", "a")]
    [InlineData(2, "--force goes with --cow-layer", "--cow-target", "--force", "a")]
    [InlineData(2, "--cow-dir is for layers", "--cow-target", "--cow-dir", "/tmp", "--cow-layer", "l", "a")]
    [InlineData(2, "--cow-layer", "--cow-target", "a", "--cow-layer")]
    [InlineData(1, "No such file", "--cow-target", "/nonexistent/image")]
    [InlineData(1, "neither", "--cow-target", "/dev/null")]
    [InlineData(2, "--share-image goes with --target", "--cow-target", "--share-image", "a")]
    [InlineData(2, "--format qcow2: images are served as raw bytes only", "--target", "--format", "qcow2", "a")]
    [InlineData(2, "--format", "--target", "a", "--format")]
    [InlineData(2, "five arguments", "--proxy", "h", "1", "a", "b")]
    [InlineData(2, "four arguments, if the first one is a URI", "--proxy", "nbd://h", "1", "a", "b", "c")]
    [InlineData(2, "TLS is not supported yet", "--proxy", "nbds://h", "a", "b", "c")]
    [InlineData(2, "give one of them", "--proxy", "--target-exportname", "x", "nbd://h/y", "a", "b", "c")]
    [InlineData(
        1, "cannot connect", "--proxy", "nbd+unix:///?socket=/nonexistent/socket", "/tmp/a", "/tmp/b", "/tmp/c")]
    [InlineData(2, "is a remote disk, which --proxy serves", "--target", "nbd://h/x")]
    [InlineData(2, "is a remote disk, which --proxy serves", "--cow-target", "nbd+unix:///?socket=/s")]
    [InlineData(2, "remote port", "--proxy", "h", "x", "a", "b", "c")]
    [InlineData(2, "Unix socket", "--proxy", "unix:/x", "1", "a", "b", "c")]
    [InlineData(
        2, "--clear-bitmap forgets", "--proxy", "--clear-bitmap", "--import-bitmap", "unix:/x", "-", "a", "b", "c")]
    [InlineData(2, "--clear-bitmap goes with --proxy", "--target", "--clear-bitmap", "a")]
    [InlineData(2, "--max-buf-size 5", "--proxy", "--max-buf-size", "5", "unix:/x", "-", "a", "b", "c")]
    [InlineData(1, "cannot connect", "--proxy", "unix:/nonexistent/socket", "-", "/tmp/a", "/tmp/b", "/tmp/c")]
    [InlineData(1, "cannot connect", "--proxy", "127.0.0.1", "1", "/tmp/a", "/tmp/b", "/tmp/c")]
    public async Task A_wrong_call_gets_one_clear_line(int exitCode, string message, params string[] args)
    {
        ToolResult result = await Tool.Run(ServerProcess.Executable, args);
        Assert.Equal(exitCode, result.ExitCode);
        Assert.Empty(result.Output);
        string[] lines = result.Errors.Split('\n', StringSplitOptions.RemoveEmptyEntries);
        Assert.StartsWith("xnbd-server: ", lines[0], StringComparison.Ordinal);
        Assert.Contains(message, lines[0], StringComparison.Ordinal);
        Assert.Equal(exitCode == 2 ? 2 : 1, lines.Length); // for wrong usage a second line names --help
    }

    [Fact]
    public async Task Descriptors_that_are_not_a_connection_are_refused()
    {
        string image = _folder.Sparse("disk.img", 4096);
        ToolResult absent = await Tool.Run(ServerProcess.Executable, "--target", "--connected-fd", "99", image);
        Assert.Equal((1, "xnbd-server: descriptor 99 is not open\n"), (absent.ExitCode, absent.Errors));
        ToolResult file = await Tool.Run(
            "bash", "-c", $"exec {ServerProcess.Executable} --target --connected-fd 5 {image} 5<{image}");
        Assert.Equal((1, "xnbd-server: descriptor 5 is not a socket\n"), (file.ExitCode, file.Errors));
        ToolResult inetd = await Tool.Run(
            "bash", "-c", $"exec {ServerProcess.Executable} --target --inetd {image} <{image}");
        Assert.Equal((1, "xnbd-server: stdin is not a socket\n"), (inetd.ExitCode, inetd.Errors));
    }

    [Fact]
    public async Task A_port_in_use_and_an_image_without_permission_are_reported()
    {
        string image = _folder.Sparse("disk.img", 4096);
        using var taken = new TcpListener(System.Net.IPAddress.Loopback, 0);
        taken.Start();
        int port = ((System.Net.IPEndPoint)taken.LocalEndpoint).Port;
        ToolResult result = await Tool.Run(
            ServerProcess.Executable, "--target", "--laddr", "127.0.0.1", "--lport", Text(port), image);
        Assert.Equal(1, result.ExitCode);
        Assert.Equal(
            $"xnbd-server: cannot listen on address 127.0.0.1, port {port}: Address already in use\n", result.Errors);

        // A second xnbd-server is refused, too: otherwise connections would be divided between two disks.
        string socket = _folder.File("first");
        port = ServerProcess.FreePort();
        using (ServerProcess first = ServerProcess.Start(
            socket, ["--target", "--unix", socket, "--lport", Text(port), image]))
        {
            foreach (string[] where in (string[][])[[], ["--laddr", "127.0.0.1"]])
            {
                ToolResult second = await Tool.Run(
                    "timeout",
                    [
                        "5", ServerProcess.Executable, "--target", .. where, "--lport", Text(port),
                        _folder.Sparse("other.img", 4096),
                    ]);
                Assert.Equal(1, second.ExitCode);
                Assert.EndsWith($"port {port}: Address already in use\n", second.Errors, StringComparison.Ordinal);
            }
        }

        ToolResult tooLong = await Tool.Run(
            ServerProcess.Executable, "--target", "--unix", "/tmp/" + new string('x', 103), image);
        Assert.Equal(1, tooLong.ExitCode);
        Assert.EndsWith(": the path of a Unix socket has 1 to 107 bytes\n", tooLong.Errors, StringComparison.Ordinal);

        string elsewhere = await Tool.Run("true") is { ExitCode: 0 } ? _folder.File("no/such/socket") : "";
        Assert.Equal(1, (await Tool.Run(ServerProcess.Executable, "--target", "--unix", elsewhere, image)).ExitCode);

        Assert.SkipUnless(
            Environment.UserName == "root" && Tool.Find("setpriv") is not null, "another user is needed to be refused");
        File.SetUnixFileMode(image, UnixFileMode.None);
        // The other user needs access to the folder, otherwise the folder refuses.
        File.SetUnixFileMode(
            _folder.Path,
            UnixFileMode.UserRead | UnixFileMode.UserExecute | UnixFileMode.UserWrite | UnixFileMode.OtherExecute);
        string copy = _folder.File("xnbd-server");
        File.Copy(Path.Combine(ServerProcess.BinFolder, "xnbd"), copy);
        File.SetUnixFileMode(copy, (UnixFileMode)0b111_101_101);
        ToolResult denied = await Tool.Run("setpriv", "--reuid=65534", "--clear-groups", "--", copy, "--target", image);
        Assert.Equal(1, denied.ExitCode);
        Assert.Contains("Permission denied", denied.Errors, StringComparison.Ordinal);
    }

    [Fact]
    public async Task It_serves_on_ipv4_and_ipv6_and_on_one_address_alone()
    {
        string image = _folder.Sparse("disk.img", 1 << 20);
        int port = ServerProcess.FreePort();
        string socket = _folder.File("s");
        using (ServerProcess server = ServerProcess.Start(
            socket, ["--target", "--unix", socket, "--lport", Text(port), image]))
        {
            await Tool.Succeed("nbdinfo", $"nbd://127.0.0.1:{port}");
            if (Socket.OSSupportsIPv6)
                await Tool.Succeed("nbdinfo", $"nbd://[::1]:{port}");
            await Tool.Succeed("nbdinfo", server.Uri);
            Assert.Contains("127.0.0.1:", server.Log, StringComparison.Ordinal);
        }

        port = ServerProcess.FreePort();
        socket = _folder.File("t");
        using (ServerProcess.Start(
            socket, ["--target", "--unix", socket, "--laddr", "127.0.0.2", "--lport", Text(port), image]))
        {
            await Tool.Succeed("nbdinfo", $"nbd://127.0.0.2:{port}");
            Assert.NotEqual(0, (await Tool.Run("nbdinfo", $"nbd://127.0.0.1:{port}")).ExitCode);
        }
    }

    [Theory]
    [InlineData(15)]
    [InlineData(2)]
    public void A_signal_to_end_lets_it_finish_and_exit_with_success(int signal)
    {
        Skip.Unless(
            signal != 2 || !ServerProcess.IsInterruptIgnored,
            "SIGINT is ignored here, as in a job in a shell's background");
        string image = _folder.Sparse("disk.img", 1 << 20);
        using ServerProcess server = ServerProcess.Start(_folder, image);
        using NbdTestClient client = server.Open();
        client.SendRequest(NbdCommand.Write, 0, 4, 0, [1, 2, 3, 4]);
        Assert.Equal(NbdError.None, client.ReceiveReply().Error);
        server.Signal(signal);
        Assert.Equal(0, server.WaitForExit());
        Assert.True(client.IsClosed());
        Assert.Equal([1, 2, 3, 4], File.ReadAllBytes(image)[..4]);
        Assert.False(File.Exists(server.SocketPath));
    }

    [Fact]
    public void What_was_replied_to_survives_the_death_of_the_server()
    {
        const int size = 4 << 20;
        string image = _folder.Sparse("disk.img", size);
        byte[] model = new byte[size];
        var random = new Random(77);
        for (int round = 0; round < 10; round++)
        {
            using ServerProcess server = ServerProcess.Start(_folder, image);
            using NbdTestClient client = server.Open();
            using var killer = new Timer(_ => server.Signal(9), null, random.Next(5, 60), Timeout.Infinite);
            var unknown = new HashSet<int>(); // blocks whose last write was not replied to
            try
            {
                while (true)
                {
                    int block = random.Next(size / 4096);
                    byte[] data = new byte[4096];
                    random.NextBytes(data);
                    unknown.Add(block);
                    Assert.Equal(NbdError.None, client.Write((ulong)block * 4096, data));
                    data.CopyTo(model, block * 4096);
                    unknown.Remove(block);
                }
            }
            catch (Exception failure) when (failure is EndOfStreamException or SocketException)
            {
                // Killed.
            }

            server.WaitForExit();
            byte[] found = File.ReadAllBytes(image);
            foreach (int block in unknown)
                found.AsSpan(block * 4096, 4096).CopyTo(model.AsSpan(block * 4096));
            Assert.True(unknown.Count <= 1);
            Assert.Equal(model, found);
        }
    }

    [Fact]
    public void It_ends_in_time_whatever_its_clients_do()
    {
        string image = _folder.Random("disk.img", 32 << 20);
        using ServerProcess server = ServerProcess.Start(_folder, image);
        using NbdTestClient deaf = server.Open();
        using NbdTestClient mute = server.Open();
        for (int i = 0; i < 100; i++)
            deaf.SendRequest(NbdCommand.Read, 0, 1 << 20);
        mute.SendRequest(NbdCommand.Write, 0, 1 << 20); // without its payload
        Thread.Sleep(200);
        long start = Stopwatch.GetTimestamp();
        Assert.Equal(0, server.Stop());
        Assert.InRange(Stopwatch.GetElapsedTime(start).TotalSeconds, 0, 10);
    }

    [Fact]
    public async Task A_read_only_image_never_changes_and_the_session_stays_up()
    {
        string image = _folder.Random("disk.img", 1 << 20);
        byte[] before = File.ReadAllBytes(image);
        DateTime written = File.GetLastWriteTimeUtc(image);
        using ServerProcess server = ServerProcess.Start(_folder, image, "--readonly");
        using NbdTestClient client = server.Open();
        Assert.Equal(NbdError.Permission, client.Write(0, [1]));
        Assert.Equal(NbdError.Permission, client.Try(NbdCommand.Trim, 0, 4096));
        Assert.Equal(NbdError.Permission, client.Try(NbdCommand.WriteZeroes, 0, 4096));
        Assert.Equal(before[..4096], client.Read(0, 4096));
        Assert.Contains("is_read_only: true", await Tool.Succeed("nbdinfo", server.Uri), StringComparison.Ordinal);
        Assert.Equal(0, server.Stop());
        Assert.Equal(before, File.ReadAllBytes(image));
        Assert.Equal(written, File.GetLastWriteTimeUtc(image));
    }

    [Fact]
    public void A_stale_socket_is_replaced_and_a_live_one_is_not()
    {
        string image = _folder.Sparse("disk.img", 4096);
        string socket = _folder.File("s");
        using (ServerProcess killed = ServerProcess.Start(socket, ["--target", "--unix", socket, image]))
            killed.Signal(9);
        Assert.True(File.Exists(socket));
        using Process second = StartAnother(socket, image);
        try
        {
            Wait.Until(
                () => Record.Exception(() => NbdTestClient.Open(socket).Dispose()) is null,
                "the second server took over");
            using Process third = StartAnother(socket, image);
            Assert.True(third.WaitForExit(10_000));
            Assert.Equal(1, third.ExitCode);
            NbdTestClient.Open(socket).Dispose();
        }
        finally
        {
            second.Kill();
            second.WaitForExit();
        }
    }

    [Fact]
    public async Task The_command_returns_when_the_daemon_listens_and_the_daemon_logs_to_a_file()
    {
        string image = _folder.Sparse("disk.img", 1 << 20);
        string socket = _folder.File("s"), log = _folder.File("log");
        ToolResult started = await Tool.Run(
            ServerProcess.Executable, "--target", "--daemonize", "--unix", socket, "--logpath", log, image);
        Assert.Equal((0, "", ""), (started.ExitCode, started.Output, started.Errors));
        int process = DaemonOn(socket);
        try
        {
            await Tool.Succeed("nbdinfo", $"nbd+unix:///?socket={socket}");
            Assert.Contains("serving", File.ReadAllText(log), StringComparison.Ordinal);
            // The daemon has its own session, no terminal, and keeps no folder busy.
            string[] stat = File.ReadAllText($"/proc/{process}/stat").Split(')')[1].Split(
                ' ', StringSplitOptions.RemoveEmptyEntries);
            Assert.Equal(Text(process), stat[3]);
            Assert.Equal("/", new FileInfo($"/proc/{process}/cwd").LinkTarget);
            foreach (int descriptor in (int[])[0, 1, 2])
                Assert.Equal("/dev/null", new FileInfo($"/proc/{process}/fd/{descriptor}").LinkTarget);

            File.Move(log, log + ".1");
            await Tool.Succeed("kill", "-HUP", Text(process));
            Wait.Until(() => File.Exists(log), "the log was opened again");
            await Tool.Succeed("kill", "-USR2", Text(process));
            Wait.Until(
                () => File.ReadAllText(log).Contains("SIGUSR2", StringComparison.Ordinal), "the signal was logged");
            await Tool.Succeed("nbdinfo", $"nbd+unix:///?socket={socket}");
        }
        finally
        {
            await Tool.Succeed("kill", Text(process));
        }

        Wait.Until(() => !Directory.Exists($"/proc/{process}"), "the daemon has ended");

        ToolResult refused = await Tool.Run(
            ServerProcess.Executable, "--target", "--daemonize", "--unix", socket, _folder.File("absent"));
        Assert.Equal(1, refused.ExitCode);
        Assert.Contains("No such file", refused.Errors, StringComparison.Ordinal);
        Assert.False(File.Exists(socket));
    }

    private static int DaemonOn(string socket) => Directory.GetDirectories("/proc")
        .Select(d => int.TryParse(Path.GetFileName(d), out int id) ? id : 0).Where(id => id > 0)
        .Single(id =>
        {
            try
            {
                return File.ReadAllText($"/proc/{id}/cmdline").Split('\0').Contains(socket)
                    && File.ReadAllText($"/proc/{id}/cmdline").Contains("xnbd", StringComparison.Ordinal);
            }
            catch (IOException)
            {
                return false;
            }
        });

    [Fact]
    public async Task For_a_super_server_stdin_is_the_connection_and_nothing_else_is_written_to_it()
    {
        Assert.SkipWhen(Tool.Find("nbdinfo") is null, "nbdinfo is absent");
        string image = _folder.Random("disk.img", 1 << 20);
        // nbdinfo's socket activation differs, so a small super-server in Python connects stdin, stdout and stderr.
        string socket = _folder.File("s");
        const string superServer = """
            import os, socket, subprocess, sys
            s = socket.socket(socket.AF_UNIX)
            s.bind(sys.argv[1])
            s.listen()
            children = []
            for _ in range(3):
                c, _ = s.accept()
                children.append(subprocess.Popen(sys.argv[2:], stdin=c, stdout=c, stderr=c))
                c.close()
            sys.exit(max(p.wait() for p in children))
            """;
        using var server = Process.Start(new ProcessStartInfo(
            "python3", ["-c", superServer, socket, ServerProcess.Executable, "--target", "--inetd", image]))!;
        try
        {
            Wait.Until(() => File.Exists(socket), "the super-server is there");
            Thread.Sleep(50); // it takes three connections: a probe would be one of them
            await Tool.Succeed("nbdcopy", $"nbd+unix:///?socket={socket}", _folder.File("back")); // two connections
            await Tool.Succeed("cmp", image, _folder.File("back"));
            using (NbdTestClient client = NbdTestClient.Open(socket))
            {
                Assert.Equal(NbdError.Invalid, client.Try(NbdCommand.Read, 1 << 20, 1));
                client.Disconnect();
                Assert.True(client.IsClosed());
            }

            Assert.True(server.WaitForExit(10_000));
            Assert.Equal(0, server.ExitCode);
        }
        finally
        {
            if (!server.HasExited)
                server.Kill(entireProcessTree: true);
        }
    }

    [Fact]
    public async Task A_negotiated_connection_is_served_at_once()
    {
        string image = _folder.Random("disk.img", 1 << 20);
        const string script = """
            import os, socket, struct, subprocess, sys
            a, b = socket.socketpair()
            b.setblocking(False)
            p = subprocess.Popen([sys.argv[1], "--target", "--connected-fd", str(b.fileno()), sys.argv[2]],
                                 pass_fds=[b.fileno()])
            b.close()
            a.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 42, 1000, 100))
            reply = b""
            while len(reply) < 116:
                reply += a.recv(4096)
            assert struct.unpack(">IIQ", reply[:16]) == (0x67446698, 0, 42)
            assert reply[16:] == open(sys.argv[2], "rb").read()[1000:1100]
            a.close()
            sys.exit(p.wait(10))
            """;
        await Tool.Succeed("python3", "-c", script, ServerProcess.Executable, image);
    }

    [Theory]
    [InlineData(true)]
    [InlineData(false)]
    public void An_image_that_shrinks_during_a_large_read_is_an_error_and_the_session_stays_up(bool readOnly)
    {
        using var memory = new TempFolder("/dev/shm");
        string image = memory.Random("disk.img", 2 << 20);
        using ServerProcess server = ServerProcess.Start(memory, image, readOnly ? ["--readonly"] : []);
        using NbdTestClient client = server.Open();
        using NbdTestClient old = server.Open(structured: false);
        using (FileStream file = File.Open(image, FileMode.Open, FileAccess.Write, FileShare.ReadWrite))
            file.SetLength((1 << 20) + 4096);
        // sendfile was under way
        Assert.Equal(NbdError.Io, client.Try(NbdCommand.Read, 1 << 20, 1 << 20, NbdCommandFlags.Df));
        Assert.Equal(File.ReadAllBytes(image)[..4096], client.Read(0, 4096));
        old.SendRequest(NbdCommand.Read, 1 << 20, 1 << 20);
        if (readOnly)
            // with sendfile a simple reply can only be broken off
            Assert.Throws<EndOfStreamException>(old.ReceiveReply);
        else
            Assert.Equal(NbdError.Io, old.ReceiveReply().Error);
        Assert.False(server.HasExited);
    }

    /// <summary>
    /// All data behind the new end is lost: nobody reads zeroes instead, and nobody stores them.
    /// </summary>
    [Fact]
    public async Task Data_behind_the_end_of_an_image_that_has_shrunk_is_an_error_for_everybody()
    {
        string image = _folder.Random("disk.img", 2 << 20);
        using ServerProcess server = ServerProcess.Start(_folder, image);
        using ServerProcess proxy = Proxies.Start(_folder, server);
        using (FileStream file = File.Open(image, FileMode.Open, FileAccess.Write, FileShare.ReadWrite))
            file.SetLength(1 << 20);
        foreach (ServerProcess one in (ServerProcess[])[server, proxy])
        {
            using NbdTestClient client = one.Open(true, "", "base:allocation");
            Assert.Equal(NbdError.Io, client.Try(NbdCommand.Read, 1 << 20, 512));
            Assert.Equal(NbdError.Io, client.Try(NbdCommand.Read, 1 << 20, 65536));
            Assert.Equal(NbdError.Io, client.Try(NbdCommand.Read, 1 << 20, 1 << 20));
            if (one == server)
                Assert.Equal(NbdError.Io, client.Try(NbdCommand.BlockStatus, 1 << 20, 65536));
        }

        ToolResult caching = await Tool.Run(Proxies.Control, "--cache-all", Proxies.Socket(_folder));
        Assert.Equal(1, caching.ExitCode);
        server.Signal(10); // SIGUSR1
        Wait.Until(
            () => server.Log.Contains("no snapshot was made", StringComparison.Ordinal), "the snapshot has failed");
        Assert.Contains("has become shorter", server.Log, StringComparison.Ordinal);
    }

    /// <summary>
    /// The original xNBD's proxy gives all requests one cookie, and tells replies apart by their order.
    /// </summary>
    [Theory]
    [InlineData(true)]
    [InlineData(false)]
    public async Task A_client_that_relies_on_the_order_of_replies_reads_a_cold_image(bool oldstyle)
    {
        const int size = 32 << 20, requests = 4096;
        string image = _folder.Random("disk.img", size);
        byte[] bytes = File.ReadAllBytes(image);
        await Tool.Succeed("dd", $"of={image}", "oflag=nocache", "conv=notrunc,fdatasync", "count=0");
        using ServerProcess server = ServerProcess.Start(_folder, image, oldstyle ? ["--oldstyle"] : []);
        using NbdTestClient client = oldstyle
            ? NbdTestClient.Connect(server.SocketPath)
            : server.Open(structured: false);
        if (oldstyle)
            client.Receive(NbdSize.OldstyleGreeting);
        var random = new Random(3);
        var reads = Enumerable.Range(0, requests).Select(
            _ => (Offset: random.Next(size / 4096) * 4096, Length: random.Next(8) == 0 ? 65536 : 4096))
            .Select(r => r with { Length = Math.Min(r.Length, size - r.Offset) }).ToList();
        const int depth = 32;
        byte[] header = new byte[NbdSize.Request];
        for (int i = 0; i < requests + depth; i++)
        {
            if (i < requests)
            {
                new NbdRequest(NbdCommandFlags.None, NbdCommand.Read, 1, (ulong)reads[i].Offset, (uint)reads[i].Length)
                    .Write(header);
                client.Send(header);
            }

            if (i < depth)
                continue;
            (int offset, int length) = reads[i - depth];
            byte[] reply = client.Receive(NbdSize.SimpleReply);
            Assert.Equal(NbdMagic.SimpleReply, System.Buffers.Binary.BinaryPrimitives.ReadUInt32BigEndian(reply));
            Assert.True(
                client.Receive(length).AsSpan().SequenceEqual(bytes.AsSpan(offset, length)),
                $"reply {i - depth} is another read's");
        }
    }

    [Fact]
    public void A_log_that_nobody_reads_stops_nothing()
    {
        string image = _folder.Sparse("disk.img", 1 << 20);
        string socket = _folder.File("s");
        using var server = Process.Start(new ProcessStartInfo(
            ServerProcess.Executable, ["--target", "--unix", socket, image])
        { RedirectStandardError = true })!;
        try
        {
            Wait.Until(() => ServerProcess.Listens(socket), "it listens");
            for (int i = 0; i < 2000; i++)
                NbdTestClient.Open(socket).Dispose(); // 64 KiB of log lines fill the pipe
            using NbdTestClient client = NbdTestClient.Open(socket);
            Assert.Equal(16, client.Read(0, 16).Length);
            long start = Stopwatch.GetTimestamp();
            using (Process.Start("kill", Text(server.Id)))
                Assert.True(server.WaitForExit(12_000));
            Assert.Equal(0, server.ExitCode);
            Assert.InRange(Stopwatch.GetElapsedTime(start).TotalSeconds, 0, 10);
        }
        finally
        {
            if (!server.HasExited)
                server.Kill();
        }
    }

    [Fact]
    public void Servers_share_a_log_file()
    {
        string image = _folder.Sparse("disk.img", 1 << 20);
        string log = _folder.File("log");
        using ServerProcess first = ServerProcess.Start(_folder, image, "--readonly", "--logpath", log);
        using ServerProcess second = ServerProcess.Start(_folder, image, "--readonly", "--logpath", log);
        for (int i = 0; i < 50; i++)
        {
            first.Open().Dispose();
            second.Open().Dispose();
        }

        // A server that is told to end sooner does not begin the session of its last client.
        int Sessions() => File.ReadAllLines(log).Count(l => l.Contains("serving export", StringComparison.Ordinal));
        Wait.Until(() => Sessions() == 100, "all sessions are logged");
        Assert.Equal((0, 0), (first.Stop(), second.Stop()));
        string[] lines = File.ReadAllLines(log);
        Assert.All(lines, l => Assert.Matches(@"^\d{4}-\d\d-\d\dT\S+ (info|warning|error): ", l));
        Assert.Equal(100, Sessions());
    }

    [Fact]
    public void Snapshots_are_made_on_a_signal()
    {
        string image = _folder.Random("disk.img", 4 << 20);
        byte[] before = File.ReadAllBytes(image);
        using ServerProcess server = ServerProcess.Start(_folder, image);
        using NbdTestClient client = server.Open();
        server.Signal(10);
        Wait.Until(() => Completed(server) == 1, "the snapshot is complete");
        string snapshot = Snapshots(image).Single();
        client.Write(0, [(byte)~before[0]]);
        Assert.Equal(before, File.ReadAllBytes(snapshot));
        Assert.Matches(@"\.snapshot\.[0-9]{10,}$", snapshot);
    }

    private static int Completed(ServerProcess server)
        => server.Log.Split('\n').Count(l => l.Contains("snapshot complete", StringComparison.Ordinal));

    private static string[] Snapshots(string image)
        => [.. Directory.GetFiles(Path.GetDirectoryName(image)!, Path.GetFileName(image) + ".snapshot.*")
            .Where(f => !f.EndsWith(".partial", StringComparison.Ordinal))];

    [Theory]
    [InlineData("")]
    [InlineData("xfs")]
    [InlineData("btrfs")]
    public async Task A_snapshot_under_load_holds_a_prefix_of_the_writes(string kind)
    {
        using LoopMount? mount = kind.Length > 0 ? await LoopMount.Create(_folder, kind, 512 << 20) : null;
        string image = Path.Combine(mount?.Path ?? _folder.Path, "disk.img");
        const int blocks = 4096;
        using (FileStream file = File.Create(image))
            file.SetLength(blocks * 4096);
        using ServerProcess server = ServerProcess.Start(_folder, image);
        using var stop = new CancellationTokenSource();
        int replied = 0;
        Task writer = Task.Run(() =>
        {
            // Numbered blocks in order, again and again, each after the reply to the one before.
            using NbdTestClient client = server.Open();
            byte[] block = new byte[4096];
            for (int n = 1; !stop.IsCancellationRequested; n++)
            {
                BitConverter.TryWriteBytes(block, n);
                Assert.Equal(NbdError.None, client.Write((ulong)(n % blocks) * 4096, block));
                Volatile.Write(ref replied, n);
            }
        });
        try
        {
            for (int i = 1; i <= 3; i++)
            {
                Thread.Sleep(100);
                int before = Volatile.Read(ref replied);
                server.Signal(10);
                Wait.Until(() => Completed(server) == i, $"snapshot {i} is complete");
                int after = Volatile.Read(ref replied);
                CheckPrefix(Snapshots(image).Order(StringComparer.Ordinal).Last(), blocks, before, after + 1);
            }
        }
        finally
        {
            stop.Cancel();
            await writer;
        }

        Assert.Equal(
            kind.Length > 0 ? 3 : 0,
            server.Log.Split('\n').Count(l => l.Contains("a reflink", StringComparison.Ordinal)));
        Assert.Equal(0, server.Stop());
    }

    private static void CheckPrefix(string snapshot, int blocks, int before, int after)
    {
        byte[] bytes = File.ReadAllBytes(snapshot);
        int[] found = [.. Enumerable.Range(0, blocks).Select(b => BitConverter.ToInt32(bytes, b * 4096))];
        int last = found.Max();
        Assert.InRange(last, before, after);
        for (int b = 0; b < blocks; b++)
        {
            // the last number up to it that was written to this block
            int expected = last - ((last - b) % blocks + blocks) % blocks;
            Assert.Equal(Math.Max(0, expected), found[b]);
        }
    }
}
