using System.Diagnostics;
using System.Globalization;
using Xnbd.TestKit;

namespace Xnbd.Bench.Moves;

/// <summary>A line between two hosts.</summary>
internal sealed record Line(string Name, long BytesPerSecond, int RoundTripMilliseconds)
{
    public static readonly IReadOnlyList<Line> All =
    [
        new("100 Mbit/s 20 ms", 12_500_000, 20), new("1 Gbit/s 100 ms", 125_000_000, 100),
    ];

    /// <summary>The seconds that the disk's data take at the least.</summary>
    public double IdealSeconds => (double)MovingDisk.AllocatedBytes / BytesPerSecond;
}

/// <summary>A load over a line.</summary>
internal sealed record MoveCase(string Load, Line Line)
{
    public static readonly IReadOnlyList<MoveCase> All =
        [.. Line.All.SelectMany(line => MoveTrace.All.Keys.Select(load => new MoveCase(load, line)))];

    public override string ToString() => $"move: {Load}, {Line.Name}";
}

/// <summary>What goes with one move: two hosts, the line between them, the client, and the clock.</summary>
internal sealed class MoveStage : IDisposable
{
    private readonly TempFolder _folder = new(Images.MemoryFolder);
    private readonly List<RunningPeer> _running = [];
    private readonly Line _line;
    private readonly CancellationToken _stop;
    private MoveClient? _client;
    private SlowLink? _link;
    private RunningPeer? _source;

    /// <summary>Makes the disk.</summary>
    public MoveStage(Line line, CancellationToken stop)
    {
        (_line, _stop) = (line, stop);
        MovingDisk.Create(Image);
    }

    /// <summary>The image on the host that the disk leaves.</summary>
    public string Image => _folder.File("source.img");

    /// <summary>The move has to end until then.</summary>
    public CancellationToken Stop => _stop;

    public MoveClient Client => _client ?? throw new InvalidOperationException("there is no client yet");

    /// <summary>When the move began, and when the source was no longer needed.</summary>
    public (long Start, long End) Time { get; private set; }

    /// <summary>Until the first reply at the destination, in milliseconds since the start of the move.</summary>
    public double FirstReply { get; private set; } = double.NaN;

    /// <summary>How long the client had no server, on its way to the destination, in milliseconds.</summary>
    public double HandOver { get; private set; } = double.NaN;

    /// <summary>
    /// Whether the hand-over ends the move. Otherwise the disk switches under the client, some time after
    /// <see cref="CompleteAt"/>.
    /// </summary>
    public bool EndsWithHandOver { get; set; }

    /// <summary>The time stamp since which everything is at the destination; 0 when nobody tells.</summary>
    public long CompleteAt { get; set; }

    /// <summary>What went over the line in both directions.</summary>
    public long Bytes { get; private set; }

    /// <summary>A file of either host.</summary>
    public string File(string name) => _folder.File(name);

    /// <summary>Starts a server on either host.</summary>
    public RunningPeer Start(string name, string program, Func<Setting, string[]> arguments)
    {
        var endpoint = new Endpoint(Transport.Unix, _folder.File($"socket{_running.Count}"), "", 0, []);
        RunningPeer server = RunningPeer.Start(
            new Peer(name, [], program, arguments), new Setting(Image, endpoint, _folder.Path, null));
        _running.Add(server);
        return server;
    }

    /// <summary>The client begins to work at the source, before the move.</summary>
    public void Begin(RunningPeer source, Operation[] trace, double seconds)
    {
        _source = source;
        _client = new MoveClient(new MovingDisk(), trace, source);
        Thread.Sleep(TimeSpan.FromSeconds(seconds));
    }

    /// <summary>Opens the line to a server.</summary>
    /// <returns>The port of localhost at which it begins.</returns>
    public string OpenLine(RunningPeer server)
    {
        _link = new SlowLink(
            server.Endpoint.Remote, _line.BytesPerSecond, TimeSpan.FromMilliseconds(_line.RoundTripMilliseconds));
        return _link.Port.ToString(CultureInfo.InvariantCulture);
    }

    /// <summary>The move begins now.</summary>
    public void StartClock() => Time = (Stopwatch.GetTimestamp(), 0);

    /// <summary>Lets the client go to a server, and waits for its first reply there.</summary>
    /// <param name="server">The destination.</param>
    /// <param name="meanwhile">What must be done while the client does nothing.</param>
    public async Task HandOverTo(RunningPeer server, Func<Task>? meanwhile = null)
    {
        long held = Client.Hold();
        if (meanwhile is not null)
            await meanwhile();
        long reply = await Client.GoOn(server).WaitAsync(_stop);
        FirstReply = Stopwatch.GetElapsedTime(Time.Start, reply).TotalMilliseconds;
        HandOver = Stopwatch.GetElapsedTime(held, reply).TotalMilliseconds;
    }

    /// <summary>The move has ended: the source is switched off, and the line is cut.</summary>
    public void StopClock()
    {
        Time = (Time.Start, Stopwatch.GetTimestamp());
        Bytes = _link!.Bytes + _link.BytesToServer;
        Thread.Sleep(250); // what the end of the move does to the client is seen in its next operations
        _source!.Dispose();
        _link.Dispose();
    }

    public void Dispose()
    {
        _client?.Dispose();
        _running.ForEach(server => server.Dispose());
        _link?.Dispose();
        _folder.Dispose();
    }
}
