using System.Globalization;
using Xnbd.Bench.Clients;

namespace Xnbd.Bench;

/// <summary>The matrix of what is measured.</summary>
internal static class Workloads
{
    /// <summary>The sizes of requests, in fio's notation.</summary>
    public static readonly string[] Sizes = ["512", "4k", "16k", "64k", "256k", "1m"];

    /// <summary>
    /// A row for each pattern and size, and in it "connections x depth" of each workload. Letters after it: <c>q</c>,
    /// it is also in the short form; <c>v</c>, it is also run over a pair of virtual network cards.
    /// </summary>
    public static readonly IReadOnlyList<Workload> All =
    [
        .. Fio("randread", "512", "1x32"),
        .. Fio("randread", "4k", "1x1qv 1x8 1x32 4x16qv"),
        .. Fio("randread", "16k", "1x1 1x16"),
        .. Fio("randread", "64k", "1x1 1x8qv 4x8"),
        .. Fio("randread", "256k", "1x8"),
        .. Fio("randread", "1m", "1x4"),
        .. Fio("read", "4k", "1x32"),
        .. Fio("read", "16k", "1x32"),
        .. Fio("read", "64k", "1x16qv 4x4"),
        .. Fio("read", "256k", "1x16qv 4x4"),
        .. Fio("read", "1m", "1x8qv 4x2"),
        .. Fio("randwrite", "512", "1x32"),
        .. Fio("randwrite", "4k", "1x1 1x32 4x16qv"),
        .. Fio("randwrite", "16k", "1x16"),
        .. Fio("randwrite", "64k", "1x8"),
        .. Fio("write", "64k", "1x16q 4x4"),
        .. Fio("write", "256k", "1x16qv"),
        .. Fio("write", "1m", "1x8"),
        .. Fio("randrw", "4k", "4x16"),
        OneHundredASecond(),

        .. QemuImg("read", "4k", "1x16"),
        .. QemuImg("read", "64k", "1x16q"),
        .. QemuImg("write", "64k", "1x16"),
        .. Nbdcopy("to null", "1x64 4x64"),
        .. Nbdcopy("from a file", "1x64 4x64"),

        .. Cold("randread", "4k", "1x1 1x32"),
        .. Cold("read", "256k", "1x16"),

        .. Fragmented("tmpfs", Medium.FragmentedMemory),
        .. Fragmented("disk", Medium.FragmentedDisk),

        .. ManyConnections("64x1 256x1q 1000x1"),
        .. Mixed(),

        .. Cow("of the base", "randread", "4k", "1x32"),
        .. Cow("of the base", "randread", "64k", "1x8q"),
        .. Cow("of the base", "read", "64k", "1x16"),
        .. Cow("of the base", "read", "256k", "1x16"),
        .. Cow("of the base", "read", "1m", "1x8"),
        .. Cow("of the layer", "randread", "4k", "1x32"),
        .. Cow("of the layer", "randread", "64k", "1x8"),
        .. Cow("of the layer", "read", "64k", "1x16"),
        .. Cow("of the layer", "read", "256k", "1x16"),
        .. Cow("of the layer", "randwrite", "4k", "1x32"),
        .. Cow("of the layer", "write", "256k", "1x16"),
        .. Cow("for the first time", "randwrite", "512", "1x32"),
        .. Cow("for the first time", "randwrite", "4k", "1x32q"),
        .. Cow("for the first time", "write", "256k", "1x16"),

        .. Proxy("warm", "randread", "4k", "1x32 4x16"),
        .. Proxy("warm", "randread", "64k", "1x8q"),
        .. Proxy("warm", "read", "64k", "1x16"),
        .. Proxy("warm", "read", "256k", "1x16"),
        .. Proxy("warm", "randwrite", "4k", "1x32 4x16"),
        .. Proxy("warm", "write", "256k", "1x16"),
        .. Proxy("cold", "randread", "4k", "1x32"),
        .. Proxy("cold", "randread", "64k", "1x8q"),
        .. Proxy("cold", "read", "64k", "1x16"),
        .. Proxy("cold", "read", "256k", "1x16"),
        CacheAll("cache-all", Medium.Memory),
        CacheAll("cache-all of a sparse image", Medium.SparseMemory),
    ];

    private static IEnumerable<Workload> Fio(string pattern, string size, string loads)
        => Loads(loads).Select(load => Fio(
            Words(pattern), new FioClient(pattern, size, load.Connections, load.Depth), load));

    private static Workload OneHundredASecond()
        => Fio(
            "100 a second, random read",
            new FioClient("randread", "4k", 1, 1) { RequestsPerSecond = 100 },
            new Load(1, 1, ""));

    /// <summary>Each block is read once: after that, it is not cold.</summary>
    private static IEnumerable<Workload> Cold(string pattern, string size, string loads)
        => Loads(loads).Select(load => Fio(
            "cold " + Words(pattern),
            new FioClient(pattern, size, load.Connections, load.Depth) { IsOnce = true },
            load) with
        {
            Medium = Medium.ColdDisk,
        });

    /// <summary>An image of 8 GiB of which every other 4 KiB are data: a million extents of each kind.</summary>
    private static IEnumerable<Workload> Fragmented(string where, Medium medium)
    {
        var read = new Load(1, 4, "");
        return
        [
            new Workload($"fragmented, {where}: block status of the whole disk", Mode.Target, "", BlockStatusClient.Run)
            {
                Medium = medium,
                Unit = Workload.UnitOfBytes,
            },
            Fio($"fragmented, {where}: sequential read", new FioClient("read", "1m", 1, read.Depth), read) with
            {
                Medium = medium,
            },
        ];
    }

    private static IEnumerable<Workload> ManyConnections(string loads)
        => Loads(loads).Select(load => new Workload(
            $"random read {Text(ManyConnectionsClient.Size)}, {load}",
            Mode.Crowd,
            ManyConnectionsClient.Size,
            new ManyConnectionsClient(load.Connections).Run)
        {
            IsQuick = load.IsQuick,
        });

    private static IEnumerable<Workload> Mixed()
    {
        var small = new FioClient("randread", "4k", 16, 1);
        var large = new FioClient("read", "1m", 1, 4);
        var alone = new Workload("mixed: random read 4 KiB, 16 x 1, alone", Mode.Crowd, "4k", small.Run);
        return
        [
            alone,
            new Workload(
                "mixed: random read 4 KiB, 16 x 1, beside a sequential read 1 MiB, 1 x 4",
                Mode.Crowd,
                "4k",
                (small with { Beside = large }).Run)
            {
                Alone = alone,
            },
        ];
    }

    private static IEnumerable<Workload> Cow(string where, string pattern, string size, string loads)
    {
        bool isFirst = where == "for the first time", isOfLayer = where == "of the layer";
        return Loads(loads).Select(load => Fio(
            $"copy-on-write: {Words(pattern)} {where},",
            new FioClient(pattern, size, load.Connections, load.Depth) { IsOnce = isFirst },
            load) with
        {
            Mode = Mode.Cow,
            IsFilled = isOfLayer,
            IsOfFreshFile = isFirst || isOfLayer,
        });
    }

    private static IEnumerable<Workload> Proxy(string state, string pattern, string size, string loads)
    {
        bool isWarm = state == "warm";
        return Loads(loads).Select(load => Fio(
            $"proxy: {state} {Words(pattern)}",
            new FioClient(pattern, size, load.Connections, load.Depth) { IsOnce = !isWarm },
            load) with
        {
            Mode = Mode.Proxy,
            IsFilled = isWarm,
            IsOfFreshFile = isWarm,
        });
    }

    private static Workload Fio(string words, FioClient client, Load load)
        => new($"{words} {Text(client.Size)}, {load}", Mode.Target, client.Size, client.Run)
        {
            Unit = Unit(client.Size),
            IsQuick = load.IsQuick,
            IsOverVeth = load.IsOverVeth,
        };

    private static IEnumerable<Workload> QemuImg(string pattern, string size, string loads)
        => Loads(loads).Select(load => new Workload(
            $"qemu-img bench: {Words(pattern)} {Text(size)}, {load}",
            Mode.Target,
            size,
            new QemuImgClient(pattern == "write", size, Bytes(size), load.Depth).Run)
        {
            Unit = Unit(size),
            IsQuick = load.IsQuick,
            IsOverVeth = load.IsOverVeth,
        });

    private static IEnumerable<Workload> Nbdcopy(string direction, string loads)
        => Loads(loads).Select(load => new Workload(
            $"nbdcopy {direction} {Text(NbdcopyClient.Size)}, {load}",
            Mode.Target,
            NbdcopyClient.Size,
            new NbdcopyClient(direction == "to null", load.Connections, load.Depth).Run)
        {
            Unit = Workload.UnitOfBytes,
            IsQuick = load.IsQuick,
            IsOverVeth = load.IsOverVeth,
        });

    private static Workload CacheAll(string name, Medium medium)
        => new("proxy: " + name, Mode.Proxy, "", CacheAllClient.Run)
        {
            Medium = medium,
            Unit = Workload.UnitOfBytes,
            Suits = peer => peer.IsOwn || peer.IsReference,
        };

    private static string Words(string pattern) => pattern switch
    {
        "randread" => "random read",
        "randwrite" => "random write",
        "randrw" => "random read/write",
        _ => "sequential " + pattern,
    };

    private static long Bytes(string size) => size[^1] switch
    {
        'k' => long.Parse(size[..^1], CultureInfo.InvariantCulture) << 10,
        'm' => long.Parse(size[..^1], CultureInfo.InvariantCulture) << 20,
        _ => long.Parse(size, CultureInfo.InvariantCulture),
    };

    /// <summary>A rate of large requests is that of their bytes.</summary>
    private static string Unit(string size)
        => Bytes(size) >= 64 << 10 ? Workload.UnitOfBytes : Workload.UnitOfRequests;

    private static string Text(string size) => size[^1] switch
    {
        'k' => size[..^1] + " KiB",
        'm' => size[..^1] + " MiB",
        _ => size + " B",
    };

    private static IEnumerable<Load> Loads(string text) => text.Split(' ').Select(word =>
    {
        string numbers = word.TrimEnd('q', 'v');
        int[] parts = [.. numbers.Split('x').Select(part => int.Parse(part, CultureInfo.InvariantCulture))];
        return new Load(parts[0], parts[1], word[numbers.Length..]);
    });

    /// <summary>An entry of the matrix.</summary>
    private sealed record Load(int Connections, int Depth, string Letters)
    {
        public bool IsQuick => Letters.Contains('q', StringComparison.Ordinal);

        public bool IsOverVeth => Letters.Contains('v', StringComparison.Ordinal);

        public override string ToString() => $"{Connections} x {Depth}";
    }
}
