using Xnbd.Protocol;
using Xnbd.Storage;

namespace Xnbd.Server;

/// <summary>A disk that clients can ask for by name.</summary>
/// <param name="name">The name by which clients ask for it; may be empty.</param>
/// <param name="description">A text for people, shown by <c>nbdinfo</c>.</param>
/// <param name="disk">The disk.</param>
/// <param name="canMultiConn">All connections that a client can open under this name see one disk, and a flush on one
/// of them covers writes on all. This is always true for the connections of one server. With a server for each
/// connection it is true if all servers write one file, but not if each has a layer or a cache of its own.</param>
public sealed class Export(string name, string description, Disk disk, bool canMultiConn = true)
{
    /// <summary>The name by which clients ask for it; may be empty.</summary>
    public string Name => name;

    /// <summary>A text for people, shown by <c>nbdinfo</c>.</summary>
    public string Description => description;

    /// <summary>The disk.</summary>
    public Disk Disk => disk;

    /// <summary>
    /// The ids of the proxies that reads pass through, asked for at each handshake; empty if there are none. They are
    /// told to clients that ask for the description; see <see cref="NbdProxyTrail"/>.
    /// </summary>
    public Func<IReadOnlyList<ulong>> Trail { get; init; } = () => [];

    /// <summary>Bounds what the clients of this export have in flight.</summary>
    public RequestLimits Limits { get; init; } = RequestLimits.Default;

    /// <summary>No session may begin any more. The server's lock guards it.</summary>
    internal bool IsRemoved { get; set; }

    /// <summary>Its clients have no time left to go on. The server's lock guards it.</summary>
    internal bool IsExpelled { get; set; }

    /// <summary>The description with the trail.</summary>
    internal string DescriptionAndTrail
        => Trail() is { Count: > 0 } ids ? NbdProxyTrail.Append(Description, ids) : Description;

    /// <summary>Writing is refused.</summary>
    public bool IsReadOnly => (Disk.Features & DiskFeatures.ReadOnly) != 0;

    /// <summary>The disk consists of layers, and tells which of them holds a block.</summary>
    public bool HasLayers => (Disk.Features & DiskFeatures.Layered) != 0;

    /// <summary>The transmission flags of a connection.</summary>
    /// <param name="structuredReplies">Structured replies have been negotiated; DF is offered only then.</param>
    public NbdTransmissionFlags TransmissionFlags(bool structuredReplies)
    {
        NbdTransmissionFlags flags = NbdTransmissionFlags.HasFlags | NbdTransmissionFlags.SendFlush
            | NbdTransmissionFlags.SendFua | NbdTransmissionFlags.SendCache;
        if (canMultiConn)
            flags |= NbdTransmissionFlags.CanMultiConn;
        flags |= IsReadOnly
            ? NbdTransmissionFlags.ReadOnly
            : NbdTransmissionFlags.SendTrim | NbdTransmissionFlags.SendWriteZeroes | NbdTransmissionFlags.SendFastZero;
        return structuredReplies ? flags | NbdTransmissionFlags.SendDf : flags;
    }
}
