using System.Diagnostics;

namespace Xnbd.Bench.Moves;

/// <summary>The figures of one move. One that is not known is NaN.</summary>
/// <param name="FirstReply">From the start of the move to the client's first reply at the destination, in ms.</param>
/// <param name="HandOver">How long the client had no server on its way to the destination, in ms.</param>
/// <param name="Seconds">From the start of the move until the source can be switched off.</param>
/// <param name="ToIdeal">The same, divided by the disk's data by the line's rate.</param>
/// <param name="BytesOverIdeal">What went over the line, in both directions, less the disk's data.</param>
/// <param name="Lost">Operations of the client without a reply, or with an error.</param>
/// <param name="Differences">Blocks that a client read, during the move and at its end, and that were wrong.</param>
/// <param name="OperationRate">What the client did during the move, in operations per second.</param>
/// <param name="ReadP99">99th percentile of the latency of its reads during the move, in ms.</param>
/// <param name="WorstReadP99">The same of the worst tenth of the move.</param>
/// <param name="WriteP99">99th percentile of the latency of its writes during the move, in ms.</param>
/// <param name="PauseAtEnd">The longest operation around the switch, or the hand-over if it comes last, in ms.</param>
internal sealed record MoveFigures(
    double FirstReply, double HandOver, double Seconds, double ToIdeal, double BytesOverIdeal, int Lost,
    double Differences, double OperationRate, double ReadP99, double WorstReadP99, double WriteP99, double PauseAtEnd)
{
    private const int Parts = 10;

    /// <summary>The figures of a stage whose move and client have ended.</summary>
    /// <param name="stage">The stage.</param>
    /// <param name="line">Its line.</param>
    /// <param name="differences">Blocks that differ; NaN when the server did not answer.</param>
    public static MoveFigures Of(MoveStage stage, Line line, double differences)
    {
        (long start, long end) = stage.Time;
        Sample[] samples = [.. stage.Client.Samples.Where(sample => sample.End >= start && sample.End <= end)];
        Sample[] reads = [.. samples.Where(sample => sample.IsRead)];
        double seconds = Stopwatch.GetElapsedTime(start, end).TotalSeconds;
        double worst = reads.GroupBy(read => (read.End - start) * Parts / (end - start + 1))
            .Select(part => P99Of(part)).DefaultIfEmpty(double.NaN).Max();
        double pause = stage.EndsWithHandOver ? stage.HandOver
            : stage.CompleteAt > 0 ? stage.Client.Longest(since: stage.CompleteAt)
            : double.NaN;
        return new MoveFigures(
            stage.FirstReply, stage.HandOver, seconds, seconds / line.IdealSeconds,
            stage.Bytes - MovingDisk.AllocatedBytes, stage.Client.Lost, differences, samples.Length / seconds,
            P99Of(reads), worst, P99Of(samples.Where(sample => !sample.IsRead)), pause);
    }

    private static double P99Of(IEnumerable<Sample> samples)
    {
        double[] sorted = [.. samples.Select(sample => sample.Milliseconds).Order()];
        return sorted.Length == 0 ? double.NaN : sorted[(sorted.Length - 1) * 99 / 100];
    }
}
