using System.Diagnostics;
using System.Globalization;
using System.Net.Sockets;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>
/// Clients come before the background copy: what they wait for while it runs, and what the copy takes, over a line with
/// a rate and a round-trip time. These tests measure, so they run alone.
/// </summary>
[CollectionDefinition(nameof(ClientFirstTests), DisableParallelization = true)]
[Collection(nameof(ClientFirstTests))]
public sealed class ClientFirstTests : IDisposable
{
    private const int Block = 4096;
    private const long Mbit = 1_000_000 / 8;

    private readonly TempFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    private static void Say(string text) => TestContext.Current.TestOutputHelper?.WriteLine(text);

    /// <summary>A disk of random bytes, the line to its server, and a proxy at the other end.</summary>
    private sealed class Setup : IDisposable
    {
        private readonly TempFolder _folder;
        private readonly ServerProcess _origin;

        public Setup(
            TempFolder folder,
            int mebibytes,
            long rate,
            double roundTripMs,
            int connections = 4,
            params string[] options)
        {
            _folder = folder;
            string image = folder.Random("origin.img", mebibytes << 20);
            _origin = ServerProcess.Start(folder, image, "--readonly");
            Line = new SlowLink(
                new UnixDomainSocketEndPoint(_origin.SocketPath), rate, TimeSpan.FromMilliseconds(roundTripMs));
            Proxy = Proxies.Start(
                folder,
                "127.0.0.1",
                Line.Port.ToString(CultureInfo.InvariantCulture),
                ["--remote-connections", connections.ToString(CultureInfo.InvariantCulture), .. options]);
            Control = Proxies.Socket(folder);
            Blocks = mebibytes << 20 >> 12;
            Wait.Until(() => Query("remote-connections") == connections, "all connections are made");
        }

        public SlowLink Line { get; }

        public ServerProcess Proxy { get; }

        public string Control { get; }

        public int Blocks { get; }

        public long Query(string name)
            => Proxies.Query(_folder).Result.GetProperty(name).GetInt64();

        public void Dispose()
        {
            Proxy.Dispose();
            Line.Dispose();
            _origin.Dispose();
        }
    }

    /// <summary>Latencies in milliseconds, sorted.</summary>
    private static double[] Measure(NbdTestClient client, IEnumerable<long> blocks)
    {
        var times = new List<double>();
        foreach (long block in blocks)
        {
            long start = Stopwatch.GetTimestamp();
            client.Read((ulong)(block * Block), Block);
            times.Add(Stopwatch.GetElapsedTime(start).TotalMilliseconds);
        }

        times.Sort();
        return [.. times];
    }

    private static double Part(double[] sorted, double part) => sorted[(int)((sorted.Length - 1) * part)];

    private static string Describe(double[] sorted)
        => string.Create(
            CultureInfo.InvariantCulture,
            $"p50 {Part(sorted, 0.5):0.0} ms, p99 {Part(sorted, 0.99):0.0} ms, max {sorted[^1]:0.0} ms");

    /// <summary>Blocks of the last quarter, far from each other and from what the copy reads at first.</summary>
    private static IEnumerable<long> Scattered(Setup setup, int count, int seed)
    {
        var random = new Random(seed);
        int quarter = setup.Blocks / 4;
        return Enumerable.Range(0, count).Select(i => setup.Blocks - quarter + (long)random.Next(quarter));
    }

    [Theory]
    [InlineData(1)]
    [InlineData(4)]
    public async Task Misses_wait_little_for_a_copy_that_is_under_way(int connections)
    {
        using var setup = new Setup(_folder, 256, 100 * Mbit, 20, connections);
        using NbdTestClient client = setup.Proxy.Open();
        double[] idle = Measure(client, Scattered(setup, 100, seed: 1));
        Say($"idle: {Describe(idle)}");
        client.Read(0, Block);
        double[] idleHits = Measure(client, Enumerable.Repeat(0L, 2000));
        await Tool.Succeed(Proxies.Control, "--cache-all", "--detach", setup.Control);
        Wait.Until(() => setup.Line.Bytes > 12 << 20, "the copy has found the rate: a second's worth");
        double[] hits = Measure(client, Enumerable.Repeat(0L, 5000));
        long before = setup.Line.Bytes, start = Stopwatch.GetTimestamp();
        double[] busy = Measure(client, Scattered(setup, 300, seed: 2));
        double rate = (setup.Line.Bytes - before) / Stopwatch.GetElapsedTime(start).TotalSeconds;
        Say($"copying: {Describe(busy)}; {rate / 1e6:0.0} MB/s meanwhile");
        Say($"hits: idle p99 {Part(idleHits, 0.99) * 1000:0} us, copying p99 {Part(hits, 0.99) * 1000:0} us");
        Assert.InRange(Part(busy, 0.5), 0, Part(idle, 0.5) + 20);
        Assert.InRange(Part(busy, 0.99), 0, 60);
    }

    /// <summary>The time of a copy over bytes by rate.</summary>
    private static async Task<double> Copy(Setup setup)
    {
        long start = Stopwatch.GetTimestamp();
        using var stop = new CancellationTokenSource(TimeSpan.FromMinutes(5));
        await Tool.Succeed(Proxies.Control, ["--cache-all", setup.Control], stop.Token);
        double seconds = Stopwatch.GetElapsedTime(start).TotalSeconds;
        return seconds / ((double)setup.Blocks * Block / setup.Line.BytesPerSecond);
    }

    [Theory]
    [InlineData(1)]
    [InlineData(4)]
    public async Task A_copy_fills_the_line(int connections)
    {
        using var setup = new Setup(_folder, 96, 100 * Mbit, 20, connections);
        double factor = await Copy(setup);
        Say($"{factor:0.000} times bytes by rate");
        Assert.InRange(factor, 0.9, 1.05);
    }

    /// <summary>
    /// A trace like that of a boot: small reads far from each other, one after the other, and work between them.
    /// </summary>
    private static double Replay(NbdTestClient client, int mebibytes)
    {
        var random = new Random(3);
        long start = Stopwatch.GetTimestamp();
        for (int i = 0; i < 150; i++)
        {
            uint length = (uint)random.Next(1, 17) * Block;
            client.Read((ulong)(random.NextInt64((mebibytes << 20) - length) / Block * Block), length);
            Thread.Sleep(5);
        }

        return Stopwatch.GetElapsedTime(start).TotalSeconds;
    }

    [Fact]
    public async Task A_recorded_boot_is_faster_the_next_time()
    {
        const int mebibytes = 96;
        string record = _folder.File("record");
        double cold, all, listed;
        using (var setup = new Setup(_folder, mebibytes, 100 * Mbit, 20, 4, "--record", record))
        {
            using NbdTestClient client = setup.Proxy.Open();
            cold = Replay(client, mebibytes);
            client.Disconnect();
            Assert.Equal(0, setup.Proxy.Stop()); // this writes the rest of the record
        }

        using (var setup = new Setup(_folder, mebibytes, 100 * Mbit, 20, 4, "--clear-bitmap"))
        {
            using NbdTestClient client = setup.Proxy.Open();
            await Tool.Succeed(Proxies.Control, "--cache-all", "--detach", setup.Control);
            all = Replay(client, mebibytes);
        }

        using (var setup = new Setup(_folder, mebibytes, 100 * Mbit, 20, 4, "--clear-bitmap"))
        {
            using NbdTestClient client = setup.Proxy.Open();
            await Tool.Succeed(Proxies.Control, "--prefetch", record, "--detach", setup.Control);
            listed = Replay(client, mebibytes);
        }

        Say(string.Create(
            CultureInfo.InvariantCulture,
            $"cold {cold:0.00} s, with --cache-all {all:0.00} s, with --prefetch {listed:0.00} s"));
        Assert.InRange(listed, 0, cold / 2);
        Assert.InRange(listed, 0, all);
    }

    /// <summary>Prints the table of docs/benchmarks.md; this takes minutes, and runs only if asked for.</summary>
    [Theory(Explicit = true)]
    [InlineData(100, 0)]
    [InlineData(100, 20)]
    [InlineData(100, 100)]
    [InlineData(100, 200)]
    [InlineData(1000, 0)]
    [InlineData(1000, 20)]
    [InlineData(1000, 100)]
    [InlineData(1000, 200)]
    public async Task Table(int megabits, int milliseconds)
    {
        using var setup = new Setup(_folder, megabits == 100 ? 250 : 1900, megabits * Mbit, milliseconds, 4);
        Say($"{megabits} Mbit/s {milliseconds} ms: {await Copy(setup):0.000}");
    }
}
