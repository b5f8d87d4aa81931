using Xnbd.Programs.Serving;
using Xnbd.Server;

namespace Xnbd.Programs.Wrapper;

/// <summary>What becomes of an export.</summary>
internal enum EntryState
{
    /// <summary>Its disk is being opened.</summary>
    Opening,

    /// <summary>Clients are served.</summary>
    Served,

    /// <summary>Its disk could not be opened; this is tried again from time to time.</summary>
    Failed,

    /// <summary>It was removed; clients that are in may go on.</summary>
    Leaving,
}

/// <summary>
/// An export of <c>xnbd-wrapper</c>: its definition, and what serves it. <c>WrapperExports._lock</c> guards it.
/// </summary>
internal sealed class WrapperEntry(ExportDefinition definition)
{
    /// <summary>What it is made of.</summary>
    public ExportDefinition Definition { get; set; } = definition;

    /// <summary>The state file has it. Otherwise it is of the command line, or is just being added.</summary>
    public bool IsKept { get; set; }

    /// <summary>The files that it uses, as they were found.</summary>
    public FileUse[] Files { get; set; } = [];

    /// <summary>What becomes of it.</summary>
    public EntryState State { get; set; } = EntryState.Opening;

    /// <summary>Why it could not be opened, or closed; null if all is well.</summary>
    public string? Problem { get; set; }

    /// <summary>The disk, once it is open.</summary>
    public ServedDisk? Served { get; set; }

    /// <summary>The export, once it is open.</summary>
    public Export? Export { get; set; }

    /// <summary>It uses its files.</summary>
    public bool HoldsFiles => State != EntryState.Failed;
}
