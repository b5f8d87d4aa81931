using System.Globalization;
using System.Runtime.InteropServices;

namespace Xnbd.Bench;

/// <summary>Processor time, user and system, in seconds.</summary>
internal static class ProcessorTime
{
    private const double TicksPerSecond = 100; // USER_HZ
    private const int OfEndedChildrenOfThisProcess = -1; // RUSAGE_CHILDREN
    private const int OfThisThread = 1; // RUSAGE_THREAD

    /// <summary>
    /// The time of a process and of its children. The kernel's clock of a process is exact, and includes threads that
    /// have ended. Children that have ended are in no clock: theirs is counted in ticks of 10 ms.
    /// </summary>
    public static double OfTree(int id)
    {
        while (true)
        {
            int[] before = [.. Tree(id)];
            double seconds = before.Sum(process => Clock(process) + OfEndedChildren(process));
            if (Tree(id).SequenceEqual(before))
                return seconds; // no child ended meanwhile, which would be counted twice, or not at all
        }
    }

    /// <summary>The time of all programs that this process started, and that have ended.</summary>
    public static double OfEndedChildren() => Usage(OfEndedChildrenOfThisProcess);

    /// <summary>The time of the thread that asks.</summary>
    public static double OfCurrentThread() => Usage(OfThisThread);

    /// <summary>A process, its children, their children, and so on.</summary>
    public static IEnumerable<int> Tree(int id)
    {
        var waiting = new Queue<int>([id]);
        while (waiting.TryDequeue(out int process))
        {
            yield return process;
            foreach (string child in ReadOrEmpty($"/proc/{process}/task/{process}/children").Split(
                ' ', StringSplitOptions.RemoveEmptyEntries))
                waiting.Enqueue(int.Parse(child, CultureInfo.InvariantCulture));
        }
    }

    /// <summary>A file of /proc; empty when its process has ended.</summary>
    public static string ReadOrEmpty(string path)
    {
        try
        {
            return File.ReadAllText(path);
        }
        catch (IOException)
        {
            return "";
        }
    }

    private static double Clock(int process)
    {
        int clock = (~process << 3) | 2; // as clock_getcpuclockid makes it
        return GetTime(clock, out Pair time) == 0 ? time.Seconds + (time.Rest / 1e9) : 0;
    }

    private static double OfEndedChildren(int process)
    {
        string[] words = ReadOrEmpty($"/proc/{process}/stat").Split(')')[^1]
            .Split(' ', StringSplitOptions.RemoveEmptyEntries);
        return words.Length < 15
            ? 0
            : words[13..15].Sum(ticks => double.Parse(ticks, CultureInfo.InvariantCulture)) / TicksPerSecond;
    }

    private static double Usage(int who)
    {
        _ = GetUsage(who, out ResourceUsage usage);
        return usage.User.Seconds + usage.System.Seconds + ((usage.User.Rest + usage.System.Rest) / 1e6);
    }

    [DllImport("libc", EntryPoint = "clock_gettime")]
    private static extern int GetTime(int clock, out Pair time);

    [DllImport("libc", EntryPoint = "getrusage")]
    private static extern int GetUsage(int who, out ResourceUsage usage);

    /// <summary>Seconds, and nanoseconds (timespec) or microseconds (timeval).</summary>
    [StructLayout(LayoutKind.Sequential)]
    private readonly struct Pair
    {
        public readonly long Seconds;
        public readonly long Rest;
    }

    [StructLayout(LayoutKind.Sequential, Size = 16 * sizeof(long) + 2 * 8 * sizeof(long))]
    private readonly struct ResourceUsage
    {
        public readonly Pair User;
        public readonly Pair System;
    }
}
