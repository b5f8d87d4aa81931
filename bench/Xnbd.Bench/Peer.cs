using System.Diagnostics;
using Xnbd.TestKit;

namespace Xnbd.Bench;

/// <summary>The mode in which servers are compared.</summary>
public enum Mode
{
    /// <summary>Serving an image.</summary>
    Target,

    /// <summary>Serving an image that does not change; changes are kept elsewhere.</summary>
    CopyOnWrite,

    /// <summary>Serving and caching the disk of another server. That is xNBD's target mode for all of them.</summary>
    Proxy,
}

/// <summary>A server under test: how it is started on an image and a Unix socket.</summary>
/// <param name="Name">Its name in the table.</param>
/// <param name="Program">The program that must be installed.</param>
/// <param name="Arguments">Makes its arguments from image, socket, and a folder for its files.</param>
/// <param name="Mode">The mode in which it is compared.</param>
public sealed record Peer(
    string Name, string Program, Func<string, string, string, string[]> Arguments, Mode Mode = Mode.Target)
{
    /// <summary>xNBD, and every server that Debian packages.</summary>
    public static readonly IReadOnlyList<Peer> All =
    [
        new("xnbd", ServerProcess.Executable, (image, socket, folder) =>
            [
                "--cow-target", "--cow-layer", Path.Combine(folder, "layer"), "--logpath", "/dev/null",
                "--unix", socket, image,
            ],
            Mode.CopyOnWrite),
        new("xnbd --target", ServerProcess.Executable, (image, socket, _) =>
            ["--target", "--logpath", "/dev/null", "--unix", socket, image], Mode.CopyOnWrite),
        new(
            "nbdkit cow",
            "nbdkit",
            (image, socket, _) => ["-f", "-U", socket, "--filter=cow", "file", image],
            Mode.CopyOnWrite),
        new(
            "qemu-nbd qcow2",
            "qemu-nbd",
            (image, socket, folder) => Overlay(image, socket, folder, "threads"),
            Mode.CopyOnWrite),
        new(
            "qemu-nbd qcow2 io_uring",
            "qemu-nbd",
            (image, socket, folder) => Overlay(image, socket, folder, "io_uring"),
            Mode.CopyOnWrite),
        new("xnbd", ServerProcess.Executable, (image, socket, folder) =>
            [
                "--proxy", "--logpath", "/dev/null", "--unix", socket, "unix:" + Origin(folder), "-",
                Path.Combine(folder, "cache"),
                Path.Combine(folder, "map"), ControlSocket(folder),
            ], Mode.Proxy),
        new("xnbd --target", ServerProcess.Executable, (image, socket, _) =>
            ["--target", "--logpath", "/dev/null", "--unix", socket, image], Mode.Proxy),
        new("nbdkit cow-on-read", "nbdkit", (_, socket, folder) =>
            ["-f", "-U", socket, "--filter=cow", "nbd", "uri=" + OriginUri(folder), "cow-on-read=true"], Mode.Proxy),
        new("nbdkit cache", "nbdkit", (_, socket, folder) =>
            ["-f", "-U", socket, "--filter=cache", "nbd", "uri=" + OriginUri(folder), "cache-on-read=true"],
            Mode.Proxy),
        new("qemu-nbd copy-on-read", "qemu-nbd", (_, socket, folder) => CopyOnRead(socket, folder), Mode.Proxy),
        new(
            "xnbd",
            ServerProcess.Executable,
            (image, socket, _) => ["--target", "--logpath", "/dev/null", "--unix", socket, image]),
        new("nbdkit", "nbdkit", (image, socket, _) => ["-f", "-U", socket, "file", image]),
        new("qemu-nbd threads", "qemu-nbd", (image, socket, _) => Qemu(image, socket, "threads")),
        new("qemu-nbd io_uring", "qemu-nbd", (image, socket, _) => Qemu(image, socket, "io_uring")),
        new("nbd-server", "nbd-server", NbdServer),
    ];

    /// <summary>The socket of the server from which proxies read.</summary>
    public static string Origin(string folder) => Path.Combine(folder, "origin");

    /// <summary>The control socket of xNBD's proxy.</summary>
    public static string ControlSocket(string folder) => Path.Combine(folder, "control");

    private static string OriginUri(string folder) => $"nbd+unix:///?socket={Origin(folder)}";

    private static string[] CopyOnRead(string socket, string folder)
    {
        string overlay = Path.Combine(folder, "overlay.qcow2");
        Tool.Succeed(
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            OriginUri(folder),
            "-F",
            "raw",
            overlay).GetAwaiter().GetResult();
        return
        [
            "-k", socket, "--shared=0", "-t", "--image-opts",
            "driver=copy-on-read,file.driver=qcow2,file.discard=unmap,"
                + $"file.file.driver=file,file.file.filename={overlay}",
        ];
    }

    /// <summary>xNBD itself, in the mode that is compared.</summary>
    public bool IsOwn => Name == "xnbd";

    /// <summary>Not a competitor: xNBD's target mode, with which another mode is compared.</summary>
    public bool IsReference => Name == "xnbd --target";

    public bool IsPresent => Program.StartsWith('/') || Tool.Find(Program) is not null;

    private static string[] Qemu(string image, string socket, string aio)
        => ["-k", socket, "-f", "raw", .. Common(aio), image];

    private static string[] Common(string aio)
        => ["--cache=writeback", $"--aio={aio}", "--discard=unmap", "--shared=0", "-t"];

    private static string[] Overlay(string image, string socket, string folder, string aio)
    {
        string overlay = Path.Combine(folder, "overlay.qcow2");
        Tool.Succeed(
            "qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "raw", overlay).GetAwaiter().GetResult();
        return ["-k", socket, "-f", "qcow2", .. Common(aio), overlay];
    }

    private static string[] NbdServer(string image, string socket, string folder)
    {
        string configuration = Path.Combine(folder, "nbd-server.conf");
        int port = ServerProcess.FreePort(); // it always listens on a port, too
        File.WriteAllText(
            configuration,
            $"""
            [generic]
            unixsock = {socket}
            listenaddr = 127.0.0.1
            port = {port}
            [bench]
            exportname = {image}
            filesize = {new FileInfo(image).Length}

            """);
        return ["-C", configuration, "-p", PidFile(folder)]; // in the foreground it would serve a single client
    }

    /// <summary>The name of the export to ask for.</summary>
    public string ExportName => IsDaemon ? "bench" : "";

    /// <summary>It goes into the background by itself, and leaves its process id in a file.</summary>
    public bool IsDaemon => Name == "nbd-server";

    public static string PidFile(string folder) => Path.Combine(folder, "pid");
}

/// <summary>A running server.</summary>
public sealed class RunningPeer : IDisposable
{
    private static readonly double s_ticksPerSecond = 100; // USER_HZ

    private readonly Process _process;

    private RunningPeer(Process process, Peer peer, string socket, string folder)
    {
        _process = peer.IsDaemon
            ? Process.GetProcessById(
                int.Parse(File.ReadAllText(Peer.PidFile(folder)), System.Globalization.CultureInfo.InvariantCulture))
            : process;
        Socket = socket;
        Uri = $"nbd+unix:///{peer.ExportName}?socket={socket}";
        ExportName = peer.ExportName;
        IsReference = peer.IsReference;
    }

    /// <summary>It is xNBD's target mode, with which another mode is compared.</summary>
    public bool IsReference { get; }

    public string Uri { get; }

    public string Socket { get; }

    public string ExportName { get; }

    /// <summary>Time from its start to its first connection, in milliseconds.</summary>
    public double StartMilliseconds { get; private init; }

    public static RunningPeer Start(Peer peer, string image, string folder)
    {
        string socket = Path.Combine(folder, "socket");
        File.Delete(socket);
        long start = Stopwatch.GetTimestamp();
        Process process = Process.Start(
            new ProcessStartInfo(Tool.Find(peer.Program) ?? peer.Program, peer.Arguments(image, socket, folder))
            {
                RedirectStandardError = true,
                RedirectStandardOutput = true,
                Environment = { ["TMPDIR"] = folder }, // where nbdkit's filters keep their files
            })!;
        process.ErrorDataReceived += (_, _) => { };
        process.OutputDataReceived += (_, _) => { };
        process.BeginErrorReadLine();
        process.BeginOutputReadLine();
        try
        {
            while (!ServerProcess.Listens(socket))
            {
                if ((process.HasExited && !peer.IsDaemon) || Stopwatch.GetElapsedTime(start).TotalSeconds > 10)
                    throw new InvalidOperationException($"{peer.Name} did not start");
                Thread.SpinWait(1000);
            }
        }
        catch
        {
            process.Kill(entireProcessTree: true);
            throw;
        }

        return new RunningPeer(
            process, peer, socket, folder)
        { StartMilliseconds = Stopwatch.GetElapsedTime(start).TotalMilliseconds };
    }

    /// <summary>Processor time used so far, user and system, children included, in seconds.</summary>
    public double CpuSeconds => Tree().Sum(id =>
    {
        string[] stat = ReadOrEmpty($"/proc/{id}/stat").Split(')') is [_, var rest]
            ? rest.Split(' ', StringSplitOptions.RemoveEmptyEntries)
            : [];
        return stat.Length < 15
            ? 0
            : stat[11..15].Sum(
                t => double.Parse(t, System.Globalization.CultureInfo.InvariantCulture)) / s_ticksPerSecond;
    });

    /// <summary>
    /// A figure of /proc/PID/status, summed over the server and its children, in KiB: VmHWM is the peak of the resident
    /// size, VmRSS the present one.
    /// </summary>
    public long Kibibytes(string name) => Tree().Sum(id => ReadOrEmpty($"/proc/{id}/status").Split('\n')
        .Where(l => l.StartsWith(name + ":", StringComparison.Ordinal))
        .Sum(
            l => long.Parse(
                l.Split((char[])[' ', '\t'], StringSplitOptions.RemoveEmptyEntries)[1],
                System.Globalization.CultureInfo.InvariantCulture)));

    public void Dispose()
    {
        _process.Kill(entireProcessTree: true);
        _process.WaitForExit();
        _process.Dispose();
    }

    private IEnumerable<int> Tree()
    {
        var waiting = new Queue<int>([_process.Id]);
        while (waiting.TryDequeue(out int id))
        {
            yield return id;
            foreach (string child in ReadOrEmpty($"/proc/{id}/task/{id}/children").Split(
                ' ', StringSplitOptions.RemoveEmptyEntries))
                waiting.Enqueue(int.Parse(child, System.Globalization.CultureInfo.InvariantCulture));
        }
    }

    private static string ReadOrEmpty(string path)
    {
        try
        {
            return File.ReadAllText(path);
        }
        catch (IOException)
        {
            return ""; // it has ended
        }
    }
}
