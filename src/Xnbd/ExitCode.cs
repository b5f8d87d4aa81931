namespace Xnbd.Programs;

/// <summary>Exit codes of all programs.</summary>
internal static class ExitCode
{
    /// <summary>All went well.</summary>
    public const int Success = 0;

    /// <summary>Something failed; a line on stderr says what.</summary>
    public const int Failure = 1;

    /// <summary>The program was called in a wrong way; nothing was done.</summary>
    public const int Usage = 2;
}

/// <summary>The program was called in a wrong way.</summary>
internal sealed class UsageException(string message) : Exception(message);

/// <summary>The program cannot do what it was asked to; the message says why.</summary>
internal sealed class FailureException(string message) : Exception(message);
