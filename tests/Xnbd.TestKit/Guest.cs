using System.Diagnostics;
using System.Net.Sockets;
using System.Text;
using System.Text.Json;

namespace Xnbd.TestKit;

/// <summary>
/// A small Linux in a virtual machine. QEMU emulates the processor, too, so that the guest runs wherever QEMU does. The
/// test talks to a shell in the guest over the machine's second serial line, and to QEMU's monitor. The kernel writes
/// to the first serial line, which is a file. Only one thread may use a guest at a time.
/// <para>
/// A guest can move to another QEMU: <see cref="Receive"/> starts the one that waits, and <see cref="MigrateTo"/> moves
/// the guest into it. The shell answers only where the guest is.
/// </para>
/// </summary>
public sealed class Guest : IDisposable
{
    /// <summary>The program that emulates the machine.</summary>
    public const string Program = "qemu-system-x86_64";

    /// <summary>The line with which the shell in the guest says that it is there.</summary>
    internal const string Ready = "the guest is ready";

    private readonly Process _process;
    private readonly Socket _shell;
    private readonly StreamReader _monitor;
    private readonly NetworkStream _monitorStream;
    private readonly StringBuilder _errors = new();
    private readonly string _console;
    private int _commands;

    private Guest(TempFolder folder, GuestSystem system, string[] options)
    {
        string name = "g" + Guid.NewGuid().ToString("N")[..6];
        _console = folder.File(name + ".console");
        using Socket shell = Listen(folder.File(name + ".shell")), monitor = Listen(folder.File(name + ".monitor"));
        string[] arguments =
        [
            "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
            "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", "256",
            "-kernel", system.Kernel, "-initrd", system.Initramfs, "-append", "console=ttyS0 panic=-1 quiet",
            "-serial", "file:" + _console,
            "-chardev", $"socket,id=shell,path={folder.File(name + ".shell")}", "-serial", "chardev:shell",
            "-chardev", $"socket,id=monitor,path={folder.File(name + ".monitor")}", "-mon", "monitor,mode=control",
            .. options,
        ];
        _process = Process.Start(new ProcessStartInfo(Tool.Find(Program)!, arguments)
        {
            RedirectStandardError = true,
            RedirectStandardInput = true,
        })!;
        _process.ErrorDataReceived += (_, line) =>
        {
            lock (_errors)
                _errors.AppendLine(line.Data);
        };
        _process.BeginErrorReadLine();
        try
        {
            (_shell, Socket accepted) = (Accept(shell), Accept(monitor));
            _monitorStream = new NetworkStream(accepted, ownsSocket: true) { ReadTimeout = 60_000 };
            _monitor = new StreamReader(_monitorStream);
            _monitor.ReadLine(); // the greeting
            Monitor("qmp_capabilities");
        }
        catch
        {
            End();
            throw;
        }
    }

    /// <summary>What the kernel wrote to its console, in this QEMU.</summary>
    public string Console => File.Exists(_console) ? File.ReadAllText(_console) : "";

    /// <summary>
    /// QEMU's options for a virtio disk on an NBD server; the first one is /dev/vda. Requests fail if the connection is
    /// lost.
    /// </summary>
    /// <param name="socket">The server's Unix socket.</param>
    /// <param name="name">A name that no other disk of the machine has.</param>
    public static string[] NbdDisk(string socket, string name = "disk") =>
    [
        "-blockdev",
        $"driver=nbd,node-name={name}-nbd,server.type=unix,server.path={socket},discard=unmap",
        "-blockdev", $"driver=raw,node-name={name},file={name}-nbd,cache.direct=on,discard=unmap",
        "-device", $"virtio-blk-pci,drive={name}",
    ];

    /// <summary>Starts a guest, and waits until it can be talked to.</summary>
    /// <param name="folder">Where its sockets and its console are.</param>
    /// <param name="system">What it runs.</param>
    /// <param name="options">Further options of QEMU: its devices.</param>
    public static Guest Boot(TempFolder folder, GuestSystem system, params string[] options)
    {
        var guest = new Guest(folder, system, options);
        try
        {
            guest.ReceiveUntil(Ready + "\n", seconds: 60);
            return guest;
        }
        catch
        {
            guest.Dispose();
            throw;
        }
    }

    /// <summary>Starts a QEMU that waits for a guest: see <see cref="MigrateTo"/>.</summary>
    /// <param name="folder">As in <see cref="Boot"/>.</param>
    /// <param name="system">The same as that of the guest.</param>
    /// <param name="socket">The path of the Unix socket on which it waits.</param>
    /// <param name="options">The same devices as those of the guest.</param>
    public static Guest Receive(TempFolder folder, GuestSystem system, string socket, params string[] options)
        => new(folder, system, [.. options, "-incoming", "unix:" + socket]);

    /// <summary>Moves the guest to a QEMU that waits for it; it runs on there. No command may be under way.</summary>
    public void MigrateTo(Guest next, string socket)
    {
        Monitor("migrate", new { uri = "unix:" + socket });
        string? status = null;
        Wait.Until(() => Status() is "completed" or "failed" or "cancelled", "the guest has moved", seconds: 60);
        if (status != "completed")
            throw new InvalidOperationException($"the migration is {status}: {Report()}{next.Report()}");
        Wait.Until(() => next.IsThere, "the other QEMU has taken it over");
        next._commands = _commands;

        string? Status() => status = Monitor("query-migrate").GetProperty("status").GetString();
    }

    private bool IsThere => Monitor("query-status").GetProperty("status").GetString() != "inmigrate";

    /// <summary>Gives QEMU's monitor a command.</summary>
    /// <returns>Its answer.</returns>
    public JsonElement Monitor(string command, object? arguments = null)
    {
        string line = arguments is null
            ? JsonSerializer.Serialize(new { execute = command })
            : JsonSerializer.Serialize(new { execute = command, arguments });
        _monitorStream.Write(Encoding.UTF8.GetBytes(line + "\n"));
        while (true)
        {
            string answer = _monitor.ReadLine() ?? throw new EndOfStreamException($"QEMU has ended: {Report()}");
            JsonElement json = JsonDocument.Parse(answer).RootElement;
            if (json.TryGetProperty("error", out JsonElement error))
                throw new InvalidOperationException($"{line}: {error}");
            if (json.TryGetProperty("return", out JsonElement result)) // and not an event
                return result;
        }
    }

    /// <summary>
    /// Runs a command in a subshell of the guest. What it leaves running in the background must write its output
    /// elsewhere.
    /// </summary>
    /// <exception cref="TimeoutException">It took longer; the guest cannot be used any more.</exception>
    public ToolResult Try(string command, int seconds = 60)
    {
        int number = ++_commands;
        byte[] line = Encoding.UTF8.GetBytes($"( {command}\n) < /dev/null; printf '\\n@%s %s@\\n' {number} $?\n");
        for (int sent = 0; sent < line.Length;)
            sent += _shell.Send(line.AsSpan(sent));
        string mark = $"\n@{number} ";
        string output = ReceiveUntil("@\n", seconds, mark);
        int end = output.LastIndexOf(mark, StringComparison.Ordinal);
        int exitCode = int.Parse(output[(end + mark.Length)..^2], System.Globalization.CultureInfo.InvariantCulture);
        return new ToolResult(exitCode, output[..end], "");
    }

    /// <summary>Runs a command of the shell that must succeed.</summary>
    /// <returns>What it wrote.</returns>
    public string Run(string command, int seconds = 60)
    {
        ToolResult result = Try(command, seconds);
        return result.ExitCode == 0
            ? result.Output
            : throw new InvalidOperationException(
                $"in the guest, {command}\nended with {result.ExitCode}:\n{result.Output}\n{Report()}");
    }

    /// <summary>Turns the guest off, and waits until QEMU has ended.</summary>
    public void PowerOff()
    {
        _shell.Send("poweroff -f\n"u8);
        if (!_process.WaitForExit(20_000))
            throw new TimeoutException($"the guest did not end: {Report()}");
    }

    /// <summary>Ends QEMU at once, as after a migration.</summary>
    public void Quit()
    {
        Monitor("quit");
        if (!_process.WaitForExit(20_000))
            throw new TimeoutException($"QEMU did not end: {Report()}");
    }

    public void Dispose()
    {
        End();
        _monitor.Dispose();
        _shell.Dispose();
    }

    private void End()
    {
        if (!_process.HasExited)
            _process.Kill();
        _process.WaitForExit();
        _process.Dispose();
    }

    private static Socket Listen(string path)
    {
        var listener = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        listener.Bind(new UnixDomainSocketEndPoint(path));
        listener.Listen();
        return listener;
    }

    private Socket Accept(Socket listener)
    {
        Wait.Until(() => listener.Poll(0, SelectMode.SelectRead) || _process.HasExited, "QEMU has started");
        if (_process.HasExited)
        {
            _process.WaitForExit(); // until all its output has been read
            throw new InvalidOperationException($"QEMU did not start: {Report()}");
        }

        return listener.Accept();
    }

    /// <summary>Receives from the shell until there is a mark, and what was received ends with something.</summary>
    private string ReceiveUntil(string end, int seconds, string mark = "")
    {
        var received = new StringBuilder();
        long start = Stopwatch.GetTimestamp();
        byte[] buffer = new byte[4096];
        while (true)
        {
            string text = received.ToString();
            if (text.EndsWith(end, StringComparison.Ordinal) && text.Contains(mark, StringComparison.Ordinal))
                return text;
            TimeSpan left = TimeSpan.FromSeconds(seconds) - Stopwatch.GetElapsedTime(start);
            if (left <= TimeSpan.Zero || !_shell.Poll(left, SelectMode.SelectRead))
                throw new TimeoutException($"the guest said nothing for {seconds} s after: {text}\n{Report()}");
            int count = _shell.Receive(buffer);
            if (count == 0)
                throw new EndOfStreamException($"the guest ended after: {text}\n{Report()}");
            received.Append(Encoding.UTF8.GetString(buffer.AsSpan(0, count)));
        }
    }

    private string Report()
    {
        lock (_errors)
            return $"QEMU: {_errors}\nconsole: {Console}";
    }
}
