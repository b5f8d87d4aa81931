using System.Diagnostics;
using Xnbd.TestKit;

namespace Xnbd.Bench.Clients;

/// <summary>Asks for the block status of the whole disk, from its begin again until the time is over.</summary>
internal static class BlockStatusClient
{
    private const uint MaxLength = 1 << 30; // of one request

    public static Task<ClientRun> Run(Job job) => Task.Run(() =>
    {
        using NbdTestClient client = NbdTestClient.Open(
            job.Server.Endpoint.Remote, structured: true, job.Server.Peer.ExportName, "base:allocation");
        double cpu = ProcessorTime.OfCurrentThread(), serverCpu = job.Server.CpuSeconds;
        long start = Stopwatch.GetTimestamp();
        double requests = 0, bytes = 0;
        ulong offset = 0;
        while (Stopwatch.GetElapsedTime(start).TotalSeconds < job.Seconds)
        {
            job.Stop.ThrowIfCancellationRequested();
            var found = client.BlockStatus(offset, (uint)Math.Min(MaxLength, client.Size - offset));
            ulong told = (ulong)found.Sum(extent => extent.Length);
            requests++;
            bytes += told;
            offset += told;
            if (offset >= client.Size)
                offset = 0;
        }

        return new ClientRun(
            requests,
            bytes,
            Stopwatch.GetElapsedTime(start).TotalSeconds,
            ProcessorTime.OfCurrentThread() - cpu)
        {
            ServerCpuSeconds = job.Server.CpuSeconds - serverCpu,
        };
    });
}
