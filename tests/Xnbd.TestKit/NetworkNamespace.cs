namespace Xnbd.TestKit;

/// <summary>
/// A network of its own for one server, at the end of a line to this one; it goes with this object. Programs are
/// started in it with <see cref="Prefix"/>.
/// </summary>
public sealed class NetworkNamespace : IDisposable
{
    private readonly string _name;

    private NetworkNamespace(string name, string address) => (_name, Address) = (name, address);

    /// <summary>The IPv4 address of what runs there.</summary>
    public string Address { get; }

    /// <summary>What stands before a program's own command line, to run it there.</summary>
    public string[] Prefix => ["ip", "netns", "exec", _name];

    /// <summary>Makes one whose connections can be forgotten, or skips the test with the reason.</summary>
    public static async Task<NetworkNamespace> Create()
    {
        foreach (string program in (string[])["ss", "nft"])
            Skip.Unless(Tool.Find(program) is not null, $"{program} is absent");
        (NetworkNamespace? network, string? reason) = await TryCreate();
        Skip.Unless(network is not null, reason ?? "");
        try
        {
            ToolResult filter = await Tool.Run(
                "ip",
                [
                    .. network!.Prefix[1..], "nft",
                    "add table inet filter; add chain inet filter input { type filter hook input priority 0; }",
                ]);
            Skip.Unless(filter.ExitCode == 0, $"this kernel filters no packets: {filter.Errors.Trim()}");
            return network;
        }
        catch
        {
            network!.Dispose();
            throw;
        }
    }

    /// <summary>Makes one.</summary>
    /// <returns>The namespace, or the reason why there is none.</returns>
    public static async Task<(NetworkNamespace? Network, string? Reason)> TryCreate()
    {
        if (Environment.UserName != "root")
            return (null, "a network namespace needs root");
        if (Tool.Find("ip") is null)
            return (null, "ip is absent");
        string name = "xnbd" + Guid.NewGuid().ToString("N")[..8];
        int net = Random.Shared.Next(256), part = Random.Shared.Next(64) * 4;
        ToolResult made = await Tool.Run("ip", "netns", "add", name);
        if (made.ExitCode != 0)
            return (null, $"there are no network namespaces here: {made.Errors.Trim()}");
        var network = new NetworkNamespace(name, $"10.213.{net}.{part + 2}");
        try
        {
            await Tool.Succeed("ip", "link", "add", name, "type", "veth", "peer", "name", "line", "netns", name);
            await Tool.Succeed("ip", "address", "add", $"10.213.{net}.{part + 1}/30", "dev", name);
            await Tool.Succeed("ip", "link", "set", name, "up");
            await network.Run("ip", "address", "add", network.Address + "/30", "dev", "line");
            await network.Run("ip", "link", "set", "line", "up");
            return (network, null);
        }
        catch
        {
            network.Dispose();
            throw;
        }
    }

    /// <summary>
    /// Nothing arrives any more on the connections there are, as if a router on the way had forgotten them; new ones
    /// work.
    /// </summary>
    public async Task ForgetConnections()
    {
        string connections = await Tool.Succeed("ss", "--tcp", "--numeric", "--no-header", "dst", Address);
        IEnumerable<string> ports = connections.Split('\n', StringSplitOptions.RemoveEmptyEntries)
            .Select(line => line.Split(' ', StringSplitOptions.RemoveEmptyEntries)[3].Split(':')[^1]);
        await Run("nft", $"add rule inet filter input tcp sport {{ {string.Join(", ", ports)} }} drop");
    }

    public void Dispose()
        => Tool.Succeed("ip", "netns", "delete", _name).GetAwaiter().GetResult(); // the line goes with it

    private Task Run(string program, params string[] args)
        => Tool.Succeed("ip", ["netns", "exec", _name, program, .. args]);
}
