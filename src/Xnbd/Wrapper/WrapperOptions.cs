using Xnbd.Programs.Serving;

namespace Xnbd.Programs.Wrapper;

/// <summary>What <c>xnbd-wrapper</c> is told to do.</summary>
internal sealed record WrapperOptions : ListenOptions
{
    public const string DefaultSocket = "/var/run/xnbd-wrapper.ctl";
    public const string DefaultState = "/var/lib/xnbd/xnbd.state";

    /// <summary>Images that are exported by their names as given; a name, and the full path.</summary>
    public IReadOnlyList<(string Name, string Path)> Images { get; init; } = [];

    /// <summary>The control socket.</summary>
    public string ControlPath { get; init; } = DefaultSocket;

    /// <summary>The state file.</summary>
    public string StatePath { get; init; } = DefaultState;

    /// <summary>All targets are copy-on-write targets, with layers that are not kept.</summary>
    public bool Cow { get; init; }

    /// <summary>All exports refuse writes.</summary>
    public bool ReadOnly { get; init; }

    /// <summary>The export that the empty name means; null for none.</summary>
    public string? DefaultExport { get; init; }

    /// <summary>Bounds of each proxy, as of <see cref="ProxyOptions"/>.</summary>
    public int MaxRequests { get; init; } = ProxyOptions.DefaultRequests;

    /// <summary>Likewise, in bytes.</summary>
    public int MaxBytes { get; init; } = ProxyOptions.DefaultBytes;

    /// <summary>A configuration of nbd-server that is to be taken over, in place of serving; null for none.</summary>
    public string? ImportPath { get; init; }

    /// <summary>What is taken over goes into the state file; otherwise it is printed.</summary>
    public bool Load { get; init; }

    /// <summary>Options of the original that have no effect here, and were given.</summary>
    public IReadOnlyList<string> WithoutEffect { get; init; } = [];
}
