using System.Diagnostics;
using System.Text;
using System.Text.Json.Nodes;
using Spectre.Console.Rendering;
using Xnbd.Control;
using Xnbd.Linux;
using Xnbd.Storage.Cache;

namespace Xnbd.Programs.Watch;

/// <summary>
/// <c>xnbd-bgctl --watch</c>: asks the proxy for reports, and draws them, until the user leaves, the proxy is switched,
/// or it ends.
/// <para>
/// A thread of its own asks, since a proxy may not answer, and hands the reports over; the main thread draws.
/// <c>_gate</c> guards what is handed over, and is pulsed when there is something to do. Nothing is called while it is
/// held.
/// </para>
/// </summary>
internal sealed class WatchProgram
{
    /// <summary>From this time on the screen says that the proxy does not answer.</summary>
    private static readonly TimeSpan s_maxAnswer = TimeSpan.FromSeconds(3);

    /// <summary>How often in a row the channel may be lost while there is a proxy.</summary>
    private const int MaxLosses = 10;

    private readonly Func<ControlClient> _connect;
    private readonly TimeSpan _interval;
    private readonly object _gate = new();
    private readonly Queue<WatchReport> _reports = new();
    private Exception? _failure; // why no more reports come
    private bool _isChanged; // the window or the user has something to say
    private bool _isHurried; // the next report is wanted now
    private int _cells = ProxyWatch.DefaultCells;
    private long _askedAt; // a time stamp; 0 while nothing is asked

    private WatchProgram(Func<ControlClient> connect, TimeSpan interval)
        => (_connect, _interval) = (connect, interval);

    /// <summary>Watches a proxy.</summary>
    /// <param name="connect">Connects to it.</param>
    /// <param name="interval">The time from one report to the next.</param>
    /// <returns>The exit code.</returns>
    /// <exception cref="FailureException">There is no terminal, or the proxy cannot be watched.</exception>
    public static int Run(Func<ControlClient> connect, TimeSpan interval)
        => WatchTerminal.Refusal is { } refusal ? throw new FailureException(refusal)
            : new WatchProgram(connect, interval).Run();

    private int Run()
    {
        // What fails at once is said without a screen.
        ControlClient client = _connect();
        WatchReport first = Ask(client);
        var history = new WatchHistory();
        history.Add(first);
        bool isUnicode = Console.OutputEncoding.CodePage == Encoding.UTF8.CodePage;
        WatchSigns signs = isUnicode ? WatchSigns.Unicode : WatchSigns.Ascii;
        if (first.Mode == "target")
            return Switched(first);
        if (LinuxThread.TryStart("watch", () => AskAgain(client)) is null)
            throw new FailureException("the system has no thread to spare");

        (int Columns, int Rows) size;
        using (var terminal = new WatchTerminal(Wake))
        {
            do
            {
                size = terminal.Size;
                if (terminal.IsQuit || !terminal.Draw(Picture(), size))
                    return ExitCode.Success;
            }
            while (!WaitForChange(history) && history.Last!.Mode != "target");

            terminal.Dispose();
            terminal.Print(Picture(), size.Columns); // the end stays to be seen
        }

        return _failure is null ? Switched(history.Last!) : throw Ended(_failure, history.Last!);

        IRenderable Picture()
        {
            var screen = new WatchScreen(history, size.Columns, size.Rows, Unanswered(), signs);
            SetCells(screen.Cells);
            return screen;
        }
    }

    private static int Switched(WatchReport report)
    {
        Console.WriteLine(
            $"the proxy was switched: '{WatchScreen.Plain(report.CacheImage)}' is served as a target, "
            + "and the remote is no longer used");
        return ExitCode.Success;
    }

    private static FailureException Ended(Exception failure, WatchReport last)
    {
        string local = ControlProgress.Percent(last.Blocks - last.MissingBlocks, last.Blocks);
        return new FailureException(failure is IOException
            ? $"the proxy has ended; when it was last seen, {local} % of the disk was local ({failure.Message})"
            : $"the proxy cannot be watched any more: {failure.Message}");
    }

    /// <summary>Waits for something new, at most a second, and adds the reports that have come.</summary>
    /// <returns>True when no more reports will come.</returns>
    private bool WaitForChange(WatchHistory history)
    {
        lock (_gate)
        {
            if (_reports.Count == 0 && !_isChanged && _failure is null)
                Monitor.Wait(_gate, TimeSpan.FromSeconds(1));
            _isChanged = false;
            while (_reports.TryDequeue(out WatchReport? report))
                history.Add(report);
            return _failure is not null;
        }
    }

    /// <summary>How long the proxy has not answered; zero if that is no cause for concern.</summary>
    private TimeSpan Unanswered()
    {
        long asked = Interlocked.Read(ref _askedAt);
        TimeSpan time = asked == 0 ? TimeSpan.Zero : Stopwatch.GetElapsedTime(asked);
        return time >= s_maxAnswer ? time : TimeSpan.Zero;
    }

    private void Wake()
    {
        lock (_gate)
        {
            _isChanged = true;
            Monitor.PulseAll(_gate);
        }
    }

    private void SetCells(int cells)
    {
        cells = Math.Clamp(cells, 1, OriginCache.MaxCells);
        lock (_gate)
        {
            if (_cells == cells)
                return;
            (_cells, _isHurried) = (cells, true);
            Monitor.PulseAll(_gate);
        }
    }

    /// <summary>A thread: asks for reports.</summary>
    private void AskAgain(ControlClient client)
    {
        int losses = 0; // of the channel, since the last report
        while (true)
        {
            lock (_gate)
            {
                long start = Stopwatch.GetTimestamp();
                while (!_isHurried && _interval - Stopwatch.GetElapsedTime(start) is var left && left > TimeSpan.Zero)
                    Monitor.Wait(_gate, left);
                _isHurried = false;
            }

            try
            {
                WatchReport report = Ask(client);
                losses = 0;
                lock (_gate)
                {
                    _reports.Enqueue(report);
                    Monitor.PulseAll(_gate);
                }
            }
            catch (Exception failure)
            {
                // The channel may have pushed this client out, or the proxy was started anew.
                client.Dispose();
                Exception? end = failure is not IOException ? failure
                    : ++losses > MaxLosses ? new FailureException("too many use its control channel at once")
                    : Reconnect(ref client);
                if (end is null)
                    continue;
                lock (_gate)
                {
                    _failure = end;
                    Monitor.PulseAll(_gate);
                }

                return;
            }
        }
    }

    private Exception? Reconnect(ref ControlClient client)
    {
        try
        {
            client = _connect();
            return null;
        }
        catch (FailureException failure)
        {
            return new IOException(failure.Message);
        }
    }

    private WatchReport Ask(ControlClient client)
    {
        int cells;
        lock (_gate)
            cells = _cells;
        Interlocked.Exchange(ref _askedAt, Stopwatch.GetTimestamp());
        try
        {
            JsonNode? answer = client.Call("watch", new JsonObject { ["cells"] = cells });
            return WatchReport.TryRead(answer)
                ?? throw new FailureException("what the proxy reports cannot be read: it has another version");
        }
        catch (ControlException failure) when (failure.Code == ControlException.NoSuchMethod)
        {
            throw new FailureException("this proxy is older than this program, and cannot be watched: use --query");
        }
        finally
        {
            Interlocked.Exchange(ref _askedAt, 0);
        }
    }
}
