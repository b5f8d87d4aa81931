using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;

namespace Xnbd.Storage;

/// <summary>Why a file that is in use cannot be used as well.</summary>
public enum UseConflict
{
    /// <summary>One of the two needs it alone.</summary>
    NeededAlone,

    /// <summary>Another program writes it.</summary>
    AnotherWriter,

    /// <summary>Another program relies on its staying as it is.</summary>
    MustNotChange,
}

/// <summary>A file cannot be opened, because another program uses it in a way that excludes this one.</summary>
public sealed class InUseException : DiskException
{
    /// <summary>Looks for the program, and names it.</summary>
    /// <param name="name">What is in use, for the message.</param>
    /// <param name="file">The open file.</param>
    /// <param name="conflict">Why that excludes this program.</param>
    /// <param name="reason">The same in words, for the message; null if it is plain.</param>
    /// <param name="lockedByte">The lock that the other one holds: a byte, or null for the whole file.</param>
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
