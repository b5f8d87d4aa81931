using Xnbd.Fuzz.Targets;

namespace Xnbd.Fuzz;

/// <summary>One thing that is fuzzed: code that takes bytes of somebody who is not trusted.</summary>
public abstract class FuzzTarget
{
    /// <summary>
    /// All targets, by name: on the command line, and of their folders in the corpus. A target is made when it is run:
    /// instrumented code needs the memory that <c>SharpFuzz</c> sets up first.
    /// </summary>
    public static IReadOnlyDictionary<string, Func<FuzzTarget>> All { get; } = new Dictionary<string, Func<FuzzTarget>>
    {
        ["handshake"] = () => new HandshakeTarget(),
        ["options"] = () => new OptionTarget(),
        ["requests"] = () => new RequestTarget(),
        ["remote-handshake"] = () => new RemoteHandshakeTarget(),
        ["remote-replies"] = () => new RemoteReplyTarget(),
        ["map"] = () => new MapTarget(),
        ["layer"] = () => new LayerTarget(),
        ["control"] = () => new ControlTarget(),
    };

    /// <summary>Runs the code on one input. It can be called any number of times, on one thread.</summary>
    /// <exception cref="CheckException">The code has broken a rule.</exception>
    /// <remarks>Any other exception is a defect, too.</remarks>
    public abstract void Run(byte[] input);

    /// <summary>Small inputs that reach different parts of the code, each with a name for its file.</summary>
    public abstract IEnumerable<(string Name, byte[] Input)> Seeds();
}

/// <summary>The code under test has broken a rule; the message says which.</summary>
public sealed class CheckException(string message) : Exception(message);

/// <summary>Rules that hold for every input.</summary>
internal static class Check
{
    /// <summary>Fails when a condition does not hold.</summary>
    /// <param name="holds">The condition.</param>
    /// <param name="rule">The rule in words.</param>
    public static void That(bool holds, string rule)
    {
        if (!holds)
            throw new CheckException($"broken: {rule}");
    }
}
