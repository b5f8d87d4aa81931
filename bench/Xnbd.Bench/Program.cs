using System.Runtime.InteropServices;
using Xnbd.Bench;
using Xnbd.Bench.Moves;

// xNBD and its peers side by side: see script/bench and docs/benchmarks.md.
BenchOptions? options;
try
{
    options = BenchOptions.Parse(args);
}
catch (UsageException failure)
{
    Console.Error.WriteLine($"script/bench: {failure.Message}\nTry 'script/bench --help' for more information.");
    return 2;
}

if (options is null)
    return 0;
MoveCase[] moves = [.. MoveCase.All.Where(options.Includes)];
if (options.IsList)
{
    foreach (Case @case in CasesOver(options.Transports))
        Console.WriteLine(@case);
    foreach (MoveCase move in moves)
        Console.WriteLine(move);
    return 0;
}

using var stop = new CancellationTokenSource();
using PosixSignalRegistration interrupt = PosixSignalRegistration.Create(PosixSignal.SIGINT, Stop);
using PosixSignalRegistration terminate = PosixSignalRegistration.Create(PosixSignal.SIGTERM, Stop);
using var network = new Network();
var transports = new List<Transport>();
foreach (Transport transport in options.Transports)
{
    if (await network.Prepare(transport) is { } reason)
        Progress.Say($"{transport.ToString().ToLowerInvariant()} is left out: {reason}");
    else
        transports.Add(transport);
}

IReadOnlyList<Case> cases = CasesOver(transports);
using var images = new Images(options.Disk);
var run = new BenchRun(options, cases, network, images, stop.Token);
double expected = Math.Ceiling((run.Expected + MoveRun.Expected(options, moves)).TotalSeconds / 10) * 10;
Progress.Say(moves.Length > 0
    ? $"{moves.Length} moves: about {expected:0} seconds"
    : $"{cases.Count} workloads, transports counted: about {expected:0} seconds");
foreach (Peer absent in Peer.All.Where(peer => !peer.IsPresent))
    Progress.Say($"absent: {absent.Name}");
try
{
    Machine machine = await Machine.Read(options.Modes.SelectMany(run.Peers).Select(peer => peer.Program));
    Results results = await run.Run();
    IReadOnlyList<MoveResult> moved = await MoveRun.Run(options, moves, stop.Token);
    Footprints footprints = options.HasFootprints
        ? await Footprints.Measure(run, options, stop.Token)
        : new Footprints();
    Progress.Show("");
    if (options.IsJson)
        JsonReport.Print(options, machine, results, moved, footprints);
    else
        Report.Print(options, machine, results, moved, footprints);
    return 0;
}
catch (OperationCanceledException)
{
    Progress.Say("stopped");
    return 130;
}

IReadOnlyList<Case> CasesOver(IReadOnlyList<Transport> transports)
    =>
    [
        .. Workloads.All.Where(options.Includes).SelectMany(workload => transports
            .Where(workload.RunsOver).Select(transport => new Case(workload, transport))),
    ];

void Stop(PosixSignalContext context)
{
    context.Cancel = true; // this program ends when it has ended its servers and removed its files
    stop.Cancel();
}
