namespace Xnbd.Server.Tests;

public class AdaptivePollTests
{
    [Fact]
    public void A_client_that_is_slow_is_never_polled_for()
    {
        var poll = new AdaptivePoll();
        for (int i = 0; i < 1000; i++)
            poll.NoteBlockedTime(TimeSpan.FromMilliseconds(10)); // 100 requests a second
        Assert.False(poll.HasCredit);
    }

    [Fact]
    public void A_client_that_is_quick_is_polled_for_until_it_slows_down()
    {
        var poll = new AdaptivePoll();
        for (int i = 0; i < 4; i++)
            poll.NoteBlockedTime(TimeSpan.FromMicroseconds(30));
        Assert.True(poll.HasCredit);
        for (int i = 0; i < 20; i++)
            poll.NoteBlockedTime(TimeSpan.FromMilliseconds(1));
        Assert.False(poll.HasCredit);
    }
}
