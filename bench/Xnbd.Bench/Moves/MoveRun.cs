using System.Globalization;
using Xnbd.TestKit;

namespace Xnbd.Bench.Moves;

/// <summary>One move that was measured.</summary>
/// <param name="Case">The load and the line.</param>
/// <param name="Way">The way of the move.</param>
/// <param name="Figures">Its figures; null when it failed.</param>
/// <param name="Failure">Why it failed; empty when it did not.</param>
internal sealed record MoveResult(MoveCase Case, string Way, MoveFigures? Figures, string Failure);

/// <summary>Runs the chosen moves, one after the other.</summary>
internal static class MoveRun
{
    /// <summary>How long the client works before the move, and after it, in seconds.</summary>
    private const double SecondsBefore = 2, SecondsAfter = 1;

    /// <summary>A move that takes longer than so many times the ideal, and some seconds, does not end.</summary>
    private const double MaxFactor = 2.5, MaxDelaySeconds = 30;

    /// <summary>What takes about so many times the ideal, and the rest.</summary>
    private const double ExpectedFactor = 1.4, ExpectedSeconds = 12;

    private static readonly string s_traces = Path.Combine(Repository.Root, "out", "traces");

    /// <summary>The ways that are here, and that are chosen.</summary>
    public static IReadOnlyList<MoveWay> Ways(BenchOptions options)
        => [.. MoveWay.All.Where(way => way.IsPresent && options.Includes(way))];

    /// <summary>How long it is expected to take.</summary>
    public static TimeSpan Expected(BenchOptions options, IReadOnlyList<MoveCase> cases)
        => TimeSpan.FromSeconds(options.Rounds * Ways(options).Count
            * cases.Sum(@case => (ExpectedFactor * @case.Line.IdealSeconds) + ExpectedSeconds));

    public static async Task<IReadOnlyList<MoveResult>> Run(
        BenchOptions options, IReadOnlyList<MoveCase> cases, CancellationToken stop)
    {
        var results = new List<MoveResult>();
        for (int round = 1; round <= options.Rounds; round++)
        {
            foreach ((MoveCase @case, MoveWay way) in cases.SelectMany(
                @case => Ways(options).Select(way => (@case, way))))
            {
                Progress.Show($"round {round} of {options.Rounds}: {@case}: {way.Name}");
                try
                {
                    MoveFigures figures = await Measure(@case, way, stop);
                    results.Add(new MoveResult(@case, way.Name, figures, ""));
                    Progress.Say(string.Create(
                        CultureInfo.InvariantCulture,
                        $"{@case}: {way.Name}: {figures.Seconds:0.0} s, {figures.ToIdeal:0.00} times the ideal"));
                }
                catch (Exception failure) when (BenchRun.IsOfServer(failure))
                {
                    results.Add(new MoveResult(@case, way.Name, null, failure.Message.TrimEnd()));
                    Progress.Say($"{@case}: {way.Name}: {failure.Message.TrimEnd()}");
                }
            }
        }

        return results;
    }

    private static async Task<MoveFigures> Measure(MoveCase @case, MoveWay way, CancellationToken stop)
    {
        stop.ThrowIfCancellationRequested();
        using var deadline = CancellationTokenSource.CreateLinkedTokenSource(stop);
        using var stage = new MoveStage(@case.Line, deadline.Token);
        Directory.CreateDirectory(s_traces);
        Operation[] trace = MoveTrace.Record(@case.Load, Path.Combine(s_traces, @case.Load));
        RunningPeer source = way.Prepare(stage);
        stage.Begin(source, trace, SecondsBefore);
        double maxSeconds = (MaxFactor * @case.Line.IdealSeconds) + MaxDelaySeconds;
        deadline.CancelAfter(TimeSpan.FromSeconds(maxSeconds));
        try
        {
            await way.Move(stage, source);
        }
        catch (OperationCanceledException) when (!stop.IsCancellationRequested)
        {
            throw new InvalidOperationException(Report.Line($"it did not end within {maxSeconds:0} s"));
        }

        await Task.Delay(TimeSpan.FromSeconds(SecondsAfter), stop);
        double differences;
        try
        {
            differences = stage.Client.Compare();
        }
        catch (IOException failure)
        {
            Progress.Say($"{@case}: {way.Name}: its disk could not be read at the end: {failure.Message}");
            differences = double.NaN;
        }

        if (stage.Client.Lost > 0)
            Progress.Say($"{@case}: {way.Name}: an operation was lost: {stage.Client.LastFailure}");
        return MoveFigures.Of(stage, @case.Line, differences);
    }
}
