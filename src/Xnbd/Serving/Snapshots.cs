using System.Diagnostics;
using System.Text.Json.Nodes;
using Microsoft.Extensions.Logging;
using Xnbd.Linux;
using Xnbd.Storage;
using Xnbd.Storage.Images;

namespace Xnbd.Programs.Serving;

/// <summary>
/// The snapshots of a disk, one at a time, each on a thread of its own. SIGUSR1 and the control channel start them; the
/// result is logged, and can be asked for. The lock guards the last one; it is held for moments.
/// </summary>
/// <param name="getImage">Returns the image that is served; null for another kind of disk.</param>
/// <param name="log">Receives progress and result.</param>
/// <param name="stop">Cancels an unfinished snapshot: the server ends.</param>
internal sealed class Snapshots(Func<ImageFile?> getImage, ILogger log, CancellationToken stop)
{
    /// <summary>The longest time that a status waits for, in milliseconds.</summary>
    private const int MaxWait = 30_000;

    private const string NoImage = "snapshots are made of the target mode's images";

    private static readonly TimeSpan s_progressTime = TimeSpan.FromSeconds(5);

    private readonly Lock _lock = new();
    private Snapshot? _last;

    /// <summary>Starts a snapshot of the image as it is now. Whatever hinders it is logged.</summary>
    public void StartBySignal()
    {
        if (getImage() is null)
        {
            log.LogInformation("SIGUSR1 has no meaning in this mode: {Cause}", NoImage);
            return;
        }

        try
        {
            if (!TryStart(out _))
                log.LogWarning("a snapshot is already being made; the signal is ignored");
        }
        catch (FailureException failure)
        {
            log.LogError("no snapshot was made: {Cause}", failure.Message);
        }
    }

    /// <summary>Starts a snapshot, unless one is being made.</summary>
    /// <returns>The state of the one that is being made.</returns>
    /// <exception cref="FailureException">This disk has none, or there is no thread.</exception>
    public JsonObject Start()
    {
        TryStart(out Snapshot snapshot);
        return snapshot.Status;
    }

    /// <summary>The state of the last snapshot.</summary>
    /// <param name="waitMilliseconds">Wait for its end, at most this time.</param>
    /// <exception cref="FailureException">There was none.</exception>
    public JsonObject Status(int waitMilliseconds)
    {
        Snapshot last = Last ?? throw new FailureException("no snapshot was made since the start");
        last.Wait(Math.Clamp(waitMilliseconds, 0, MaxWait));
        return last.Status;
    }

    /// <summary>Cancels the snapshot that is being made.</summary>
    /// <returns>Its state.</returns>
    /// <exception cref="FailureException">None is being made.</exception>
    public JsonObject Cancel()
    {
        if (Last is not { IsRunning: true } running)
            throw new FailureException("no snapshot is being made");
        running.Cancel();
        running.Wait(MaxWait);
        return running.Status;
    }

    /// <summary>The last snapshot's state; null if there was none.</summary>
    public JsonObject? LastStatus => Last?.Status;

    /// <summary>Waits until no snapshot is being made.</summary>
    public void WaitUntilEnded() => Last?.Wait(Timeout.Infinite);

    private Snapshot? Last
    {
        get
        {
            lock (_lock)
                return _last;
        }
    }

    /// <returns>False when one is being made already, which is told instead.</returns>
    private bool TryStart(out Snapshot snapshot)
    {
        lock (_lock)
        {
            if (_last is { IsRunning: true })
            {
                snapshot = _last;
                return false;
            }

            if (getImage() is not { } image)
                throw new FailureException(NoImage);
            if (stop.IsCancellationRequested)
                throw new FailureException("the server is ending");
            snapshot = new Snapshot(image, log, stop);
            if (LinuxThread.TryStart("snapshot", snapshot.Make) is null)
                throw new FailureException("the system has no thread to spare");
            _last = snapshot;
            return true;
        }
    }

    /// <summary>One snapshot: made on its thread, looked at by any.</summary>
    private sealed class Snapshot(ImageFile image, ILogger log, CancellationToken stop)
    {
        private readonly CancellationTokenSource _cancel = CancellationTokenSource.CreateLinkedTokenSource(stop);
        private readonly ManualResetEventSlim _ended = new();
        private long _position;
        private volatile string _state = "running";
        private volatile string? _error;
        private volatile string? _path; // once it is complete
        private bool _isReflink;

        public bool IsRunning => !_ended.IsSet;

        public JsonObject Status => new()
        {
            ["state"] = _state,
            ["error"] = _error,
            ["size"] = image.Length,
            ["copied-bytes"] = Interlocked.Read(ref _position),
            ["path"] = _path,
            ["reflink"] = _path is null ? null : _isReflink,
        };

        public void Cancel() => _cancel.Cancel();

        public void Wait(int milliseconds) => _ended.Wait(milliseconds);

        public void Make()
        {
            long start = Stopwatch.GetTimestamp(), lastLine = start;
            try
            {
                SnapshotResult result = image.TakeSnapshot(
                    DateTimeOffset.UtcNow,
                    () => log.LogInformation("snapshot begun"),
                    position =>
                    {
                        Interlocked.Exchange(ref _position, position);
                        if (Stopwatch.GetElapsedTime(lastLine) < s_progressTime)
                            return;
                        lastLine = Stopwatch.GetTimestamp();
                        log.LogInformation("snapshot: {Percent} % copied", (int)(position / (image.Length / 100.0)));
                    },
                    _cancel.Token);
                (_isReflink, _position) = (result.IsReflink, image.Length);
                _path = result.Path;
                _state = "done";
                log.LogInformation(
                    "snapshot complete: {Path}, {Kind}, {Allocated} bytes, {Seconds:0.0} s",
                    result.Path,
                    result.IsReflink ? "a reflink" : "a copy",
                    result.AllocatedBytes,
                    Stopwatch.GetElapsedTime(start).TotalSeconds);
            }
            catch (OperationCanceledException)
            {
                _state = "cancelled";
                log.LogWarning(stop.IsCancellationRequested
                    ? "the snapshot was cancelled, because the server ends" : "the snapshot was cancelled");
            }
            catch (Exception failure)
            {
                // Whatever has failed, the service goes on.
                _error = failure is DiskException ? failure.Message : failure.ToString();
                _state = "failed";
                log.LogError("no snapshot was made: {Cause}", _error);
            }
            finally
            {
                _ended.Set();
            }
        }
    }
}
