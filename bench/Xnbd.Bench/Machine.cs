using System.Diagnostics;
using System.Globalization;
using System.Text.RegularExpressions;
using Xnbd.TestKit;

namespace Xnbd.Bench;

/// <summary>The machine and the programs to which the figures belong.</summary>
/// <param name="Processor">The processor's model.</param>
/// <param name="Processors">Their number.</param>
/// <param name="Kernel">The kernel's release.</param>
/// <param name="CopyRate">Bytes that one thread copies from memory to memory, in GiB a second.</param>
/// <param name="Versions">The versions of servers and clients.</param>
internal sealed partial record Machine(
    string Processor, int Processors, string Kernel, double CopyRate, IReadOnlyDictionary<string, string> Versions)
{
    private const int CopyBytes = 64 << 20; // more than what caches hold
    private const int Copies = 16;

    private static readonly string[] s_clients = ["fio", "qemu-img", "nbdcopy"];

    /// <summary>Looks at this machine.</summary>
    /// <param name="programs">The servers.</param>
    public static async Task<Machine> Read(IEnumerable<string> programs)
    {
        var versions = new SortedDictionary<string, string>(StringComparer.Ordinal);
        foreach (string program in programs.Concat(s_clients).Distinct())
            versions[Path.GetFileName(program)] = await Version(program);
        string model = File.ReadLines("/proc/cpuinfo")
            .FirstOrDefault(line => line.StartsWith("model name", StringComparison.Ordinal)) ?? ": unknown";
        return new Machine(
            model.Split(':', 2)[1].Trim(),
            Environment.ProcessorCount,
            File.ReadAllText("/proc/sys/kernel/osrelease").Trim(),
            MeasureCopyRate(),
            versions);
    }

    private static async Task<string> Version(string program)
    {
        ToolResult result = await Tool.Run(program, program == "nbd-server" ? "-V" : "--version");
        return Number().Match(result.Output + result.Errors) is { Success: true } match ? match.Value : "unknown";
    }

    private static double MeasureCopyRate()
    {
        byte[] from = new byte[CopyBytes], to = new byte[CopyBytes];
        Array.Fill(from, (byte)1);
        double best = double.MaxValue;
        for (int i = 0; i < Copies; i++)
        {
            long start = Stopwatch.GetTimestamp();
            Buffer.BlockCopy(from, 0, to, 0, CopyBytes);
            best = Math.Min(best, Stopwatch.GetElapsedTime(start).TotalSeconds);
        }

        return CopyBytes / best / (1 << 30);
    }

    public override string ToString() => string.Create(
        CultureInfo.InvariantCulture,
        $"{Processor}, {Processors} processors, Linux {Kernel}, memory to memory {CopyRate:0.0} GiB/s; "
            + $"{string.Join(", ", Versions.Select(version => $"{version.Key} {version.Value}"))}.");

    [GeneratedRegex(@"[0-9]+(\.[0-9]+)+")]
    private static partial Regex Number();
}
