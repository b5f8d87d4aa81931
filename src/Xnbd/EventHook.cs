using System.Collections;
using Microsoft.Extensions.Logging;
using Xnbd.Linux;

namespace Xnbd.Programs;

/// <summary>
/// Runs a program of the administrator for each event, one after the other, in the order of the events. The program
/// gets the event in its environment; there is no shell, and no argument.
/// <para>
/// Nobody waits for it: events go into a queue of bounded length, and a thread of its own takes them. A program that
/// takes too long is killed with all that it has started. So at most one program runs at a time.
/// </para>
/// <para>
/// Any thread may call anything. <c>_lock</c> guards the queue; nothing else is done while it is held.
/// </para>
/// What survives: nothing. At the end of the server, waiting events are told for one more second; the rest are given
/// up.
/// </summary>
internal sealed class EventHook : IDisposable
{
    /// <summary>How many events wait at most: a flapping line makes a few in a minute.</summary>
    private const int MaxWaiting = 64;

    /// <summary>How long a program may run.</summary>
    private static readonly TimeSpan s_maxTime = TimeSpan.FromSeconds(60);

    /// <summary>How long the end of the server waits for the last events.</summary>
    private static readonly TimeSpan s_maxEnd = TimeSpan.FromSeconds(1);

    private readonly string _path;
    private readonly ILogger _log;
    private readonly object _lock = new(); // pulsed when an event has come, when one is told, and at the end
    private readonly Queue<(string Name, IReadOnlyList<string> Variables)> _waiting = new();
    private int _lost; // events for which there was no room, since the last one that was told
    private bool _isRunning;
    private bool _isEnding;

    /// <summary>Starts the thread.</summary>
    /// <param name="path">The program.</param>
    /// <param name="log">Told when the program fails.</param>
    /// <exception cref="FailureException">There is no such program, or no thread to spare.</exception>
    public EventHook(string path, ILogger log)
    {
        (_path, _log) = (path, log);
        if (!LinuxChild.CanStart(path))
            throw new FailureException($"--on-event '{path}': there is no such program, or it cannot be executed");
        if (LinuxThread.TryStart("events", Run) is null)
            throw new FailureException("the system has no thread to spare");
    }

    /// <summary>Tells of an event, soon.</summary>
    /// <param name="name">Its name, for the log.</param>
    /// <param name="variables">What the program finds in its environment, each as <c>NAME=VALUE</c>.</param>
    public void Tell(string name, IReadOnlyList<string> variables)
    {
        lock (_lock)
        {
            if (_waiting.Count < MaxWaiting)
                _waiting.Enqueue((name, variables));
            else
                _lost++;
            Monitor.PulseAll(_lock);
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        long start = Environment.TickCount64;
        lock (_lock)
        {
            while (_waiting.Count > 0 || _isRunning)
            {
                TimeSpan left = s_maxEnd - TimeSpan.FromMilliseconds(Environment.TickCount64 - start);
                if (left <= TimeSpan.Zero)
                    break;
                Monitor.Wait(_lock, left);
            }

            _isEnding = true;
            Monitor.PulseAll(_lock);
        }
    }

    private void Run()
    {
        while (true)
        {
            string name;
            IReadOnlyList<string> variables;
            int lost;
            lock (_lock)
            {
                _isRunning = false;
                Monitor.PulseAll(_lock);
                while (_waiting.Count == 0 && !_isEnding)
                    Monitor.Wait(_lock);
                if (_isEnding)
                    return;
                (name, variables) = _waiting.Dequeue();
                (lost, _lost, _isRunning) = (_lost, 0, true);
            }

            if (lost > 0)
                _log.LogWarning("{Count} events were not told to '{Path}': it is too slow", lost, _path);
            try
            {
                RunProgram(name, variables);
            }
            catch (Exception failure)
            {
                // For example, memory is short. The next event may be told again.
                _log.LogWarning("the event {Event} was not told to '{Path}': {Cause}", name, _path, failure.Message);
            }
        }
    }

    private void RunProgram(string name, IReadOnlyList<string> variables)
    {
        string[] inherited =
        [
            .. Environment.GetEnvironmentVariables().Cast<DictionaryEntry>()
                .Select(variable => $"{variable.Key}={variable.Value}")
                .Where(variable => !variable.StartsWith(ProxyEvents.Prefix, StringComparison.Ordinal)),
        ];
        Errno errno = LinuxChild.Start(_path, [.. inherited, .. variables], out LinuxChild? child);
        if (errno != Errno.None)
        {
            _log.LogWarning("the event {Event} was not told to '{Path}': {Cause}", name, _path, errno.Describe());
            return;
        }

        long start = Environment.TickCount64;
        int exitCode;
        bool isKilled = false;
        for (int pause = 1; !child!.TryWait(out exitCode); pause = Math.Min(2 * pause, 100))
        {
            if (!isKilled && Environment.TickCount64 - start > s_maxTime.TotalMilliseconds)
            {
                child.Kill();
                isKilled = true;
            }

            Thread.Sleep(pause);
        }

        if (isKilled)
            _log.LogWarning(
                "'{Path}' was killed: it took more than {Seconds} s for the event {Event}",
                _path,
                s_maxTime.TotalSeconds,
                name);
        else if (exitCode != 0)
            _log.LogWarning(
                "'{Path}' failed for the event {Event}: {Kind} {Code}",
                _path,
                name,
                exitCode > 0 ? "exit status" : "signal",
                Math.Abs(exitCode));
    }
}
