using System.Diagnostics;
using System.Globalization;
using Xnbd.TestKit;

namespace Xnbd.Bench;

/// <summary>A running server.</summary>
public sealed class RunningPeer : IDisposable
{
    private const double MaxStartSeconds = 10;

    private readonly Process _process;
    private readonly Setting _setting;
    private bool _isDisposed;

    private RunningPeer(Process process, Peer peer, Setting setting)
        => (_process, Peer, _setting) = (process, peer, setting);

    public Peer Peer { get; }

    public Endpoint Endpoint => _setting.Endpoint;

    public string Uri => Endpoint.Uri(Peer.ExportName);

    /// <summary>Time from its start to its first greeting, in milliseconds.</summary>
    public double StartMilliseconds { get; private init; }

    /// <summary>Processor time used so far, children included, in seconds.</summary>
    public double CpuSeconds => ProcessorTime.OfTree(_process.Id);

    /// <summary>A file of the server.</summary>
    public string File(string name) => _setting.File(name);

    /// <summary>Starts a server, and waits until it greets a client.</summary>
    /// <exception cref="InvalidOperationException">It did not start.</exception>
    public static RunningPeer Start(Peer peer, Setting setting)
    {
        string program = Tool.Find(peer.Program) ?? peer.Program;
        string[] command = [.. setting.Endpoint.Prefix, program, .. peer.Arguments(setting)];
        long start = Stopwatch.GetTimestamp();
        Process process = Process.Start(
            new ProcessStartInfo(Tool.Find(command[0]) ?? command[0], command[1..])
            {
                RedirectStandardError = true,
                RedirectStandardOutput = true,
                Environment = { ["TMPDIR"] = setting.Folder }, // where nbdkit's filters keep their files
            })!;
        process.ErrorDataReceived += (_, _) => { };
        process.OutputDataReceived += (_, _) => { };
        process.BeginErrorReadLine();
        process.BeginOutputReadLine();
        try
        {
            while (!setting.Endpoint.Greets())
            {
                if (process.HasExited && !peer.IsDaemon)
                    throw new InvalidOperationException($"it ended with {process.ExitCode} at its start");
                if (Stopwatch.GetElapsedTime(start).TotalSeconds > MaxStartSeconds)
                    throw new InvalidOperationException($"it did not greet within {MaxStartSeconds} s");
                Thread.SpinWait(1000);
            }
        }
        catch
        {
            process.Kill(entireProcessTree: true);
            throw;
        }

        double milliseconds = Stopwatch.GetElapsedTime(start).TotalMilliseconds;
        return new RunningPeer(peer.IsDaemon ? Daemon(setting) : process, peer, setting)
        {
            StartMilliseconds = milliseconds,
        };
    }

    /// <summary>
    /// A figure of /proc/PID/status, summed over the server and its children, in KiB: VmHWM is the peak of the resident
    /// size, VmRSS the present one.
    /// </summary>
    public long Kibibytes(string name) => ProcessorTime.Tree(_process.Id)
        .SelectMany(id => ProcessorTime.ReadOrEmpty($"/proc/{id}/status").Split('\n'))
        .Where(line => line.StartsWith(name + ":", StringComparison.Ordinal))
        .Sum(line => long.Parse(
            line.Split((char[])[' ', '\t'], StringSplitOptions.RemoveEmptyEntries)[1], CultureInfo.InvariantCulture));

    /// <summary>After its end, starts it with the same files.</summary>
    /// <exception cref="InvalidOperationException">It did not start.</exception>
    public RunningPeer Again() => Start(Peer, _setting);

    public void Dispose()
    {
        if (_isDisposed)
            return;
        _isDisposed = true;
        _process.Kill(entireProcessTree: true);
        _process.WaitForExit();
        _process.Dispose();
    }

    private static Process Daemon(Setting setting) => Process.GetProcessById(
        int.Parse(System.IO.File.ReadAllText(setting.File(Peer.PidFile)), CultureInfo.InvariantCulture));
}
