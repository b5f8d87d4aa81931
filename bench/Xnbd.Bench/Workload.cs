using System.Diagnostics;
using System.Globalization;
using System.Text.Json;
using Xnbd.TestKit;

namespace Xnbd.Bench;

/// <summary>The result of one run of a workload on one server.</summary>
/// <param name="Rate">Requests, or MiB, in a second.</param>
/// <param name="P50">Median latency in microseconds; 0 when the client does not tell.</param>
/// <param name="P99">99th percentile of the latency in microseconds; 0 when the client does not tell.</param>
/// <param name="CpuMicroseconds">Processor time of the server for each request.</param>
/// <param name="PeakKibibytes">The server's peak resident size.</param>
public sealed record Measurement(double Rate, double P50, double P99, double CpuMicroseconds, double PeakKibibytes);

/// <summary>Where the image is and what state its cache is in.</summary>
public enum Medium
{
    /// <summary>In memory, on a tmpfs.</summary>
    Memory,

    /// <summary>In memory: 8 GiB, of which one part in 32 is data, in pieces of 4 MiB.</summary>
    SparseMemory,

    /// <summary>On the disk's file system, and not in memory.</summary>
    ColdDisk,
}

/// <summary>Something that a client does with a server.</summary>
/// <param name="Name">Its name in the table.</param>
/// <param name="Medium">Where the image is.</param>
/// <param name="Unit">The unit of the rate.</param>
/// <param name="IsQuick">Part of the short form.</param>
/// <param name="Run">Runs it; takes server, image, seconds.</param>
/// <param name="Mode">The mode of the servers that run it.</param>
/// <param name="IsOfFreshFile">
/// A layer or a cache is written first. So that it can be compared, the target mode begins with an empty sparse image.
/// </param>
public sealed record Workload(
    string Name, Medium Medium, string Unit, bool IsQuick, Func<RunningPeer, string, double, Task<Measurement>> Run,
    Mode Mode = Mode.Target, bool IsOfFreshFile = false)
{
    public static readonly IReadOnlyList<Workload> All =
    [
        Fio("random read 4 KiB, depth 1", "randread", "4k", 1, 1, quick: true),
        Fio("random read 4 KiB, depth 32", "randread", "4k", 32, 1, quick: true),
        Fio("random read 4 KiB, 4 x 16", "randread", "4k", 16, 4, quick: true),
        Fio("random write 4 KiB, depth 32", "randwrite", "4k", 32, 1, quick: true),
        Fio("random read/write 4 KiB, 4 x 16", "randrw", "4k", 16, 4),
        Fio("unaligned write 512 B, depth 32", "randwrite", "512", 32, 1),
        Fio("sequential read 256 KiB, depth 16", "read", "256k", 16, 1, quick: true),
        Fio("sequential write 256 KiB, depth 16", "write", "256k", 16, 1, quick: true),
        Fio("random read 4 KiB, 64 connections x 1", "randread", "4k", 1, 64),
        Fio("random read 4 KiB, 100 a second", "randread", "4k", 1, 1, ratePerSecond: 100),
        Copy("nbdcopy to null, 1 connection", toNull: true, 1),
        Copy("nbdcopy to null, 4 connections", toNull: true, 4),
        Copy("nbdcopy from a file, 1 connection", toNull: false, 1),
        Copy("nbdcopy from a file, 4 connections", toNull: false, 4),
        Fio("cold random read 4 KiB, depth 1", "randread", "4k", 1, 1, Medium.ColdDisk),
        Fio("cold random read 4 KiB, depth 32", "randread", "4k", 32, 1, Medium.ColdDisk),
        Fio("cold sequential read 256 KiB, depth 16", "read", "256k", 16, 1, Medium.ColdDisk),
        Cow("random read of the base, 4 KiB, depth 32", "randread", "4k", quick: true),
        Cow("random first write 4 KiB, depth 32", "randwrite", "4k", isOnce: true, quick: true),
        Cow("random rewrite 4 KiB, depth 32", "randwrite", "4k", isFilled: true, quick: true),
        Cow("random read of the layer, 4 KiB, depth 32", "randread", "4k", isFilled: true),
        Cow("random first write 512 B, depth 32", "randwrite", "512", isOnce: true),
        Cow("sequential read of the base, 256 KiB, depth 16", "read", "256k", quick: true),
        Cow("sequential read of the layer, 256 KiB, depth 16", "read", "256k", isFilled: true),
        Cow("sequential first write 256 KiB, depth 16", "write", "256k", isOnce: true),
        Proxy("warm random read 4 KiB, depth 32", "randread", "4k", 32, isFilled: true),
        Proxy("warm random write 4 KiB, depth 32", "randwrite", "4k", 32, isFilled: true),
        Proxy("warm random read 4 KiB, 4 x 16", "randread", "4k", 16, jobs: 4, isFilled: true),
        Proxy("warm random write 4 KiB, 4 x 16", "randwrite", "4k", 16, jobs: 4, isFilled: true),
        Proxy("cold sequential read 64 KiB, depth 16", "read", "64k", 16, isOnce: true, quick: true),
        Proxy("cold random read 4 KiB, depth 32", "randread", "4k", 32, isOnce: true, quick: true),
        CacheAll("cache-all", Medium.Memory),
        CacheAll("cache-all of a sparse image", Medium.SparseMemory),
    ];

    /// <summary>fio's own start and end take less than this.</summary>
    private const double SetUpSeconds = 0.5;

    private static string Text(double number) => number.ToString(CultureInfo.InvariantCulture);

    /// <param name="name">Its name in the table, after "copy-on-write: ".</param>
    /// <param name="pattern">In fio's notation.</param>
    /// <param name="blockSize">In fio's notation.</param>
    /// <param name="isFilled">The layer is filled before the run.</param>
    /// <param name="isOnce">The run touches each block once, and ends then.</param>
    /// <param name="quick">Part of the short form.</param>
    private static Workload Cow(
        string name, string pattern, string blockSize, bool isFilled = false, bool isOnce = false, bool quick = false)
        => Fio(
            "copy-on-write: " + name,
            pattern,
            blockSize,
            blockSize == "256k" ? 16 : 32,
            1,
            quick: quick,
            isFilled: isFilled,
            isOnce: isOnce) with
        {
            Mode = Mode.CopyOnWrite,
            IsOfFreshFile = isOnce || isFilled,
        };

    /// <param name="name">Its name in the table, after "proxy: ".</param>
    /// <param name="pattern">In fio's notation.</param>
    /// <param name="blockSize">In fio's notation.</param>
    /// <param name="depth">Requests under way on each connection.</param>
    /// <param name="jobs">Connections.</param>
    /// <param name="isFilled">The cache is filled before the run.</param>
    /// <param name="isOnce">The run touches each block once, and ends then.</param>
    /// <param name="quick">Part of the short form.</param>
    private static Workload Proxy(
        string name, string pattern, string blockSize, int depth, int jobs = 1, bool isFilled = false,
        bool isOnce = false, bool quick = false)
        => Fio("proxy: " + name, pattern, blockSize, depth, jobs, quick: quick, isFilled: isFilled, isOnce: isOnce) with
        {
            Mode = Mode.Proxy,
            IsOfFreshFile = isFilled,
        };

    /// <summary>
    /// Fetches everything. The figure of the target mode is that of nbdcopy from the origin into a file on the same
    /// file system.
    /// </summary>
    private static Workload CacheAll(string name, Medium medium)
        => new("proxy: " + name, medium, "MiB/s", IsQuick: true, async (server, image, _) =>
    {
        string folder = Path.GetDirectoryName(server.Socket)!;
        bool isProxy = File.Exists(Peer.ControlSocket(folder));
        if (!isProxy && !server.IsReference)
            throw new InvalidOperationException("it has no cache");
        long length = new FileInfo(image).Length;
        double cpu = server.CpuSeconds;
        long start = Stopwatch.GetTimestamp();
        if (isProxy)
            await Tool.Succeed(
                Path.Combine(ServerProcess.BinFolder, "xnbd-bgctl"), "--cache-all", Peer.ControlSocket(folder));
        else
            await Tool.Succeed("nbdcopy", server.Uri, Path.Combine(folder, "copy"));
        double seconds = Stopwatch.GetElapsedTime(start).TotalSeconds;
        return new Measurement(
            length / seconds / (1 << 20),
            0,
            0,
            (server.CpuSeconds - cpu) * 1e6 / (length >> 18),
            server.Kibibytes("VmHWM"));
    }, Mode.Proxy);

    private static Workload Fio(
        string name,
        string pattern,
        string blockSize,
        int depth,
        int jobs,
        Medium medium = Medium.Memory,
        bool quick = false,
        int ratePerSecond = 0,
        bool isFilled = false,
        bool isOnce = false)
    {
        bool isSequential = blockSize is "256k" or "64k";
        return new Workload(name, medium, isSequential ? "MiB/s" : "IOPS", quick, async (server, image, seconds) =>
        {
            List<string> args =
            [
                "--name=bench", "--ioengine=nbd", $"--uri={server.Uri}", $"--rw={pattern}", $"--bs={blockSize}",
                $"--iodepth={depth}",
                $"--numjobs={jobs}", "--thread", "--group_reporting", $"--size={new FileInfo(image).Length}",
                $"--runtime={Text(seconds)}",
                "--randrepeat=0", "--output-format=json",
            ];
            if (isFilled)
            {
                await Tool.Succeed(
                    "fio", "--name=fill", "--ioengine=nbd", $"--uri={server.Uri}", "--rw=write", "--bs=1m",
                    "--iodepth=4", "--thread",
                    $"--size={new FileInfo(image).Length}");
            }

            if (medium == Medium.Memory && !isOnce)
                args.Add("--time_based"); // on the disk each block is read once: after that, it is not cold
            if (ratePerSecond > 0)
                args.Add($"--rate_iops={ratePerSecond}");
            if (blockSize == "512")
                // once: a part of each block
                args.AddRange(isOnce ? ["--blockalign=4k"] : ["--blockalign=512", "--norandommap"]);

            double cpu = server.CpuSeconds;
            long start = Stopwatch.GetTimestamp();
            string output = await Tool.Succeed("fio", [.. args]);
            double wall = Stopwatch.GetElapsedTime(start).TotalSeconds;
            cpu = server.CpuSeconds - cpu;
            using JsonDocument document = JsonDocument.Parse(output[output.IndexOf('{', StringComparison.Ordinal)..]);
            JsonElement job = document.RootElement.GetProperty("jobs")[0];
            JsonElement[] sides = [job.GetProperty("read"), job.GetProperty("write")];
            double requests = sides.Sum(s => s.GetProperty("total_ios").GetDouble());

            // fio counts each job from that job's own start. If a server lets jobs wait for their connections, the run
            // takes far longer than fio says. Then the rate is that of the time that really passed.
            double time = Math.Max(sides.Max(s => s.GetProperty("runtime").GetDouble()) / 1000, wall - SetUpSeconds);
            double rate = isSequential
                ? sides.Sum(s => s.GetProperty("io_bytes").GetDouble()) / (1 << 20) / time
                : requests / time;
            return new Measurement(
                rate, sides.Max(s => Percentile(s, "50.000000")), sides.Max(s => Percentile(s, "99.000000")),
                cpu * 1e6 / requests, server.Kibibytes("VmHWM"));
        });
    }

    private static double Percentile(JsonElement side, string name)
        => side.GetProperty("clat_ns").TryGetProperty("percentile", out JsonElement percentiles)
            ? percentiles.GetProperty(name).GetDouble() / 1000
            : 0;

    private static Workload Copy(string name, bool toNull, int connections)
        => new(name, Medium.Memory, "MiB/s", IsQuick: false, async (server, image, _) =>
    {
        const int requestBytes = 256 * 1024; // nbdcopy's default
        long length = new FileInfo(image).Length;
        string source = toNull ? server.Uri : image + ".source";
        if (!toNull && !File.Exists(source))
            File.Copy(image, source);
        double cpu = server.CpuSeconds;
        long start = Stopwatch.GetTimestamp();
        await Tool.Succeed("nbdcopy", $"--connections={connections}", source, toNull ? "null:" : server.Uri);
        double seconds = Stopwatch.GetElapsedTime(start).TotalSeconds;
        cpu = server.CpuSeconds - cpu;
        return new Measurement(
            length / seconds / (1 << 20), 0, 0, cpu * 1e6 / (length / requestBytes), server.Kibibytes("VmHWM"));
    });
}
