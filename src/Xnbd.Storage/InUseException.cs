using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;

namespace Xnbd.Storage;

/// <summary>Why a file that is in use cannot be used as well.</summary>
public enum UseConflict
{
    /// <summary>One of the two programs needs the file alone.</summary>
    NeededAlone,

    /// <summary>Another program writes the file.</summary>
    AnotherWriter,

    /// <summary>Another program relies on the file staying as it is.</summary>
    MustNotChange,
}

/// <summary>A file cannot be opened, because another program uses it in a way that excludes this one.</summary>
public sealed class InUseException : DiskException
{
    /// <summary>Looks for the other program, and names it in the message.</summary>
    /// <param name="name">What is in use, for the message.</param>
    /// <param name="file">The open file.</param>
    /// <param name="conflict">Why the other use excludes this one.</param>
    /// <param name="reason">The same in words, for the message; null if it is plain.</param>
    /// <param name="lockedByte">The lock that the other program holds: a byte, or null for the whole file.</param>
    internal InUseException(
        string name, SafeFileHandle file, UseConflict conflict, string? reason = null, long? lockedByte = null)
        : base(DiskError.InUse, Describe(name, LockHolder.Find(file, lockedByte), reason)) => Conflict = conflict;

    /// <summary>Why the other use excludes this one.</summary>
    public UseConflict Conflict { get; }

    private static string Describe(string name, LockHolder? holder, string? reason)
    {
        string who = holder is null ? "" : $" by {holder.Program} (process {holder.ProcessId})";
        return $"{name} is in use{who}{(reason is null ? "" : ": " + reason)}";
    }
}
