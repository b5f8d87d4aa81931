using System.Text.Json;
using System.Text.Json.Serialization;
using Xnbd.Bench.Moves;

namespace Xnbd.Bench;

/// <summary>The same figures for programs. A figure that is not known is left out.</summary>
internal static class JsonReport
{
    private static readonly JsonSerializerOptions s_format = new()
    {
        WriteIndented = true,
        PropertyNamingPolicy = JsonNamingPolicy.SnakeCaseLower,
        DefaultIgnoreCondition = JsonIgnoreCondition.WhenWritingNull,
    };

    public static void Print(
        BenchOptions options, Machine machine, Results results, IReadOnlyList<MoveResult> moves, Footprints footprints)
        => Console.WriteLine(JsonSerializer.Serialize(
            new
            {
                machine.Processor,
                machine.Processors,
                machine.Kernel,
                MemoryGibPerSecond = Figure(machine.CopyRate),
                machine.Versions,
                options.Rounds,
                options.Seconds,
                Workloads = results.Cases.Select(@case => new
                {
                    @case.Workload.Name,
                    Transport = @case.TransportName,
                    Mode = @case.Workload.Mode.ToString().ToLowerInvariant(),
                    @case.Workload.Size,
                    @case.Workload.Unit,
                    ToBestPeer = Ratio(results.ToBestPeer(@case)),
                    ToTargetMode = Ratio(results.ToTargetMode(@case)),
                    Servers = results.Servers(@case).ToDictionary(
                        server => server.Peer.Name,
                        server => Figures(server.Measurement, results.P99ToAlone(@case, server.Peer))),
                }),
                Moves = moves.Select(move => new
                {
                    move.Case.Load,
                    Line = move.Case.Line.Name,
                    move.Way,
                    Figures = move.Figures is { } figures ? Figures(figures) : null,
                    Failure = move.Failure.Length > 0 ? move.Failure : null,
                }),
                Idle = footprints.Idle.ToDictionary(server => server.Peer.Name, server => Figures(server.Footprint)),
                BigDisk = footprints.OfBigDisk.Select(server => new
                {
                    Mode = server.Mode.ToString().ToLowerInvariant(),
                    Server = server.Peer.Name,
                    Footprint = Figures(server.Footprint),
                }),
            },
            s_format));

    private static object Figures(Measurement m, double p99ToAlone) => new
    {
        Rate = Figure(m.Rate),
        P50Us = Figure(m.P50),
        P99Us = Figure(m.P99),
        ServerCpuUsPerRequest = Figure(m.ServerCpu),
        ClientCpuUsPerRequest = Figure(m.ClientCpu),
        PeakKib = Figure(m.PeakKibibytes),
        SlowestToMedian = Figure(m.SlowestToMedian),
        MibPerSecondBeside = Figure(m.RateBeside),
        P99ToAlone = Figure(p99ToAlone),
    };

    private static object Figures(MoveFigures move) => new
    {
        FirstReplyMs = Figure(move.FirstReply),
        HandOverMs = Figure(move.HandOver),
        Seconds = Figure(move.Seconds),
        ToIdeal = Figure(move.ToIdeal),
        BytesOverIdeal = Figure(move.BytesOverIdeal),
        OperationsLost = move.Lost,
        Differences = Figure(move.Differences),
        OperationsPerSecond = Figure(move.OperationRate),
        ReadP99Ms = Figure(move.ReadP99),
        ReadP99OfWorstTenthMs = Figure(move.WorstReadP99),
        WriteP99Ms = Figure(move.WriteP99),
        PauseAtEndMs = Figure(move.PauseAtEnd),
    };

    private static object Figures(Footprint footprint) => new
    {
        StartMs = Figure(footprint.StartMilliseconds),
        IdleMib = Figure(footprint.Idle),
        UsedMib = Figure(footprint.Used),
        RestartMs = Figure(footprint.RestartMilliseconds),
    };

    private static object? Ratio(Ratio? ratio) => ratio is null ? null : new
    {
        Peer = ratio.To.Name,
        Rate = Figure(ratio.Rate),
        ServerCpuPerByte = Figure(ratio.ServerCpu),
        ClientCpuPerByte = Figure(ratio.ClientCpu),
        P99 = Figure(ratio.P99),
    };

    private static double? Figure(double figure) => double.IsFinite(figure) ? Math.Round(figure, 3) : null;
}
