using System.Diagnostics;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>
/// A layer and a proxy of a disk of 16 TiB: the time of a start and the memory are those of what is used. No other test
/// of this process runs beside these, since they measure.
/// </summary>
[Collection(nameof(FootprintTests))]
public sealed class BigDiskTests : IDisposable
{
    private const int Starts = 3; // the fastest counts: other processes of the machine only add
    private const int Writes = 500; // scattered: most of them have a page of the map each
    private const int Block = 4096;
    private const long MaxResidentKibibytes = 64 * 1024;

    private readonly TempFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    /// <summary>Earlier versions took 700 ms for each start, and 3 GB of the file system for a new map.</summary>
    [Theory]
    [InlineData("layer")]
    [InlineData("proxy")]
    public async Task It_starts_as_soon_as_on_a_small_disk_and_takes_memory_for_what_is_used(string kind)
    {
        using TmpfsMount memory = await TmpfsMount.Create(_folder, "256m"); // ext4 has no files of this length
        (double smallNew, double smallAgain, _) = Measure("small", 64L << 20);
        (double bigNew, double bigAgain, long kibibytes) = Measure("big", 16L << 40);
        TestContext.Current.TestOutputHelper?.WriteLine(
            $"{kind}: new {bigNew:F0} ms (small disk {smallNew:F0} ms), after a kill {bigAgain:F0} ms"
            + $" (small disk {smallAgain:F0} ms), {kibibytes} KiB");
        Assert.InRange(bigNew, 0, (3 * smallNew) + 100);
        Assert.InRange(bigAgain, 0, (3 * smallAgain) + 100);
        Assert.InRange(kibibytes, 1, MaxResidentKibibytes);

        // Milliseconds of a start with new files, of a start after a kill, and the resident size after some use.
        (double New, double Again, long Kibibytes) Measure(string name, long length)
        {
            string image = memory.File(name);
            using (FileStream file = File.Create(image))
                file.SetLength(length);
            using ServerProcess? origin = kind == "proxy" ? ServerProcess.Start(_folder, image, "--readonly") : null;
            double fresh = double.MaxValue, again = double.MaxValue;
            for (int i = 0; i < Starts; i++)
            {
                using ServerProcess server = Start($"{name}{i}", ref fresh);
                server.Kill();
            }

            string used = $"{name}0"; // its first start is over, and nothing was written
            double ignored = double.MaxValue;
            long resident;
            using (ServerProcess server = Start(used, ref ignored))
            {
                using NbdTestClient client = server.Open();
                foreach ((ulong offset, byte[] data) in Changes(length))
                    client.Write(offset, data);
                resident = server.Status("VmRSS");
                server.Kill();
            }

            for (int i = 0; i < Starts; i++)
            {
                using ServerProcess server = Start(used, ref again);
                using NbdTestClient client = server.Open();
                foreach ((ulong offset, byte[] data) in Changes(length))
                    Assert.Equal(data, client.Read(offset, Block));
                resident = Math.Max(resident, server.Status("VmRSS"));
                server.Kill();
            }

            return (fresh, again, resident);

            ServerProcess Start(string files, ref double fastest)
            {
                string socket = _folder.File("s" + Guid.NewGuid().ToString("N")[..6]);
                string[] args = origin is null
                    ? ["--cow-target", "--unix", socket, "--cow-layer", memory.File(files + ".layer"), image]
                    :
                    [
                        "--proxy", "--unix", socket, "unix:" + origin.SocketPath, "-", memory.File(files + ".cache"),
                        memory.File(files + ".map"), _folder.File(files + ".control"),
                    ];
                long start = Stopwatch.GetTimestamp();
                ServerProcess server = ServerProcess.Start(socket, args);
                server.Open().Dispose();
                fastest = Math.Min(fastest, Stopwatch.GetElapsedTime(start).TotalMilliseconds);
                return server;
            }
        }
    }

    /// <summary>Writes of whole blocks, all over the disk; those of one offset have the same data.</summary>
    private static IEnumerable<(ulong Offset, byte[] Data)> Changes(long length)
    {
        var random = new Random(1);
        for (int i = 0; i < Writes; i++)
        {
            long offset = random.NextInt64(length / Block) * Block;
            byte[] data = new byte[Block];
            new Random((int)(offset % int.MaxValue)).NextBytes(data);
            yield return ((ulong)offset, data);
        }
    }
}
