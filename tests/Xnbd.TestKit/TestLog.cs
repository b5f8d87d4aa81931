using Microsoft.Extensions.Logging;

namespace Xnbd.TestKit;

/// <summary>A log that hands each line to a test, on the thread that logs.</summary>
/// <param name="write">Takes the level, the name of the event (null if it has none), and the line.</param>
public sealed class TestLog(Action<LogLevel, string?, string> write) : ILogger
{
    /// <inheritdoc/>
    public IDisposable? BeginScope<TState>(TState state)
        where TState : notnull => null;

    /// <inheritdoc/>
    public bool IsEnabled(LogLevel logLevel) => true;

    /// <inheritdoc/>
    public void Log<TState>(
        LogLevel logLevel,
        EventId eventId,
        TState state,
        Exception? exception,
        Func<TState, Exception?, string> formatter)
        => write(logLevel, eventId.Name, formatter(state, exception));
}
