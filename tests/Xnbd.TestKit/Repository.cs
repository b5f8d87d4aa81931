namespace Xnbd.TestKit;

/// <summary>The checkout that the tests belong to.</summary>
public static class Repository
{
    public static string Root { get; } = FindRoot();

    private static string FindRoot()
    {
        for (DirectoryInfo? folder = new(AppContext.BaseDirectory); folder is not null; folder = folder.Parent)
        {
            if (File.Exists(Path.Combine(folder.FullName, "xnbd.slnx")))
                return folder.FullName;
        }

        throw new InvalidOperationException("the tests do not stand in a checkout");
    }
}

/// <summary>Waiting with a deadline.</summary>
public static class Wait
{
    public static void Until(Func<bool> condition, string what, int seconds = 20)
    {
        DateTime deadline = DateTime.UtcNow.AddSeconds(seconds);
        while (!condition())
        {
            if (DateTime.UtcNow > deadline)
                throw new TimeoutException($"waited {seconds} s in vain until {what}");
            Thread.Sleep(2);
        }
    }

    /// <summary>Waits until a thread waits for another one: for a lock, a pulse or an event.</summary>
    public static void UntilBlocked(Thread thread, string what)
        => Until(() => (thread.ThreadState & ThreadState.WaitSleepJoin) != 0, what);
}
