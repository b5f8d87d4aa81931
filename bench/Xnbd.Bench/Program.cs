using System.Globalization;
using System.Text.Json;
using Xnbd.Bench;
using Xnbd.TestKit;

// xNBD and its peers side by side: see script/bench and docs/benchmarks.md.
BenchOptions? options = BenchOptions.Parse(args, out string? fault);
if (options is null)
{
    if (fault is not null)
        Console.Error.WriteLine(fault);
    (fault is null ? Console.Out : Console.Error).WriteLine(BenchOptions.Usage);
    return fault is null ? 0 : 2;
}

bool isQuick = options.IsQuick;
string? only = options.Only;
int rounds = options.Rounds;
double seconds = options.Seconds;
using var memory = new TempFolder("/dev/shm");
using var disk = new TempFolder(options.Disk ?? Path.Combine(Repository.Root, "out"));
string warmImage = memory.Random("image", 512 << 20);
string coldImage = "", sparseImage = "";

Peer[] present = [.. Peer.All.Where(p => p.IsPresent)];
foreach (Peer absent in Peer.All.Except(present))
    Console.Error.WriteLine($"absent: {absent.Name}");
Peer[] PeersOf(Workload workload) => [.. present.Where(p => p.Mode == workload.Mode)];
bool IsChosen(Workload workload)
    => (!isQuick || workload.IsQuick) && (only is null || workload.Name.Contains(only, StringComparison.Ordinal));
Workload[] workloads = [.. Workload.All.Where(IsChosen)];

// Round by round, workload by workload, server by server: a drift of the machine hits all.
var results = new Dictionary<(Workload, Peer), List<Measurement>>();
for (int round = 0; round < rounds; round++)
{
    foreach (Workload workload in workloads)
    {
        Peer[] peers = PeersOf(workload);
        for (int i = 0; i < peers.Length; i++)
        {
            Peer peer = peers[(i + round) % peers.Length];
            if (!Console.IsErrorRedirected)
                Console.Error.Write($"\r\e[Kround {round + 1} of {rounds}: {workload.Name}: {peer.Name}");
            string image = workload.Medium switch
            {
                Medium.Memory => warmImage,
                Medium.SparseMemory => SparseImage(),
                _ => await ColdImage(),
            };
            try
            {
                using var files = new TempFolder("/dev/shm"); // a layer, an overlay: new for each run
                if (workload.IsOfFreshFile && peer.IsReference)
                    image = files.Sparse("empty", new FileInfo(image).Length);
                using ServerProcess? origin = workload.Mode == Mode.Proxy
                    ? ServerProcess.Start(
                        Peer.Origin(files.Path),
                        ["--target", "--readonly", "--logpath", "/dev/null", "--unix", Peer.Origin(files.Path), image])
                    : null;
                using RunningPeer server = RunningPeer.Start(peer, image, files.Path);
                Measurement measurement = await workload.Run(server, image, seconds);
                if (!results.TryGetValue((workload, peer), out List<Measurement>? list))
                    results.Add((workload, peer), list = []);
                list.Add(measurement);
            }
            catch (InvalidOperationException failure)
            {
                Console.Error.WriteLine($"\n{peer.Name}, {workload.Name}: {failure.Message.Split('\n')[0]}");
            }
        }
    }
}

Dictionary<Peer, double[]> idle = only is null ? MeasureIdle() : [];
if (!Console.IsErrorRedirected)
    Console.Error.Write("\r\e[K");
if (options.IsJson)
    PrintJson();
else
    PrintTable();
return 0;

string SparseImage()
{
    if (sparseImage.Length > 0)
        return sparseImage;
    const int piece = 4 << 20, pieces = 64, each = 32;
    sparseImage = memory.Sparse("sparse", (long)piece * pieces * each);
    byte[] data = new byte[piece];
    new Random(1).NextBytes(data);
    using FileStream file = File.OpenWrite(sparseImage);
    for (int i = 0; i < pieces; i++)
    {
        file.Position = (long)piece * each * i;
        file.Write(data);
    }

    return sparseImage;
}

async Task<string> ColdImage()
{
    if (coldImage.Length == 0)
    {
        coldImage = disk.Random("image", 1 << 30);
        await Tool.Succeed("sync", coldImage);
    }

    await Tool.Succeed("dd", $"if={coldImage}", "iflag=nocache", "count=0", "status=none");
    return coldImage;
}

// Start-up, idle size, and the cost of 1,000 clients that wait.
Dictionary<Peer, double[]> MeasureIdle()
{
    const int clients = 1000;
    var figures = new Dictionary<Peer, double[]>();
    foreach (Peer peer in present.Where(p => p.Mode == Mode.Target))
    {
        var starts = new List<double>();
        for (int i = 0; i < (isQuick ? 3 : 7); i++)
        {
            using RunningPeer once = RunningPeer.Start(peer, warmImage, memory.Path);
            starts.Add(once.StartMilliseconds);
        }

        using RunningPeer server = RunningPeer.Start(peer, warmImage, memory.Path);
        double alone = server.Kibibytes("VmRSS");
        var connections = new List<NbdTestClient>();
        double crowded;
        try
        {
            for (int i = 0; i < clients; i++)
                connections.Add(NbdTestClient.Open(server.Socket, structured: false, server.ExportName));
            crowded = server.Kibibytes("VmRSS");
        }
        catch (Exception failure) when (failure is IOException or System.Net.Sockets.SocketException)
        {
            crowded = double.NaN; // it does not accept so many
        }
        finally
        {
            connections.ForEach(c => c.Dispose());
        }

        figures.Add(peer, [Median(starts), alone / 1024, crowded / 1024]);
    }

    return figures;
}

static double Median(IEnumerable<double> values)
{
    double[] sorted = [.. values.Order()];
    return sorted.Length == 0
        ? double.NaN
        : sorted.Length % 2 == 1
            ? sorted[sorted.Length / 2]
            : (sorted[(sorted.Length / 2) - 1] + sorted[sorted.Length / 2]) / 2;
}

Measurement? MedianOf(Workload workload, Peer peer)
    => results.TryGetValue((workload, peer), out List<Measurement>? list)
    ? new Measurement(
        Median(list.Select(m => m.Rate)), Median(list.Select(m => m.P50)), Median(list.Select(m => m.P99)),
        Median(list.Select(m => m.CpuMicroseconds)), Median(list.Select(m => m.PeakKibibytes)))
    : null;

void PrintTable()
{
    Console.WriteLine($"Medians of {rounds} rounds of {seconds:0.#} s, {Environment.ProcessorCount} processors.\n");
    Console.WriteLine("| workload | server | rate | p50 us | p99 us | server CPU us/request | peak MiB |");
    Console.WriteLine("|---|---|---:|---:|---:|---:|---:|");
    foreach (Workload workload in workloads)
    {
        string name = workload.Name;
        foreach (Peer peer in PeersOf(workload))
        {
            if (MedianOf(workload, peer) is not { } m)
                continue;
            string latency = m.P50 == 0
                ? "| | "
                : string.Create(CultureInfo.InvariantCulture, $"| {m.P50:0} | {m.P99:0} ");
            Console.WriteLine(string.Create(
                CultureInfo.InvariantCulture,
                $"| {name} | {peer.Name} | {m.Rate:#,0} {workload.Unit} {latency}| {m.CpuMicroseconds:0.0} "
                    + $"| {m.PeakKibibytes / 1024:0} |"));
            name = "";
        }
    }

    Console.WriteLine("\n| workload | best peer | xnbd : best peer | CPU per request : its | p99 : its |");
    Console.WriteLine("|---|---|---:|---:|---:|");
    foreach (Workload workload in workloads)
    {
        if (Ratio(workload) is not { } ratio)
            continue;
        string p99 = double.IsNaN(ratio.P99) ? "" : ratio.P99.ToString("0.00", CultureInfo.InvariantCulture);
        Console.WriteLine(string.Create(
            CultureInfo.InvariantCulture,
            $"| {workload.Name} | {ratio.Best.Name} | {ratio.Rate:0.00} | {ratio.Cpu:0.00} | {p99} |"));
    }

    (Workload Workload, double Ratio)[] references =
        [.. workloads.Where(w => OfTarget(w) is not null).Select(w => (w, OfTarget(w)!.Value))];
    if (references.Length > 0)
    {
        Console.WriteLine("\n| workload | xnbd : its own target mode |\n|---|---:|");
        foreach ((Workload workload, double ratio) in references)
            Console.WriteLine(string.Create(CultureInfo.InvariantCulture, $"| {workload.Name} | {ratio:0.00} |"));
    }

    if (idle.Count == 0)
        return;
    Console.WriteLine("\n| server | start to first connection, ms | idle, MiB | with 1,000 idle clients, MiB |");
    Console.WriteLine("|---|---:|---:|---:|");
    foreach ((Peer peer, double[] figures) in idle)
        Console.WriteLine(
            string.Create(
                CultureInfo.InvariantCulture,
                $"| {peer.Name} | {figures[0]:0.0} | {figures[1]:0.0} | {figures[2]:0.0} |"));
}

(Peer Best, double Rate, double Cpu, double P99)? Ratio(Workload workload)
{
    Peer[] peers = PeersOf(workload);
    if (MedianOf(workload, peers.First(p => p.IsOwn)) is not { } own)
        return null;
    (Peer Peer, Measurement M)[] others =
        [
            .. peers.Where(p => !p.IsOwn && !p.IsReference)
                .Select(p => (p, MedianOf(workload, p)))
                .Where(p => p.Item2 is not null)!
        ];
    if (others.Length == 0)
        return null;
    (Peer best, Measurement m) = others.MaxBy(o => o.M.Rate);
    return (
        best, own.Rate / m.Rate, own.CpuMicroseconds / m.CpuMicroseconds, m.P99 == 0 ? double.NaN : own.P99 / m.P99);
}

// The rate in this mode to the rate in the target mode.
double? OfTarget(Workload workload)
{
    Peer[] peers = PeersOf(workload);
    return peers.FirstOrDefault(p => p.IsReference) is { } reference && MedianOf(workload, reference) is { } target
        && MedianOf(workload, peers.First(p => p.IsOwn)) is { } own ? own.Rate / target.Rate : null;
}

void PrintJson()
{
    using var writer = new Utf8JsonWriter(Console.OpenStandardOutput(), new JsonWriterOptions { Indented = true });
    writer.WriteStartObject();
    writer.WriteNumber("rounds", rounds);
    writer.WriteNumber("seconds", seconds);
    writer.WriteStartArray("workloads");
    foreach (Workload workload in workloads)
    {
        writer.WriteStartObject();
        writer.WriteString("name", workload.Name);
        writer.WriteString("unit", workload.Unit);
        if (Ratio(workload) is { } ratio)
        {
            writer.WriteString("best_peer", ratio.Best.Name);
            writer.WriteNumber("ratio", Math.Round(ratio.Rate, 3));
            writer.WriteNumber("cpu_ratio", Math.Round(ratio.Cpu, 3));
        }

        if (OfTarget(workload) is { } ofTarget)
            writer.WriteNumber("target_mode_ratio", Math.Round(ofTarget, 3));

        writer.WriteStartObject("servers");
        foreach (Peer peer in PeersOf(workload))
        {
            if (MedianOf(workload, peer) is not { } m)
                continue;
            writer.WriteStartObject(peer.Name);
            writer.WriteNumber("rate", Math.Round(m.Rate, 1));
            writer.WriteNumber("p50_us", Math.Round(m.P50, 1));
            writer.WriteNumber("p99_us", Math.Round(m.P99, 1));
            writer.WriteNumber("cpu_us_per_request", Math.Round(m.CpuMicroseconds, 3));
            writer.WriteNumber("peak_kib", m.PeakKibibytes);
            writer.WriteEndObject();
        }

        writer.WriteEndObject();
        writer.WriteEndObject();
    }

    writer.WriteEndArray();
    writer.WriteStartObject("idle");
    foreach ((Peer peer, double[] figures) in idle)
    {
        writer.WriteStartObject(peer.Name);
        writer.WriteNumber("start_ms", Math.Round(figures[0], 2));
        writer.WriteNumber("idle_mib", Math.Round(figures[1], 1));
        if (!double.IsNaN(figures[2]))
            writer.WriteNumber("idle_1000_clients_mib", Math.Round(figures[2], 1));
        writer.WriteEndObject();
    }

    writer.WriteEndObject();
    writer.WriteEndObject();
}
