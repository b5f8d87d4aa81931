namespace Xnbd.Programs;

/// <summary>Exit codes of all programs.</summary>
internal static class ExitCode
{
    /// <summary>Success.</summary>
    public const int Success = 0;

    /// <summary>Something failed; a line on stderr says what.</summary>
    public const int Failure = 1;

    /// <summary>The command line is wrong; nothing was done.</summary>
    public const int Usage = 2;
}

/// <summary>The command line is wrong; the message says why.</summary>
internal sealed class UsageException(string message) : Exception(message);

/// <summary>The program cannot do what it was told to do; the message says why.</summary>
internal sealed class FailureException(string message) : Exception(message);
