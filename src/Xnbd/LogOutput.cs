using System.Collections.Concurrent;
using System.Globalization;
using System.Text;
using Microsoft.Extensions.Logging;
using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;

namespace Xnbd.Programs;

/// <summary>
/// The outputs of the log: stderr, a file, the system log, or several of them. A separate thread writes the lines, so a
/// log that cannot be written, or that nobody reads, never stops the service. Lines for which there is no room are
/// counted and dropped.
/// </summary>
/// <param name="program">The program's name, at the start of each line on stderr.</param>
/// <param name="toStderr">Log to stderr.</param>
/// <param name="path">Log to this file; null for none.</param>
/// <param name="toSyslog">Log to the system log.</param>
internal sealed class LogOutput(string program, bool toStderr, string? path, bool toSyslog) : ILogger
{
    /// <summary>Lines that may wait to be written: a burst of a thousand clients.</summary>
    private const int MaxWaiting = 4096;

    private readonly BlockingCollection<(LogLevel Level, DateTime Time, string Message)> _lines = new(MaxWaiting);
    private readonly Lock _fileLock = new();
    private Thread? _writer;
    private SafeFileHandle? _file;
    private long _dropped;

    /// <summary>
    /// Lines on stderr begin with time and level: stderr is neither a terminal nor the journal, which records them
    /// itself.
    /// </summary>
    private readonly bool _isStderrStamped = toStderr && Console.IsErrorRedirected && !IsJournal();

    /// <summary>Lines go elsewhere than to stderr.</summary>
    public bool IsElsewhere => path is not null || toSyslog;

    /// <summary>Opens the outputs.</summary>
    /// <exception cref="FailureException">The log file cannot be opened.</exception>
    public void Open()
    {
        if (toSyslog)
            LinuxSyslog.Open(program);
        if (path is not null && LinuxFile.Open(path, OpenMode.Append, out _file) is var errno and not Errno.None)
            throw new FailureException($"cannot open the log file '{path}': {Describe(errno)}");
        _writer = LinuxThread.TryStart("log", WriteLines)
            ?? throw new FailureException("the system has no thread to spare");
    }

    private static string Describe(Errno errno)
        => errno == Errno.ENXIO ? "it is a pipe that nobody reads" : errno.Describe();

    /// <summary>Opens the log file again, after it was moved away; keeps the old one if that fails.</summary>
    public void Reopen()
    {
        if (path is null)
            return;
        Errno errno = LinuxFile.Open(path, OpenMode.Append, out SafeFileHandle? file);
        if (errno != Errno.None)
        {
            this.LogError("cannot reopen the log file: {Cause}", Describe(errno));
            return;
        }

        lock (_fileLock)
        {
            _file?.Dispose();
            _file = file;
        }
    }

    /// <summary>Writes the lines that wait, if that takes only a moment. Nothing can be logged afterwards.</summary>
    public void Close()
    {
        _lines.CompleteAdding();
        _writer?.Join(TimeSpan.FromSeconds(1));
    }

    /// <inheritdoc/>
    public bool IsEnabled(LogLevel logLevel) => logLevel >= LogLevel.Information;

    /// <inheritdoc/>
    public IDisposable? BeginScope<TState>(TState state)
        where TState : notnull => null;

    /// <inheritdoc/>
    public void Log<TState>(
        LogLevel logLevel,
        EventId eventId,
        TState state,
        Exception? exception,
        Func<TState, Exception?, string> formatter)
    {
        if (!IsEnabled(logLevel) || _lines.IsAddingCompleted)
            return;
        try
        {
            if (!_lines.TryAdd((logLevel, DateTime.Now, formatter(state, exception))))
                Interlocked.Increment(ref _dropped);
        }
        catch (InvalidOperationException)
        {
            // The log has just been closed.
        }
    }

    private void WriteLines()
    {
        foreach ((LogLevel level, DateTime time, string message) in _lines.GetConsumingEnumerable())
        {
            Write(level, time, message);
            long dropped = Interlocked.Exchange(ref _dropped, 0);
            if (dropped > 0)
                Write(LogLevel.Warning, DateTime.Now, $"{dropped} log lines could not be written in time");
        }
    }

    private void Write(LogLevel level, DateTime time, string message)
    {
        (string word, SyslogSeverity severity) = level switch
        {
            LogLevel.Information => ("info", SyslogSeverity.Information),
            LogLevel.Warning => ("warning", SyslogSeverity.Warning),
            _ => ("error", SyslogSeverity.Error),
        };
        message = message.ReplaceLineEndings(" | "); // one event, one line
        if (message.Any(char.IsControl))
            message = string.Concat(message.Select(c => char.IsControl(c) ? '?' : c)); // of a name, for example
        if (toStderr)
        {
            string line = _isStderrStamped ? $"{Stamp(time)} {program}: {word}: {message}" : $"{program}: {message}";
            StandardError.WriteLine(line);
        }

        lock (_fileLock)
        {
            if (_file is not null)
            {
                _ = LinuxFile.Append(_file, Encoding.UTF8.GetBytes($"{Stamp(time)} {word}: {message}\n"));
            }
        }

        if (toSyslog)
            LinuxSyslog.Write(severity, message);
    }

    private static string Stamp(DateTime time)
        => time.ToString("yyyy-MM-ddTHH:mm:ss.fffzzz", CultureInfo.InvariantCulture);

    /// <summary>
    /// Whether stderr is the journal's stream: <c>JOURNAL_STREAM</c> names device and inode, systemd.exec(5).
    /// </summary>
    private static bool IsJournal()
    {
        if (Environment.GetEnvironmentVariable("JOURNAL_STREAM")?.Split(':') is not [string device, string inode]
            || LinuxFile.Status(StandardError.Handle, out FileStatus status) != Errno.None)
            return false;
        return inode == status.Inode.ToString(CultureInfo.InvariantCulture)
            && device == status.DeviceNumber.ToString(CultureInfo.InvariantCulture);
    }
}
