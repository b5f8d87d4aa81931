using Microsoft.Extensions.Logging;

namespace Xnbd.Programs.Wrapper;

/// <summary>The log of one export of many: its name stands before each message.</summary>
internal sealed class ExportLog(string name, ILogger log) : ILogger
{
    /// <inheritdoc/>
    public bool IsEnabled(LogLevel logLevel) => log.IsEnabled(logLevel);

    /// <inheritdoc/>
    public IDisposable? BeginScope<TState>(TState state)
        where TState : notnull => log.BeginScope(state);

    /// <inheritdoc/>
    public void Log<TState>(
        LogLevel logLevel,
        EventId eventId,
        TState state,
        Exception? exception,
        Func<TState, Exception?, string> formatter)
        => log.Log(logLevel, eventId, state, exception, (s, e) => $"'{name}': {formatter(s, e)}");
}
