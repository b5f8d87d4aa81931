namespace Xnbd.Control;

/// <summary>A call failed; the message says why.</summary>
/// <param name="code">JSON-RPC's number for the kind of failure.</param>
/// <param name="message">For people.</param>
public sealed class ControlException(int code, string message) : Exception(message)
{
    /// <summary>The method does not exist.</summary>
    public const int NoSuchMethod = -32601;

    /// <summary>The parameters are wrong.</summary>
    public const int InvalidParameters = -32602;

    /// <summary>The line is no JSON.</summary>
    public const int ParseError = -32700;

    /// <summary>The line is JSON, but no request.</summary>
    public const int InvalidRequest = -32600;

    /// <summary>What was asked for could not be done.</summary>
    public const int Failed = 1;

    /// <summary>The kind of failure.</summary>
    public int Code { get; } = code;
}
