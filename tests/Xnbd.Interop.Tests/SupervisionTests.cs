using System.Diagnostics;
using System.Globalization;
using System.Net.Sockets;
using System.Text;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>The server under a service manager: sockets that are handed over, and what it tells.</summary>
public sealed class SupervisionTests : IDisposable
{
    /// <summary>
    /// Opens sockets of several kinds as descriptors from 3 on, as a service manager does, and starts the server.
    /// Then it reads commands: "start", "stop" (SIGTERM), and the end. It never closes the sockets.
    /// </summary>
    private const string Manager =
        """
        import os, signal, socket, sys
        kinds, server = sys.argv[1].split(","), sys.argv[2:]
        def opened(kind):
            name, _, path = kind.partition("=")
            if name == "file":
                return os.open("/dev/null", os.O_RDONLY)
            if name == "tcp":
                s = socket.create_server(("127.0.0.1", int(path)))
            else:
                s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM if name == "dgram" else socket.SOCK_STREAM)
                s.bind("\0" + path[1:] if path[0] == "@" else path)
                if name == "unix":
                    s.listen()
            return s.detach()
        for number, descriptor in enumerate([opened(kind) for kind in kinds], 3):
            if descriptor != number:
                os.dup2(descriptor, number)
            os.set_inheritable(number, True)
        print("opened", flush=True)
        child = 0
        for line in sys.stdin:
            if line.strip() == "start":
                child = os.fork()
                if child == 0:
                    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(kinds)), LISTEN_FDNAMES="a")
                    os.execv(server[0], server)
            else:
                if line.strip() == "stop":
                    os.kill(child, signal.SIGTERM)
                print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        """;

    /// <summary>Stops one thread of a process until its input ends.</summary>
    private const string StopThread =
        """
        import ctypes, sys
        seize, interrupt = 0x4206, 0x4207
        for request in seize, interrupt:
            if ctypes.CDLL(None).ptrace(ctypes.c_ulong(request), int(sys.argv[1]), None, None) != 0:
                sys.exit()
        print("stopped", flush=True)
        sys.stdin.read()
        """;

    private readonly TempFolder _folder = new();
    private readonly string _image;

    public SupervisionTests() => _image = _folder.Sparse("disk.img", 1 << 20);

    public void Dispose() => _folder.Dispose();

    /// <summary>
    /// Clients that connect while no server runs wait for the next one: the end of a server neither removes the file
    /// nor shuts the sockets down, which still belong to the service manager.
    /// </summary>
    [Fact]
    public async Task Sockets_that_were_handed_over_outlive_the_server()
    {
        string path = _folder.File("s"), name = "xnbd-test-" + Guid.NewGuid().ToString("N");
        int port = ServerProcess.FreePort();
        using Process manager = Manage(
            $"unix={path},tcp={port},unix=@{name}", ServerProcess.Executable, "--target", _image);
        for (int life = 0; life < 3; life++)
        {
            await manager.StandardInput.WriteLineAsync("start");
            foreach (string uri in (string[])
                [$"nbd+unix:///?socket={path}", $"nbd://127.0.0.1:{port}", $"nbd+unix:///?socket={path}"])
                Assert.Equal("1048576", (await Tool.Succeed("nbdinfo", "--size", uri)).Trim());
            using (var abstractSocket = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified))
            {
                await abstractSocket.ConnectAsync(
                    new UnixDomainSocketEndPoint("\0" + name), TestContext.Current.CancellationToken);
                byte[] greeting = new byte[8];
                await abstractSocket.ReceiveAsync(greeting, TestContext.Current.CancellationToken);
                Assert.Equal("NBDMAGIC"u8, greeting);
            }

            await manager.StandardInput.WriteLineAsync("stop");
            Assert.Equal("0", await manager.StandardOutput.ReadLineAsync(TestContext.Current.CancellationToken));
            Assert.True(Path.Exists(path));
        }

        manager.StandardInput.Close();
        string log = await manager.StandardError.ReadToEndAsync(TestContext.Current.CancellationToken);
        Assert.Contains($"nbd://127.0.0.1:{port}", log, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("file", "descriptor 3, which the service manager has handed over, is not a socket")]
    [InlineData("dgram", "descriptor 3, which the service manager has handed over, is not a TCP socket or a Unix")]
    [InlineData("silent", "descriptor 3, which the service manager has handed over, does not listen")]
    public async Task A_descriptor_that_is_no_listener_is_refused(string kind, string message)
    {
        using Process manager = Manage(
            $"{kind}={_folder.File("s")}", ServerProcess.Executable, "--target", _image);
        await manager.StandardInput.WriteLineAsync("start\nwait");
        Assert.Equal("1", await manager.StandardOutput.ReadLineAsync(TestContext.Current.CancellationToken));
        manager.StandardInput.Close();
        Assert.Contains(
            message,
            await manager.StandardError.ReadToEndAsync(TestContext.Current.CancellationToken),
            StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("--lport 10", "--lport, --laddr and --unix make no sense here")]
    [InlineData("--laddr 127.0.0.1", "--lport, --laddr and --unix make no sense here")]
    [InlineData("--unix /nowhere", "--lport, --laddr and --unix make no sense here")]
    [InlineData("--daemonize", "leave --daemonize out")]
    public async Task Options_that_say_where_to_listen_are_refused_beside_sockets(string options, string message)
    {
        using Process manager = Manage(
            $"unix={_folder.File("s")}",
            [ServerProcess.Executable, "--target", .. options.Split(' '), _image]);
        await manager.StandardInput.WriteLineAsync("start\nwait");
        Assert.Equal("2", await manager.StandardOutput.ReadLineAsync(TestContext.Current.CancellationToken));
        manager.StandardInput.Close();
        Assert.Contains(
            message,
            await manager.StandardError.ReadToEndAsync(TestContext.Current.CancellationToken),
            StringComparison.Ordinal);
    }

    [Fact]
    public async Task Systemd_socket_activate_starts_it()
    {
        Assert.SkipWhen(Tool.Find("systemd-socket-activate") is null, "systemd is absent");
        string socket = _folder.File("s");
        using ServerProcess server = ServerProcess.StartCommand(
            socket, ["systemd-socket-activate", "--listen", socket, ServerProcess.Executable, "--target", _image]);
        Assert.Equal("1048576", (await Tool.Succeed("nbdinfo", "--size", server.Uri)).Trim());
        Assert.Equal(0, server.Stop());
        Assert.True(Path.Exists(socket));
    }

    [Theory]
    [InlineData("LISTEN_FDS=many", "LISTEN_FDS=many is not a number of descriptors")]
    [InlineData("NOTIFY_SOCKET=vsock:2:1", "NOTIFY_SOCKET=vsock:2:1 cannot be used")]
    [InlineData("NOTIFY_SOCKET=/n WATCHDOG_USEC=soon", "WATCHDOG_USEC=soon is not a time in microseconds")]
    public async Task What_the_service_manager_says_must_make_sense(string variables, string message)
    {
        ToolResult result = await Tool.Run(
            "sh", "-c", $"exec env LISTEN_PID=$$ {variables} {ServerProcess.Executable} --target {_image}");
        Assert.Equal(1, result.ExitCode);
        Assert.Contains(message, result.Errors, StringComparison.Ordinal);
    }

    /// <summary>Sockets for another process are not taken, and nothing is inherited by other programs.</summary>
    [Fact]
    public void Variables_for_another_process_are_ignored()
    {
        string socket = _folder.File("s");
        using ServerProcess server = ServerProcess.StartCommand(
            socket,
            [
                "env", "LISTEN_PID=1", "LISTEN_FDS=2", "NOTIFY_SOCKET=/nowhere", "WATCHDOG_USEC=1000000",
                "WATCHDOG_PID=1", ServerProcess.Executable, "--target", "--unix", socket, _image,
            ]);
        Assert.Equal(0, server.Stop());
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void It_tells_when_it_serves_reloads_and_ends(bool isAbstract)
    {
        string name = isAbstract ? "@xnbd-test-" + Guid.NewGuid().ToString("N") : _folder.File("notify");
        using Socket told = ListenTo(name);
        using ServerProcess server = Start(name, null);
        WaitFor(told, "READY=1");
        Assert.Equal("STATUS=0 clients, 0 bytes read, 0 bytes written", WaitFor(told, "STATUS="));
        long before = Stopwatch.GetTimestamp() / 1000;
        server.Signal(1);
        string[] reloading = WaitFor(told, "RELOADING=1").Split('\n');
        string[] time = reloading[1].Split('=');
        Assert.Equal("MONOTONIC_USEC", time[0]);
        Assert.InRange(long.Parse(time[1], CultureInfo.InvariantCulture), before, Stopwatch.GetTimestamp() / 1000);
        Assert.Equal("READY=1", Receive(told));
        Assert.Equal(0, server.Stop());
        WaitFor(told, "STOPPING=1");
    }

    [Fact]
    public void It_gives_signs_of_life_while_it_serves()
    {
        string name = _folder.File("notify");
        using Socket told = ListenTo(name);
        using ServerProcess server = Start(name, TimeSpan.FromMilliseconds(400));
        using (NbdTestClient client = server.Open())
        {
            client.Write(0, new byte[4096]);
            _ = client.Read(0, 8192);
            for (string line = ""; line != "STATUS=1 client, 8 KiB read, 4 KiB written";)
                line = WaitFor(told, "STATUS=");
        }

        for (int i = 0; i < 10; i++)
            WaitFor(told, "WATCHDOG=1");

        // A process that is stopped gives none.
        server.Signal(19);
        told.ReceiveTimeout = 1500;
        Assert.Throws<SocketException>((Action)(() =>
        {
            while (true)
                Receive(told);
        }));
        server.Signal(18);
        told.ReceiveTimeout = 10_000;
        WaitFor(told, "WATCHDOG=1");
        Assert.Equal(0, server.Stop());
    }

    /// <summary>A thread of the server that hangs is noticed, although all others go on.</summary>
    [Theory]
    [InlineData("signals", "the thread that takes signals does not respond")]
    [InlineData("listener", "a thread that accepts connections does not respond")]
    public void A_thread_that_hangs_ends_the_signs_of_life(string thread, string message)
    {
        string name = _folder.File("notify");
        using Socket told = ListenTo(name);
        using ServerProcess server = Start(name, TimeSpan.FromSeconds(1));
        WaitFor(told, "READY=1"); // all threads are there
        WaitFor(told, "WATCHDOG=1");
        string number = Directory.GetDirectories($"/proc/{server.Id}/task")
            .First(task => File.ReadAllText(task + "/comm").Trim() == thread).Split('/')[^1];
        using Process tracer = Process.Start(new ProcessStartInfo("python3", ["-c", StopThread, number])
        {
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
        })!;
        string? answer = tracer.StandardOutput.ReadLine();
        Assert.SkipWhen(answer is null, "this user may not trace the server");
        Assert.Equal("stopped", answer);
        Wait.Until(() => server.Log.Contains(message, StringComparison.Ordinal), "it is noticed");
        while (told.Available > 0)
            Receive(told);
        for (int i = 0; i < 3; i++)
            Assert.StartsWith("STATUS=", Receive(told), StringComparison.Ordinal);
        tracer.StandardInput.Close();
        tracer.WaitForExit();
        WaitFor(told, "WATCHDOG=1");
        Assert.Equal(0, server.Stop());
    }

    [Fact]
    public async Task In_the_background_it_tells_nothing_and_says_so()
    {
        string name = _folder.File("notify"), socket = _folder.File("s"), pidFile = _folder.File("pid");
        using Socket told = ListenTo(name);
        ToolResult result = await Tool.Run(
            "env", "NOTIFY_SOCKET=" + name, ServerProcess.Executable, "--target", "--daemonize", "--unix", socket,
            "--pidfile", pidFile, "--logpath", _folder.File("log"), _image);
        int server = int.Parse(await File.ReadAllTextAsync(
            pidFile, TestContext.Current.CancellationToken), CultureInfo.InvariantCulture);
        ServerProcess.Signal(server, 15);
        Assert.Equal(0, result.ExitCode);
        Assert.Contains(
            "with --daemonize the service manager is told nothing", result.Errors, StringComparison.Ordinal);
        Wait.Until(() => !Path.Exists(pidFile), "it has ended");
        Assert.Equal(0, told.Available);
    }

    /// <summary>A service manager that is gone, or that does not read, does not disturb the service.</summary>
    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void It_serves_although_nobody_listens_to_it(bool exists)
    {
        string name = _folder.File("notify");
        using Socket? told = exists ? ListenTo(name) : null;
        using ServerProcess server = Start(name, TimeSpan.FromMilliseconds(2)); // the queue is full in an instant
        Thread.Sleep(200);
        server.Open().Dispose();
        Assert.Equal(0, server.Stop());
    }

    /// <summary>Starts <see cref="Manager"/>, and waits until its sockets are open.</summary>
    private static Process Manage(string sockets, params string[] server)
    {
        Process manager = Process.Start(new ProcessStartInfo("python3", ["-c", Manager, sockets, .. server])
        {
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
        })!;
        Assert.Equal("opened", manager.StandardOutput.ReadLine());
        return manager;
    }

    private ServerProcess Start(string notify, TimeSpan? watchdog)
    {
        string socket = _folder.File("s");
        string[] variables = watchdog is { TotalMicroseconds: var microseconds }
            ? [$"WATCHDOG_USEC={(long)microseconds}"]
            : [];
        return ServerProcess.StartCommand(
            socket,
            [
                "env", "NOTIFY_SOCKET=" + notify, .. variables,
                ServerProcess.Executable, "--target", "--unix", socket, _image,
            ]);
    }

    private static Socket ListenTo(string name)
    {
        var socket = new Socket(AddressFamily.Unix, SocketType.Dgram, ProtocolType.Unspecified)
        {
            ReceiveTimeout = 10_000,
        };
        socket.Bind(new UnixDomainSocketEndPoint(name[0] == '@' ? "\0" + name[1..] : name));
        return socket;
    }

    private static string Receive(Socket socket)
    {
        byte[] buffer = new byte[4096];
        return Encoding.UTF8.GetString(buffer, 0, socket.Receive(buffer));
    }

    /// <summary>Receives until a message begins as wanted.</summary>
    private static string WaitFor(Socket socket, string start)
    {
        for (int i = 0; i < 1000; i++)
        {
            string message = Receive(socket);
            if (message.StartsWith(start, StringComparison.Ordinal))
                return message;
        }

        throw new TimeoutException($"nothing begins with {start}");
    }
}
