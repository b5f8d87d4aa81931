namespace Xnbd.Bench;

/// <summary>What goes to stderr while the benchmark runs: one line that changes, and lines that stay.</summary>
internal static class Progress
{
    /// <summary>Shows what is under way, on a terminal.</summary>
    public static void Show(string text)
    {
        if (!Console.IsErrorRedirected)
            Console.Error.Write($"\r\e[K{text}");
    }

    /// <summary>Prints a line that stays.</summary>
    public static void Say(string text)
    {
        Show("");
        Console.Error.WriteLine(text);
    }
}
