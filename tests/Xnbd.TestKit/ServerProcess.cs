using System.Diagnostics;
using System.Net;
using System.Net.Sockets;
using System.Runtime.InteropServices;
using System.Text;

namespace Xnbd.TestKit;

/// <summary>The native <c>xnbd-server</c> in its own process.</summary>
public sealed class ServerProcess : IDisposable
{
    private readonly Process _process;
    private readonly StringBuilder _log = new();

    private ServerProcess(Process process, string socketPath)
    {
        _process = process;
        SocketPath = socketPath;
        process.ErrorDataReceived += (_, line) =>
        {
            lock (_log)
                _log.AppendLine(line.Data);
        };
        process.BeginErrorReadLine();
    }

    /// <summary>Where the programs are: <c>out/bin</c> of the repository.</summary>
    public static string BinFolder { get; } = Path.Combine(Repository.Root, "out", "bin");

    public static string Executable => Path.Combine(BinFolder, "xnbd-server");

    public string SocketPath { get; }

    /// <summary>For libnbd, nbdcopy, fio.</summary>
    public string Uri => $"nbd+unix:///?socket={SocketPath}";

    public int Id => _process.Id;

    public bool HasExited => _process.HasExited;

    public string Log
    {
        get
        {
            lock (_log)
                return _log.ToString();
        }
    }

    /// <summary>Serves an image on a Unix socket in a folder.</summary>
    public static ServerProcess Start(TempFolder folder, string image, params string[] options)
        => StartMode("--target", folder, image, options);

    /// <summary>The same in another mode than the target mode.</summary>
    public static ServerProcess StartMode(string mode, TempFolder folder, string image, params string[] options)
    {
        string socket = folder.File("s" + Guid.NewGuid().ToString("N")[..6]);
        return Start(socket, [mode, "--unix", socket, .. options, image]);
    }

    /// <summary>Starts the server and waits until it listens on a Unix socket.</summary>
    public static ServerProcess Start(string socketPath, string[] args)
        => StartCommand(socketPath, [Executable, .. args]);

    /// <summary>The same with a command that becomes the server, such as <c>prlimit</c>.</summary>
    public static ServerProcess StartCommand(string socketPath, string[] command)
    {
        var start = new ProcessStartInfo(Tool.Find(command[0]) ?? command[0], command[1..])
        {
            RedirectStandardError = true,
        };
        var server = new ServerProcess(Process.Start(start)!, socketPath);
        try
        {
            Wait.Until(() => Listens(socketPath) || server.HasExited, "the server listens");
            if (server.HasExited)
                server.WaitForExit(); // until all its output has been read
            if (server.HasExited)
                throw new InvalidOperationException($"the server did not start: {server.Log}");
            return server;
        }
        catch
        {
            server.Dispose();
            throw;
        }
    }

    /// <summary>Whether somebody listens on a Unix socket. The existence of its file would say less.</summary>
    public static bool Listens(string socketPath)
    {
        try
        {
            NbdTestClient.Connect(socketPath).Dispose();
            return true;
        }
        catch (SocketException)
        {
            return false;
        }
    }

    public NbdTestClient Open(bool structured = true, string name = "", params string[] contexts)
        => NbdTestClient.Open(SocketPath, structured, name, contexts);

    /// <summary>Sends a signal.</summary>
    public void Signal(int number) => Signal(Id, number);

    /// <summary>Sends a signal to any process.</summary>
    public static void Signal(int process, int number) => _ = Kill(process, number);

    /// <summary>
    /// Whether this process, and so all that it starts, ignores SIGINT. A shell without job control starts background
    /// jobs in this way.
    /// </summary>
    public static bool IsInterruptIgnored { get; }
        = (Convert.ToInt64(StatusLine("/proc/self/status", "SigIgn").Split('\t')[1], 16) & 2) != 0;

    /// <summary>Whether all threads of a server block a signal, except the one that takes it.</summary>
    public static bool BlocksInAllThreads(int process, int signal)
    {
        try
        {
            return Directory.GetDirectories($"/proc/{process}/task").All(task =>
            {
                if (File.ReadAllText(task + "/comm") == "signals\n")
                    return true;
                string mask = StatusLine(task + "/status", "SigBlk");
                ulong blocked = Convert.ToUInt64(mask.Split('\t')[1], 16);
                // for a moment all signals are blocked: before exec, and in pthread_create
                bool isChildBlocked = (blocked & (1UL << 16)) != 0;
                return !isChildBlocked && (blocked & (1UL << (signal - 1))) != 0;
            });
        }
        catch (Exception failure) when (failure is IOException or InvalidOperationException)
        {
            return false; // a thread has just ended
        }
    }

    /// <summary>Ends it with SIGKILL, and waits until it is gone.</summary>
    public void Kill()
    {
        Signal(9);
        _process.WaitForExit();
    }

    /// <summary>Ends it with SIGTERM.</summary>
    /// <returns>Its exit code.</returns>
    public int Stop()
    {
        if (!HasExited)
            Signal(15);
        return WaitForExit();
    }

    public int WaitForExit()
    {
        if (!_process.WaitForExit(20_000))
            throw new TimeoutException($"the server did not end: {Log}");
        _process.WaitForExit(); // and its output has been read
        return _process.ExitCode;
    }

    /// <summary>A figure of /proc/PID/status, such as VmRSS (KiB) or Threads.</summary>
    public long Status(string name) => ProcStatus(Id, name);

    public static long ProcStatus(int process, string name)
    {
        string[] words = StatusLine($"/proc/{process}/status", name)
            .Split((char[])[':', '\t', ' '], StringSplitOptions.RemoveEmptyEntries);
        return long.Parse(words[1], System.Globalization.CultureInfo.InvariantCulture);
    }

    private static string StatusLine(string path, string name)
        => File.ReadLines(path).First(line => line.StartsWith(name + ":", StringComparison.Ordinal));

    public int OpenDescriptors => Directory.GetFiles($"/proc/{Id}/fd").Length;

    public void Dispose()
    {
        if (!HasExited)
        {
            _process.Kill();
            _process.WaitForExit();
        }

        _process.Dispose();
    }

    /// <summary>A TCP port that was free a moment ago.</summary>
    public static int FreePort()
    {
        using var listener = new TcpListener(IPAddress.IPv6Any, 0);
        listener.Server.DualMode = true;
        listener.Start();
        return ((IPEndPoint)listener.LocalEndpoint).Port;
    }

    [DllImport("libc", EntryPoint = "kill")]
    private static extern int Kill(int process, int signal);
}
