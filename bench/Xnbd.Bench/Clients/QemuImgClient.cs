using System.Globalization;
using System.Text.RegularExpressions;
using Xnbd.TestKit;

namespace Xnbd.Bench.Clients;

/// <summary>
/// QEMU's own client, with which most disks are used: qemu-img bench, which reads or writes in sequence.
/// </summary>
/// <param name="IsWrite">It writes.</param>
/// <param name="Size">The size of a request, in QEMU's notation.</param>
/// <param name="RequestBytes">The same in bytes.</param>
/// <param name="Depth">Requests under way.</param>
internal sealed partial record QemuImgClient(bool IsWrite, string Size, long RequestBytes, int Depth)
{
    private const int FirstRequests = 500;

    public async Task<ClientRun> Run(Job job)
    {
        // It takes a number of requests, not a time: a short run tells how many fit.
        double first = await Seconds(job, FirstRequests);
        int requests = Math.Max(FirstRequests, (int)(FirstRequests / Math.Max(first, 0.001) * job.Seconds));
        double cpu = ProcessorTime.OfEndedChildren();
        double seconds = await Seconds(job, requests);
        return new ClientRun(
            requests, (double)requests * RequestBytes, seconds, ProcessorTime.OfEndedChildren() - cpu);
    }

    private async Task<double> Seconds(Job job, int requests)
    {
        string output = await Tool.Succeed(
            "qemu-img",
            [
                "bench", "-f", "raw", "-c", requests.ToString(CultureInfo.InvariantCulture), "-s", Size,
                "-d", Depth.ToString(CultureInfo.InvariantCulture), .. IsWrite ? (string[])["-w"] : [], job.Server.Uri,
            ],
            job.Stop);
        return double.Parse(Completed().Match(output).Groups[1].Value, CultureInfo.InvariantCulture);
    }

    [GeneratedRegex(@"completed in ([0-9.]+) seconds")]
    private static partial Regex Completed();
}
