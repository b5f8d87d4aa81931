using System.Globalization;
using Microsoft.Extensions.Logging;
using Xnbd.Linux;

namespace Xnbd.Programs;

/// <summary>
/// Where log lines go: stderr, a file, the system log, or several of them. A log that cannot be written (a full disk)
/// never stops the service.
/// </summary>
/// <param name="program">Named at the start of each line on stderr.</param>
/// <param name="toStderr">Log to stderr.</param>
/// <param name="path">Log to this file; null for none.</param>
/// <param name="toSyslog">Log to the system log.</param>
internal sealed class LogOutput(string program, bool toStderr, string? path, bool toSyslog) : ILogger
{
    private readonly Lock _lock = new();
    private StreamWriter? _file;

    /// <summary>Lines go somewhere else than stderr.</summary>
    public bool IsElsewhere => path is not null || toSyslog;

    /// <summary>Opens the outputs.</summary>
    /// <exception cref="FailureException">The log file cannot be opened.</exception>
    public void Open()
    {
        if (toSyslog)
            LinuxSyslog.Open(program);
        try
        {
            _file = OpenFile();
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            throw new FailureException($"cannot open the log file: {failure.Message}");
        }
    }

    /// <summary>Opens the log file anew, after it was moved away; keeps the old one when that fails.</summary>
    public void Reopen()
    {
        try
        {
            StreamWriter? file = OpenFile();
            lock (_lock)
            {
                _file?.Dispose();
                _file = file;
            }
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            this.LogError("cannot reopen the log file: {Cause}", failure.Message);
        }
    }

    /// <inheritdoc/>
    public bool IsEnabled(LogLevel logLevel) => logLevel >= LogLevel.Information;

    /// <inheritdoc/>
    public IDisposable? BeginScope<TState>(TState state)
        where TState : notnull => null;

    /// <inheritdoc/>
    public void Log<TState>(
        LogLevel logLevel, EventId eventId, TState state, Exception? exception, Func<TState, Exception?, string> formatter)
    {
        if (!IsEnabled(logLevel))
            return;
        string message = formatter(state, exception);
        (string word, SyslogSeverity severity) = logLevel switch
        {
            LogLevel.Information => ("info", SyslogSeverity.Information),
            LogLevel.Warning => ("warning", SyslogSeverity.Warning),
            _ => ("error", SyslogSeverity.Error),
        };
        lock (_lock)
        {
            try
            {
                if (toStderr)
                    Console.Error.WriteLine($"{program}: {message}");
                _file?.WriteLine($"{DateTime.Now.ToString("yyyy-MM-ddTHH:mm:ss.fffzzz", CultureInfo.InvariantCulture)} {word}: {message}");
            }
            catch (IOException)
            {
                // Nobody can be told.
            }
        }

        if (toSyslog)
            LinuxSyslog.Write(severity, message);
    }

    private StreamWriter? OpenFile() => path is null
        ? null
        : new StreamWriter(new FileStream(path, FileMode.Append, FileAccess.Write, FileShare.ReadWrite | FileShare.Delete, bufferSize: 1))
        {
            AutoFlush = true,
        };
}
