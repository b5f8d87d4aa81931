using System.Globalization;

namespace Xnbd.Programs.Watch;

/// <summary>How serious the state of a proxy is; decides the colour of the line that tells it.</summary>
internal enum WatchMood
{
    /// <summary>Nothing is to be done.</summary>
    Calm,

    /// <summary>Work is under way.</summary>
    Busy,

    /// <summary>The work is done.</summary>
    Done,

    /// <summary>Something may go wrong.</summary>
    Warning,

    /// <summary>Somebody should look after it.</summary>
    Alarm,
}

/// <summary>The state of a proxy in one line: what is to be seen at a glance.</summary>
/// <param name="Mood">How serious it is.</param>
/// <param name="Text">For people.</param>
internal readonly record struct WatchState(WatchMood Mood, string Text)
{
    /// <summary>From this time on, in milliseconds, a remote that owes answers is called silent.</summary>
    private const long SilentMs = 3000;

    /// <summary>The state that matters most.</summary>
    /// <param name="history">What has been seen of the proxy; at least one report.</param>
    /// <param name="unanswered">How long the proxy has not answered.</param>
    public static WatchState Of(WatchHistory history, TimeSpan unanswered)
    {
        WatchReport report = history.Last!;
        WatchJob? job = report.Job;
        bool isRunning = job?.State == "running";
        if (unanswered > TimeSpan.Zero)
            return new WatchState(WatchMood.Alarm, $"THE PROXY DOES NOT ANSWER, for {Seconds(unanswered)}");
        if (report.Mode == "target")
            return new WatchState(WatchMood.Done, "SWITCHED: this is a target now; the remote is no longer used");
        if (report.RemoteLostMs is { } lost)
        {
            string waiting = report.RemoteWaitingReads == 0 ? "" : $", {report.RemoteWaitingReads} reads wait";
            return new WatchState(
                WatchMood.Alarm, $"THE REMOTE IS LOST, for {Seconds(Milliseconds(lost))}{waiting}: "
                    + report.RemoteFailure);
        }

        if (job is { DifferentBlocks: > 0 })
        {
            return new WatchState(
                WatchMood.Alarm, $"{job.DifferentBlocks} BLOCKS ARE NOT AS THE REMOTE HAS THEM: {job.Error}");
        }

        if (report.RemoteConnections.Select(connection => connection.SilentMs).DefaultIfEmpty().Max() is var silent
            and >= SilentMs)
            return new WatchState(WatchMood.Warning, $"THE REMOTE IS SILENT, for {Seconds(Milliseconds(silent))}");
        if (job?.State == "failed")
            return new WatchState(WatchMood.Alarm, $"{job.Kind} HAS FAILED: {job.Error}");
        if (isRunning)
        {
            if (report.CopyPaused)
                return new WatchState(WatchMood.Warning, $"{Doing(job!, report)}, PAUSED (--resume)");
            string eta = history.Eta() is { } left ? $", ETA {left:c}" : "";
            return new WatchState(WatchMood.Busy, Doing(job!, report) + eta);
        }

        if (report.StoreFailures > 0)
            return new WatchState(WatchMood.Warning, "FETCHED DATA CANNOT BE KEPT: see the proxy's log");
        if (report.MissingBlocks == 0)
            return new WatchState(WatchMood.Done, "ALL IS LOCAL: the proxy can be switched (--switch, --move)");
        if (report.Incoming)
            return new WatchState(WatchMood.Calm, "incoming: nothing is kept until a client writes, or --begin");
        string cancelled = job?.State == "cancelled" ? $"{job.Kind} was cancelled; " : "";
        return new WatchState(WatchMood.Calm, $"{cancelled}what clients read is kept; --move fetches all");
    }

    /// <summary>What a job does.</summary>
    private static string Doing(WatchJob job, WatchReport report)
    {
        if (job.Kind == ProxyJobs.PrefetchKind)
        {
            string done = ControlProgress.Percent(job.ListedBlocks - job.ListedLeft, job.ListedBlocks);
            return $"FETCHING A LIST: {done} % of it is asked for";
        }

        string work = job.Kind == ProxyJobs.MoveKind ? "MOVING" : job.Kind == ProxyJobs.VerifyKind ? "VERIFYING"
            : "FETCHING ALL";
        return job.Phase switch
        {
            "fetch" => $"{work}: {ControlProgress.Percent(report.Blocks - report.MissingBlocks, report.Blocks)} %"
                + " is local",
            "verify" => $"{work}: {ControlProgress.Percent(job.VerifiedBlocks, job.VerifyBlocks)} % is verified",
            _ => $"{work}: {job.Phase}",
        };
    }

    private static TimeSpan Milliseconds(long count)
        => TimeSpan.FromMilliseconds(Math.Clamp(count, 0, (long)TimeSpan.FromDays(9999).TotalMilliseconds));

    private static string Seconds(TimeSpan time)
        => time.TotalSeconds < 100
            ? string.Create(CultureInfo.InvariantCulture, $"{Math.Floor(time.TotalSeconds):0} s")
            : TimeSpan.FromSeconds(Math.Floor(time.TotalSeconds)).ToString("c");
}
