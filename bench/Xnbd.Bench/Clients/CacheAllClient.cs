using System.Diagnostics;
using Xnbd.TestKit;

namespace Xnbd.Bench.Clients;

/// <summary>
/// Fetches everything into xNBD's cache. In the target mode, to compare: nbdcopy from the origin into a file on the
/// same file system.
/// </summary>
internal static class CacheAllClient
{
    private const int RequestBytes = 256 * 1024;

    public static async Task<ClientRun> Run(Job job)
    {
        RunningPeer server = job.Server;
        if (!server.Peer.IsOwn && !server.Peer.IsReference)
            throw new InvalidOperationException("it has no cache");
        double cpu = ProcessorTime.OfEndedChildren();
        long start = Stopwatch.GetTimestamp();
        if (server.Peer.IsOwn)
        {
            string program = Path.Combine(ServerProcess.BinFolder, "xnbd-bgctl");
            await Tool.Succeed(program, ["--cache-all", server.File(Peer.ControlSocket)], job.Stop);
        }
        else
        {
            await Tool.Succeed("nbdcopy", [server.Uri, server.File("copy")], job.Stop);
        }

        return new ClientRun(
            (double)job.Length / RequestBytes,
            job.Length,
            Stopwatch.GetElapsedTime(start).TotalSeconds,
            ProcessorTime.OfEndedChildren() - cpu);
    }
}
