using System.Diagnostics;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>
/// What the program costs: the time of a start, memory, threads. No other test of this process runs beside these, since
/// they measure.
/// </summary>
[CollectionDefinition(nameof(FootprintTests), DisableParallelization = true)]
[Collection(nameof(FootprintTests))]
public sealed class FootprintTests : IDisposable
{
    private readonly TempFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [Fact]
    public void It_listens_soon_and_is_small_when_idle()
    {
        string image = _folder.Sparse("disk.img", 1 << 30);
        var times = new List<double>();
        for (int i = 0; i < 9; i++)
        {
            string socket = _folder.File($"s{i}");
            long start = Stopwatch.GetTimestamp();
            using Process server = Process.Start(
                new ProcessStartInfo(ServerProcess.Executable, ["--target", "--unix", socket, image])
                {
                    RedirectStandardError = true,
                })!;
            while (!File.Exists(socket))
                Thread.SpinWait(100);
            times.Add(Stopwatch.GetElapsedTime(start).TotalMilliseconds);
            Wait.Until(() => Record.Exception(() => NbdTestClient.Open(socket).Dispose()) is null, "it answers");
            Assert.InRange(ServerProcess.ProcStatus(server.Id, "VmRSS"), 1, 32 * 1024);
            server.Kill();
            server.WaitForExit();
        }

        // What other processes of the machine take only adds: the fastest start is nearest to the program's own time.
        TestContext.Current.TestOutputHelper?.WriteLine($"{string.Join(' ', times.Order().Select(t => $"{t:F0}"))} ms");
        Assert.InRange(times.Min(), 0, 50);
    }

    [Fact]
    public void A_thousand_idle_clients_cost_little()
    {
        string image = _folder.Random("disk.img", 1 << 20);
        using ServerProcess server = ServerProcess.Start(_folder, image);
        var clients = new List<NbdTestClient>();
        try
        {
            for (int i = 0; i < 1000; i++)
            {
                clients.Add(server.Open());
                Assert.Equal(4096, clients[i].Read((ulong)i, 4096).Length); // each has sent a request
            }

            Thread.Sleep(200);
            long kibibytes = server.Status("VmRSS");
            TestContext.Current.TestOutputHelper?.WriteLine(
                $"1,000 idle clients: {kibibytes} KiB, {server.Status("Threads")} threads");
            Assert.InRange(kibibytes, 1, 64 * 1024);
            Assert.InRange(server.OpenDescriptors, 1000, 1050); // one for each client
            Assert.Equal(16, clients[500].Read(0, 16).Length);
        }
        finally
        {
            clients.ForEach(c => c.Dispose());
        }

        Wait.Until(() => server.Status("Threads") < 40, "their threads have ended");
    }
}
