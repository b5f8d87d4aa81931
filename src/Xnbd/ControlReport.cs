using System.Globalization;
using System.Text.Json;
using System.Text.Json.Nodes;
using Xnbd.Storage;

namespace Xnbd.Programs;

/// <summary>What the control programs print of a server's answers: for people, or as JSON.</summary>
internal static class ControlReport
{
    /// <summary>Prints an answer as JSON, or the text that says the same.</summary>
    /// <returns>Success.</returns>
    public static int Say(JsonNode answer, bool isJson, string text)
    {
        Console.WriteLine(isJson ? Indented(answer) : text);
        return ExitCode.Success;
    }

    /// <summary>Prints the state of a disk.</summary>
    /// <returns>Success.</returns>
    public static int Show(JsonNode answer, bool isJson)
    {
        if (isJson)
            return Say(answer, isJson, "");
        Console.WriteLine($"mode:         {answer["mode"]!.GetValue<string>()}");
        if (answer["cache-image"] is null)
            ShowLocal(answer);
        else
            ShowProxy(answer);
        if (answer["snapshot"] is { } snapshot)
            Console.WriteLine($"snapshot:     {Snapshot(snapshot)}");
        return ExitCode.Success;
    }

    /// <summary>Prints the clients of a server, a line for each.</summary>
    /// <returns>Success.</returns>
    public static int ShowClients(JsonNode answer, bool isJson)
    {
        if (isJson)
            return Say(answer, isJson, "");
        List<string[]> rows = [["ADDRESS", "EXPORT", "SINCE", "READ", "WRITTEN", "REQUESTS", "IN FLIGHT"]];
        rows.AddRange(answer.AsArray().Select(client => (string[])
        [
            client!["address"]!.GetValue<string>(),
            client["export"]!.GetValue<string>(),
            client["since"]!.GetValue<string>(),
            ByteCount.Describe(client["read-bytes"]!.GetValue<long>()),
            ByteCount.Describe(client["written-bytes"]!.GetValue<long>()),
            client["requests"]!.GetValue<long>().ToString(CultureInfo.InvariantCulture),
            client["in-flight"]!.GetValue<long>().ToString(CultureInfo.InvariantCulture),
        ]));
        Console.Write(Table(rows));
        return ExitCode.Success;
    }

    /// <summary>Lays rows out in columns.</summary>
    public static string Table(IReadOnlyList<string[]> rows)
    {
        string[][] cells = [.. rows.Select(row => Array.ConvertAll(row, Printable))];
        int[] widths = [.. Enumerable.Range(0, rows[0].Length).Select(column => cells.Max(row => row[column].Length))];
        var text = new System.Text.StringBuilder();
        foreach (string[] row in cells)
        {
            string line = string.Join("  ", row.Select((cell, column) => cell.PadRight(widths[column])));
            text.Append(line.TrimEnd()).Append('\n');
        }

        return text.ToString();
    }

    /// <summary>A text that stays in its cell: names may hold any character, and be long.</summary>
    private static string Printable(string cell)
    {
        const int maxLength = 200;
        string cut = cell.Length > maxLength ? cell[..maxLength] + "..." : cell;
        return string.Concat(cut.Select(c => char.IsControl(c) ? '?' : c));
    }

    /// <summary>A snapshot's state, in words.</summary>
    public static string Snapshot(JsonNode status) => status["state"]!.GetValue<string>() switch
    {
        "done" => status["path"]!.GetValue<string>(),
        "running" => $"{ControlProgress.Percent(
            status["copied-bytes"]!.GetValue<long>(), status["size"]!.GetValue<long>())} % copied",
        var state => state + ErrorOf(status),
    };

    /// <summary>What a comparison has found, if all is as it should be.</summary>
    public static string Compared(JsonNode comparison)
    {
        long blocks = comparison["blocks"]!.GetValue<long>(), written = comparison["written-blocks"]!.GetValue<long>();
        string rest = written == 0 ? "" : $" ({written} others were written here meanwhile)";
        return $"{blocks - written} blocks that were fetched are as the remote has them{rest}";
    }

    /// <summary>What a comparison has found, if there are differences.</summary>
    public static string Differences(JsonNode comparison)
    {
        var text = new System.Text.StringBuilder();
        long listed = 0;
        foreach (JsonNode? range in comparison["differences"]!.AsArray())
        {
            long length = range!["length"]!.GetValue<long>();
            listed += BlockRange.CountOf(length);
            text.Append(
                CultureInfo.InvariantCulture, $"differs: {length} bytes at {range["offset"]!.GetValue<long>()}\n");
        }

        long more = comparison["different-blocks"]!.GetValue<long>() - listed;
        return more > 0 ? $"{text}and {more} more blocks" : text.ToString().TrimEnd('\n');
    }

    /// <summary>The error of a job, as the end of a line.</summary>
    public static string ErrorOf(JsonNode job)
        => job["error"] is { } error ? $": {error.GetValue<string>()}" : "";

    private static string Indented(JsonNode node)
    {
        using var stream = new MemoryStream();
        using (var writer = new Utf8JsonWriter(stream, new JsonWriterOptions { Indented = true }))
            node.WriteTo(writer);
        return System.Text.Encoding.UTF8.GetString(stream.ToArray());
    }

    private static void ShowLocal(JsonNode answer)
    {
        static string Bytes(long count) => ByteCount.DescribeExactly(count);
        Console.WriteLine($"image:        {answer["image"]!.GetValue<string>()}");
        foreach (JsonNode? layer in answer["layers"]!.AsArray())
            Console.WriteLine($"layer:        {layer!.GetValue<string>()}");
        if (!answer["kept"]!.GetValue<bool>())
            Console.WriteLine("changes:      lost when the server ends");
        string access = answer["read-only"]!.GetValue<bool>() ? "read-only" : "read-write";
        Console.WriteLine($"disk:         {Bytes(answer["size"]!.GetValue<long>())}, {access}");
        Console.WriteLine($"read:         {Bytes(answer["read-bytes"]!.GetValue<long>())} since the start");
        Console.WriteLine($"written:      {Bytes(answer["written-bytes"]!.GetValue<long>())} since the start");
        Console.WriteLine($"clients:      {answer["clients"]!.GetValue<long>()} connections");
    }

    private static void ShowProxy(JsonNode answer)
    {
        long Number(string name) => answer[name]!.GetValue<long>();
        static string Bytes(long count) => ByteCount.DescribeExactly(count);
        long blocks = Number("blocks"), cached = Number("cached-blocks"), written = Number("written-blocks");
        string remote = answer["remote"] is { } address
            ? $"{address.GetValue<string>()}, {Number("remote-connections")} connections"
            : "none: the proxy was switched";
        Console.WriteLine($"remote:       {remote}");
        if (answer["incoming"]?.GetValue<bool>() == true)
            Console.WriteLine("incoming:     nothing is kept until a client writes, or --begin");
        Console.WriteLine($"cache image:  {answer["cache-image"]!.GetValue<string>()}");
        Console.WriteLine($"disk:         {Bytes(Number("size"))}, {blocks} blocks");
        string percent = ControlProgress.Percent(cached, blocks);
        Console.WriteLine($"cached:       {Bytes(Number("cached-bytes"))}, {cached} blocks, {percent} %");
        Console.WriteLine($"written here: {Bytes(written * BlockRange.BlockSize)}, {written} blocks");
        Console.WriteLine($"fetched:      {Bytes(Number("fetched-bytes"))} since the start");
        Console.WriteLine($"zeroes:       {Bytes(ControlProgress.ZeroBytes(answer))} that were not fetched");
        Console.WriteLine($"reads:        {Number("hits")} hits, {Number("misses")} misses");
        Console.WriteLine($"in flight:    {Number("requests-in-flight")} requests, {Bytes(Number("bytes-in-flight"))}");
        Console.WriteLine($"clients:      {Number("clients")} connections");
        if (answer["copy-paused"]?.GetValue<bool>() == true)
            Console.WriteLine("copy:         paused (--resume)");
        else if (answer["max-copy-rate"] is { } limit)
            Console.WriteLine($"copy:         at most {Bytes(limit.GetValue<long>())} per second");
        long failures = Number("store-failures");
        if (failures > 0)
            Console.WriteLine($"NOT CACHED:   {failures} times fetched data could not be kept: see the proxy's log");
        if (answer["job"] is { } job)
        {
            string kind = (job["kind"]?.GetValue<string>() ?? ProxyJobs.CacheAllKind) + ":";
            Console.WriteLine($"{kind,-13} {job["state"]!.GetValue<string>()}{ErrorOf(job)}");
        }
    }

}
