using System.Diagnostics;
using Microsoft.Extensions.Logging;
using Xnbd.Linux;
using Xnbd.Storage;
using Xnbd.Storage.Images;

namespace Xnbd.Programs;

/// <summary>Makes a snapshot for each SIGUSR1, one at a time, in the background, and logs what becomes of it.</summary>
/// <param name="getImage">The image that is served; null when it is another kind of disk.</param>
/// <param name="log">For progress and result.</param>
/// <param name="stop">Gives an unfinished snapshot up.</param>
internal sealed class SnapshotSignal(Func<ImageFile?> getImage, ILogger log, CancellationToken stop)
{
    private static readonly TimeSpan s_progressTime = TimeSpan.FromSeconds(5);

    private readonly Lock _lock = new();
    private Thread? _thread;

    /// <summary>Takes a snapshot of the image as it stands now.</summary>
    public void Take()
    {
        lock (_lock)
        {
            if (_thread is { IsAlive: true })
            {
                log.LogWarning("a snapshot is being made already; the signal is ignored");
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
            log.LogWarning("the snapshot was given up, because the server ends");
        }
        catch (Exception failure)
        {
            // Whatever it is: the service matters more than the snapshot.
            log.LogError("no snapshot was made: {Cause}", failure is DiskException ? failure.Message : failure.ToString());
        }
    }
}
