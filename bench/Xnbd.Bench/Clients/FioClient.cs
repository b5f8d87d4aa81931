using System.Diagnostics;
using System.Globalization;
using System.Text.Json;
using Xnbd.TestKit;

namespace Xnbd.Bench.Clients;

/// <summary>fio, whose connections are threads of one process.</summary>
/// <param name="Pattern">What it does, in fio's words.</param>
/// <param name="Size">The size of a request, in fio's notation.</param>
/// <param name="Connections">Number of connections.</param>
/// <param name="Depth">Requests under way on each connection.</param>
internal sealed record FioClient(string Pattern, string Size, int Connections, int Depth)
{
    /// <summary>fio's own start and end take less than this.</summary>
    private const double SetUpSeconds = 0.5;

    /// <summary>Each block is touched once; the run ends with the disk, if not before.</summary>
    public bool IsOnce { get; init; }

    /// <summary>
    /// Another load at the same time. Then rate and latency are those of this one, and processor time says nothing.
    /// </summary>
    public FioClient? Beside { get; init; }

    /// <summary>Requests a second; 0 for as many as possible.</summary>
    public int RequestsPerSecond { get; init; }

    /// <summary>Writes the whole disk.</summary>
    public static Task Fill(Job job) => Tool.Succeed(
        "fio",
        [
            "--name=fill", "--ioengine=nbd", $"--uri={job.Server.Uri}", "--rw=write", "--bs=1m", "--iodepth=4",
            "--thread", $"--size={job.Length}",
        ],
        job.Stop);

    public async Task<ClientRun> Run(Job job)
    {
        long start = Stopwatch.GetTimestamp();
        string[] arguments = [.. Arguments(job), .. Beside is null ? [] : Beside.Arguments(job)];
        string output = await Tool.Succeed("fio", ["--output-format=json", .. arguments], job.Stop);
        double wall = Stopwatch.GetElapsedTime(start).TotalSeconds;
        using JsonDocument document = JsonDocument.Parse(output[output.IndexOf('{', StringComparison.Ordinal)..]);
        JsonElement groups = document.RootElement.GetProperty("jobs");
        ClientRun run = Read(groups[0], wall);
        if (Beside is null)
            return run;
        ClientRun other = Read(groups[1], wall);
        return run with
        {
            CpuSeconds = double.NaN,
            ServerCpuSeconds = double.NaN,
            RateBeside = other.Bytes / (1 << 20) / other.Seconds,
        };
    }

    private IEnumerable<string> Arguments(Job job)
    {
        bool isParted = Pattern is "read" or "write" && Connections > 1; // each connection has a part of the disk
        long length = isParted ? job.Length / Connections : job.Length;
        string milliseconds = (job.Seconds * 1000).ToString("0", CultureInfo.InvariantCulture);
        List<string> arguments =
        [
            "--name=bench", "--ioengine=nbd", $"--uri={job.Server.Uri}", $"--rw={Pattern}", $"--bs={Size}",
            $"--iodepth={Depth}", $"--numjobs={Connections}", "--thread", "--new_group",
            "--group_reporting", $"--size={length}",
            $"--runtime={milliseconds}ms", // of a fraction of a second it takes no notice
            "--randrepeat=1",
        ];
        if (isParted)
            arguments.Add($"--offset_increment={length}");
        if (!IsOnce)
            arguments.Add("--time_based");
        if (RequestsPerSecond > 0)
            arguments.Add($"--rate_iops={RequestsPerSecond}");
        if (Size == "512")
        {
            // once: a part of each block
            arguments.AddRange(IsOnce ? ["--blockalign=4k"] : ["--blockalign=512", "--norandommap"]);
        }

        return arguments;
    }

    private static ClientRun Read(JsonElement group, double wall)
    {
        JsonElement[] sides = [group.GetProperty("read"), group.GetProperty("write")];

        // fio counts each job from that job's own start. If a server lets jobs wait for their connections, the run
        // takes far longer than fio says. Then the rate is that of the time that really passed.
        double time = Math.Max(sides.Max(side => Figure(side, "runtime")) / 1000, wall - SetUpSeconds);

        // fio counts the threads' own time, without that of its start, which is 0.2 s.
        double cpu = (Figure(group, "usr_cpu") + Figure(group, "sys_cpu")) / 100 * Figure(group, "job_runtime") / 1000;
        return new ClientRun(
            sides.Sum(side => Figure(side, "total_ios")),
            sides.Sum(side => Figure(side, "io_bytes")),
            time,
            cpu,
            sides.Max(side => Percentile(side, "50.000000")),
            sides.Max(side => Percentile(side, "99.000000")));
    }

    private static double Figure(JsonElement element, string name) => element.GetProperty(name).GetDouble();

    private static double Percentile(JsonElement side, string name)
        => side.GetProperty("clat_ns").TryGetProperty("percentile", out JsonElement percentiles)
            ? Figure(percentiles, name) / 1000
            : 0;
}
