using System.Text.Json.Nodes;
using Microsoft.Extensions.Logging;
using Xnbd.Programs.Serving;
using Xnbd.Protocol;

namespace Xnbd.Programs.Wrapper;

/// <summary>
/// What an export of <c>xnbd-wrapper</c> is made of: one entry of the state file (docs/formats.md), which is kept as it
/// was written, with members that this program does not know. It never changes.
/// </summary>
internal sealed class ExportDefinition
{
    /// <summary>The mode of an image that is served as it is.</summary>
    public const string Target = "target";

    /// <summary>The mode of a base that never changes, under a layer.</summary>
    public const string CowTarget = "cow-target";

    /// <summary>The mode of a cache of a remote disk.</summary>
    public const string Proxy = "proxy";

    private readonly JsonObject _json;

    /// <summary>Takes an entry.</summary>
    /// <param name="name">The export's name.</param>
    /// <param name="json">The entry; a copy is kept.</param>
    /// <exception cref="FailureException">It is no definition; the message says why.</exception>
    public ExportDefinition(string name, JsonObject json)
    {
        (Name, _json) = (name, json.DeepClone().AsObject());
        if (name.Length == 0)
            throw new FailureException("an export needs a name");
        if (NbdString.FindFault(name) is { } fault)
            throw new FailureException($"the name of the export: {fault}");
        Mode = Text("mode") ?? throw new FailureException("mode is missing");
        if (Mode is not (Target or CowTarget or Proxy))
            throw new FailureException($"mode '{Mode}' is unknown: {Target}, {CowTarget} or {Proxy}");
        Image = FilePath("image_path") ?? throw new FailureException("image_path is missing");
        IsReadOnly = Flag("read_only");
        if (Mode == CowTarget)
        {
            Layer = FilePath("layer_path");
            CowDirectory = FilePath("cow_dir");
            if (Layer is not null && CowDirectory is not null)
                throw new FailureException("cow_dir is for layers that are not kept: layer_path has a path");
        }
        else if (Mode == Proxy)
        {
            Map = FilePath("bitmap_path") ?? throw new FailureException("bitmap_path is missing");
            ControlSocket = FilePath("control_socket_path")
                ?? throw new FailureException("control_socket_path is missing");
            _ = ProxyOptionsOf(new WrapperOptions()); // validates the remote
        }
    }

    /// <summary>The export's name.</summary>
    public string Name { get; }

    /// <summary>One of the modes above.</summary>
    public string Mode { get; }

    /// <summary>The image, the base, or the cache image: a full path.</summary>
    public string Image { get; }

    /// <summary>Writing is refused.</summary>
    public bool IsReadOnly { get; }

    /// <summary>A layer that is kept; null for none.</summary>
    public string? Layer { get; }

    /// <summary>Where a layer that is not kept is made; null for beside the base.</summary>
    public string? CowDirectory { get; }

    /// <summary>A proxy's map; null for the other modes.</summary>
    public string? Map { get; }

    /// <summary>A proxy's own control socket; null for the other modes.</summary>
    public string? ControlSocket { get; }

    /// <summary>The entry, as the state file has it.</summary>
    public JsonObject ToJson() => _json.DeepClone().AsObject();

    /// <summary>Whether both describe the same export.</summary>
    public bool IsSame(ExportDefinition other) => Name == other.Name && JsonNode.DeepEquals(_json, other._json);

    /// <summary>The same export with some members replaced.</summary>
    public ExportDefinition With(params (string Member, string? Value)[] members)
    {
        JsonObject json = ToJson();
        foreach ((string member, string? value) in members)
            json[member] = value;
        return new ExportDefinition(Name, json);
    }

    /// <summary>The files that it uses. The call may wait for a file system that does not answer.</summary>
    /// <param name="options">Options that hold for all exports.</param>
    public FileUse[] Files(WrapperOptions options)
    {
        bool isReadOnly = IsReadOnly || options.ReadOnly;
        bool isImageChanged = Mode == Proxy || (Mode == Target && !isReadOnly && !options.Cow);
        List<FileUse> files = [FileUse.Of(Image, isImageChanged)];
        if (Layer is not null)
            files.Add(FileUse.Of(Layer, !isReadOnly));
        if (Map is not null)
            files.Add(FileUse.Of(Map, isChanged: true));
        return [.. files];
    }

    /// <summary>Opens the disk.</summary>
    /// <param name="options">Options that hold for all exports.</param>
    /// <param name="log">Receives what happens to it.</param>
    /// <param name="stop">Ends what takes long.</param>
    /// <exception cref="FailureException">It cannot be opened.</exception>
    /// <exception cref="Storage.DiskException">A file cannot be used.</exception>
    public ServedDisk Open(WrapperOptions options, ILogger log, CancellationToken stop)
    {
        bool isReadOnly = IsReadOnly || options.ReadOnly;
        if (Mode == Proxy)
            return new ProxyMode(ProxyOptionsOf(options), isReadOnly, log, stop);
        return new LocalDisk(
            new LocalDiskOptions
            {
                Image = Image,
                ReadOnly = isReadOnly,
                CowTarget = Mode == CowTarget || options.Cow,
                CowLayers = Layer is null ? [] : [Layer],
                CowDirectory = CowDirectory,
            },
            log,
            stop);
    }

    private ProxyOptions ProxyOptionsOf(WrapperOptions options)
    {
        string host = Text("remote_host") ?? throw new FailureException("remote_host is missing");
        string port = Text("remote_port") ?? throw new FailureException("remote_port is missing");
        try
        {
            return new ProxyOptions
            {
                Remotes = [Client.RemoteAddress.Parse(host, port, Text("remote_export_name") ?? "")],
                CacheImage = Image,
                Map = Map!,
                ControlSocket = ControlSocket!,
                Connections = ProxyOptions.DefaultConnections,
                MaxRequests = options.MaxRequests,
                MaxBytes = options.MaxBytes,
            };
        }
        catch (FormatException failure)
        {
            throw new FailureException(failure.Message);
        }
    }

    /// <returns>A member that is a text, or a number; null if it is absent, or null.</returns>
    private string? Text(string member) => _json[member] switch
    {
        null => null,
        JsonValue value when value.TryGetValue(out string? text) => text,
        JsonValue value when value.TryGetValue(out long number)
            => number.ToString(System.Globalization.CultureInfo.InvariantCulture), // the port
        _ => throw new FailureException($"{member} is no text"),
    };

    private bool Flag(string member) => _json[member] switch
    {
        null => false,
        JsonValue value when value.TryGetValue(out bool flag) => flag,
        _ => throw new FailureException($"{member} is neither true nor false"),
    };

    private string? FilePath(string member) => Text(member) switch
    {
        null => null,
        "" => throw new FailureException($"{member} is empty"),
        var path when path.Contains('\0', StringComparison.Ordinal)
            => throw new FailureException($"{member} holds a NUL character"),
        var path when Path.IsPathFullyQualified(path) => Path.GetFullPath(path),
        var path => throw new FailureException($"{member}: '{path}' is no full path"),
    };
}
