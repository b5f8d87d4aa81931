using System.Diagnostics;
using Microsoft.Extensions.Logging;
using Xnbd.Linux;
using Xnbd.Storage;
using Xnbd.Storage.Images;

namespace Xnbd.Programs;

/// <summary>Makes a snapshot for each SIGUSR1, one at a time, in the background, and logs the result.</summary>
/// <param name="getImage">Returns the image that is served; null for another kind of disk.</param>
/// <param name="log">Receives progress and result.</param>
/// <param name="stop">Cancels an unfinished snapshot.</param>
internal sealed class SnapshotSignal(Func<ImageFile?> getImage, ILogger log, CancellationToken stop)
{
    private static readonly TimeSpan s_progressTime = TimeSpan.FromSeconds(5);

    private readonly Lock _lock = new();
    private Thread? _thread;

    /// <summary>Takes a snapshot of the image as it is now.</summary>
    public void Take()
    {
        lock (_lock)
        {
            if (_thread is { IsAlive: true })
            {
                log.LogWarning("a snapshot is already being made; the signal is ignored");
                return;
            }

            if (getImage() is not { } image)
            {
                log.LogInformation(
                    "SIGUSR1 has no meaning in this mode: snapshots are made of the target mode's images");
                return;
            }

            _thread = LinuxThread.TryStart("snapshot", () => Make(image));
            if (_thread is null)
                log.LogError("no snapshot was made: the system has no thread to spare");
        }
    }

    /// <summary>Waits until no snapshot is being made.</summary>
    public void WaitUntilEnded()
    {
        Thread? thread;
        lock (_lock)
            thread = _thread;
        thread?.Join();
    }

    private void Make(ImageFile image)
    {
        long start = Stopwatch.GetTimestamp(), lastLine = start;
        try
        {
            SnapshotResult result = image.TakeSnapshot(
                DateTimeOffset.UtcNow,
                () => log.LogInformation("snapshot begun"),
                position =>
                {
                    if (Stopwatch.GetElapsedTime(lastLine) < s_progressTime)
                        return;
                    lastLine = Stopwatch.GetTimestamp();
                    log.LogInformation("snapshot: {Percent} % copied", position * 100 / image.Length);
                },
                stop);
            log.LogInformation(
                "snapshot complete: {Path}, {Kind}, {Allocated} bytes, {Seconds:0.0} s",
                result.Path,
                result.IsReflink ? "a reflink" : "a copy",
                result.AllocatedBytes,
                Stopwatch.GetElapsedTime(start).TotalSeconds);
        }
        catch (OperationCanceledException)
        {
            log.LogWarning("the snapshot was cancelled, because the server ends");
        }
        catch (Exception failure)
        {
            // Whatever has failed, the service goes on.
            string cause = failure is DiskException ? failure.Message : failure.ToString();
            log.LogError("no snapshot was made: {Cause}", cause);
        }
    }
}
