namespace Xnbd.Bench;

/// <summary>Where the image is and what state its cache is in.</summary>
public enum Medium
{
    /// <summary>In memory, on a tmpfs.</summary>
    Memory,

    /// <summary>In memory: 8 GiB, of which one part in 32 is data, in pieces of 4 MiB.</summary>
    SparseMemory,

    /// <summary>In memory: 8 GiB, of which every other block of 4 KiB is data.</summary>
    FragmentedMemory,

    /// <summary>The same on the disk's file system; what was just written is in the page cache.</summary>
    FragmentedDisk,

    /// <summary>On the disk's file system, and not in memory.</summary>
    ColdDisk,
}

/// <summary>What a client is run with.</summary>
/// <param name="Server">The server.</param>
/// <param name="Image">The image that the server serves.</param>
/// <param name="Seconds">How long the client runs.</param>
/// <param name="Stop">When it is to end at once.</param>
public sealed record Job(RunningPeer Server, string Image, double Seconds, CancellationToken Stop)
{
    public long Length => new FileInfo(Image).Length;
}

/// <summary>What a client did.</summary>
/// <param name="Requests">Requests that it sent.</param>
/// <param name="Bytes">Bytes that it read or wrote.</param>
/// <param name="Seconds">The time that passed.</param>
/// <param name="CpuSeconds">Processor time of the client.</param>
/// <param name="P50">Median latency in microseconds; NaN when the client does not tell.</param>
/// <param name="P99">99th percentile of the latency in microseconds; NaN when the client does not tell.</param>
public sealed record ClientRun(
    double Requests, double Bytes, double Seconds, double CpuSeconds, double P50 = double.NaN, double P99 = double.NaN)
{
    /// <summary>
    /// Processor time of the server meanwhile. Null: it is that of the client's whole life. NaN: it says nothing.
    /// </summary>
    public double? ServerCpuSeconds { get; init; }

    /// <summary>Requests of the slowest connection, divided by the median of all; NaN when nobody counts.</summary>
    public double SlowestToMedian { get; init; } = double.NaN;

    /// <summary>What another client read meanwhile, in MiB a second; NaN when there is none.</summary>
    public double RateBeside { get; init; } = double.NaN;
}

/// <summary>Something that a client does with a server.</summary>
/// <param name="Name">Its name in the tables.</param>
/// <param name="Mode">The mode of the servers that run it.</param>
/// <param name="Size">The size of its requests, such as 4k; empty when that says nothing.</param>
/// <param name="Run">Runs the client.</param>
public sealed record Workload(string Name, Mode Mode, string Size, Func<Job, Task<ClientRun>> Run)
{
    public const string UnitOfRequests = "IOPS";

    public const string UnitOfBytes = "MiB/s";

    public Medium Medium { get; init; }

    /// <summary>Part of the short form.</summary>
    public bool IsQuick { get; init; }

    /// <summary>It is also run over a pair of virtual network cards.</summary>
    public bool IsOverVeth { get; init; }

    /// <summary>The whole disk is written before the run.</summary>
    public bool IsFilled { get; init; }

    /// <summary>
    /// A layer or a cache is written. So that it can be compared, the target mode begins with an empty sparse image.
    /// </summary>
    public bool IsOfFreshFile { get; init; }

    /// <summary>Of a mixed load: the small readers alone.</summary>
    public Workload? Alone { get; init; }

    /// <summary>The unit of the rate.</summary>
    public string Unit { get; init; } = UnitOfRequests;

    /// <summary>Whether a server can run it.</summary>
    public Predicate<Peer> Suits { get; init; } = _ => true;

    /// <summary>Whether it is run over a transport.</summary>
    public bool RunsOver(Transport transport) => transport != Transport.Veth || IsOverVeth;
}
