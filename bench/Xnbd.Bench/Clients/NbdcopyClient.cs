using System.Diagnostics;
using Xnbd.TestKit;

namespace Xnbd.Bench.Clients;

/// <summary>nbdcopy, again and again until the time is over.</summary>
/// <param name="ToNull">It reads; else it writes what is in a file.</param>
/// <param name="Connections">Number of connections.</param>
/// <param name="Depth">Requests under way on each connection.</param>
internal sealed record NbdcopyClient(bool ToNull, int Connections, int Depth)
{
    /// <summary>The size of its requests.</summary>
    public const string Size = "256k";

    private const int RequestBytes = 256 * 1024;

    public async Task<ClientRun> Run(Job job)
    {
        string source = job.Image + ".source";
        if (!ToNull && !File.Exists(source))
            File.Copy(job.Image, source);
        string[] arguments =
        [
            $"--connections={Connections}", $"--requests={Depth}", $"--request-size={RequestBytes}",
            .. ToNull ? [job.Server.Uri, "null:"] : (string[])[source, job.Server.Uri],
        ];
        double cpu = ProcessorTime.OfEndedChildren();
        long start = Stopwatch.GetTimestamp();
        double bytes = 0;
        do
        {
            await Tool.Succeed("nbdcopy", arguments, job.Stop);
            bytes += job.Length;
        }
        while (Stopwatch.GetElapsedTime(start).TotalSeconds < job.Seconds);
        return new ClientRun(
            bytes / RequestBytes,
            bytes,
            Stopwatch.GetElapsedTime(start).TotalSeconds,
            ProcessorTime.OfEndedChildren() - cpu);
    }
}
