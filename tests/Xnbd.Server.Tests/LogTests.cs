using Xnbd.Protocol;
using Xnbd.TestKit;

namespace Xnbd.Server.Tests;

/// <summary>What happens often is logged now and then, with a count: the clock is turned by hand.</summary>
public class LogTests
{
    private readonly TestClock _clock = new();
    private readonly List<string> _lines = [];
    private readonly TestLog _log;

    public LogTests() => _log = new TestLog((_, _, line) => _lines.Add(line));

    [Fact]
    public void Failures_are_logged_a_few_in_a_second_and_counted()
    {
        var log = new FailureLog(_log, _clock);
        for (int i = 0; i < 3 * ServerLimits.MaxLoggedFailures; i++)
            log.Log("peer", NbdCommand.Read, "broken");
        Assert.Equal(ServerLimits.MaxLoggedFailures, _lines.Count);
        _clock.Turn(TimeSpan.FromSeconds(1));
        log.Log("peer", NbdCommand.Read, "broken");
        Assert.Equal($"{2 * ServerLimits.MaxLoggedFailures} more requests failed within a second", _lines[^2]);
        Assert.Equal("peer: Read failed: broken", _lines[^1]);
        _clock.Turn(TimeSpan.FromSeconds(1));
        log.Log("peer", NbdCommand.Write, "broken");
        Assert.Equal(ServerLimits.MaxLoggedFailures + 3, _lines.Count);
    }

    [Fact]
    public void Refusals_are_logged_once_in_a_while_and_counted()
    {
        var log = new RefusalLog(_log, _clock);
        for (int i = 0; i < 5; i++)
            log.Log("full");
        Assert.Equal(["a connection was refused: full"], _lines);
        _clock.Turn(ServerLimits.RefusalLogPause);
        log.Log("full");
        Assert.Equal(["4 more connections were refused", "a connection was refused: full"], _lines.Skip(1));
    }
}
