using System.Text.Json.Nodes;
using Microsoft.Extensions.Logging;
using Xnbd.Server;
using Xnbd.Storage;
using Xnbd.Storage.Images;
using Xnbd.Storage.Layers;

namespace Xnbd.Programs.Serving;

/// <summary>What a <see cref="LocalDisk"/> is made of.</summary>
internal record LocalDiskOptions
{
    /// <summary>The image; with copy-on-write its base.</summary>
    public required string Image { get; init; }

    /// <summary>Writing is refused.</summary>
    public bool ReadOnly { get; init; }

    /// <summary>The format of the image that the user has given; null for none.</summary>
    public string? Format { get; init; }

    /// <summary>Other programs may write the image at the same time.</summary>
    public bool IsShared { get; init; }

    /// <summary>The image never changes; writes go to a layer.</summary>
    public bool CowTarget { get; init; }

    /// <summary>Where a layer that is not kept is made; null for beside the image.</summary>
    public string? CowDirectory { get; init; }

    /// <summary>Layers that are kept, from the bottom up; none for one that is not kept.</summary>
    public IReadOnlyList<string> CowLayers { get; init; } = [];

    /// <summary>Layers are used although what they stand on has changed.</summary>
    public bool Force { get; init; }

    /// <summary>Checks that the options go together.</summary>
    /// <exception cref="UsageException">They do not.</exception>
    public void Validate()
    {
        if (!CowTarget && (CowDirectory is not null || CowLayers.Count > 0 || Force))
            throw new UsageException("--cow-dir, --cow-layer and --force go with --cow-target only");
        if (CowDirectory is not null && CowLayers.Count > 0)
            throw new UsageException("--cow-dir is for layers that are not kept: give --cow-layer a path instead");
        if (Force && CowLayers.Count == 0)
            throw new UsageException("--force goes with --cow-layer only");
        if (Format is not (null or ImageFormat.Raw))
        {
            throw new UsageException(
                $"--format {Format}: images are served as raw bytes only "
                + "(qemu-img converts others, qemu-nbd serves them)");
        }
    }
}

/// <summary>An image of this machine, served as it is (target), or under a layer (copy-on-write target).</summary>
internal sealed class LocalDisk : ServedDisk
{
    private readonly LocalDiskOptions _options;

    /// <summary>Opens the image, and its layers; warns if the user may have meant something else.</summary>
    /// <exception cref="DiskException">A file cannot be used.</exception>
    /// <exception cref="FailureException">The image is in use.</exception>
    public LocalDisk(LocalDiskOptions options, ILogger log, CancellationToken stop)
        : base(log, stop)
    {
        _options = options;
        Disk = Compose();
        if (options.Format is null)
            WarnOfFormat();
    }

    /// <inheritdoc/>
    public override string Mode => _options.CowTarget ? "cow-target" : "target";

    /// <inheritdoc/>
    public override Disk Disk { get; }

    /// <inheritdoc/>
    public override ImageFile? Image => Disk as ImageFile;

    /// <inheritdoc/>
    public override string FilePath => _options.Image;

    /// <inheritdoc/>
    public override string Description
    {
        get
        {
            string layers = string.Concat(_options.CowLayers.Select(path => $" + '{path}'"));
            string access = _options.ReadOnly ? "read-only"
                : _options.CowTarget && _options.CowLayers.Count == 0 ? "changes are lost when the server ends"
                : "read-write";
            return $"'{_options.Image}'{layers}, {Disk.Length} bytes, {access}";
        }
    }

    /// <inheritdoc/>
    public override void Abandon() => LayerStack.Abandon(Disk);

    /// <inheritdoc/>
    protected override JsonObject Query()
    {
        ServerTraffic traffic = Traffic();
        return new JsonObject
        {
            ["mode"] = Mode,
            ["image"] = _options.Image,
            ["layers"] = new JsonArray([.. _options.CowLayers.Select(path => JsonValue.Create(path))]),
            ["kept"] = !_options.CowTarget || _options.CowLayers.Count > 0,
            ["size"] = Disk.Length,
            ["read-only"] = _options.ReadOnly,
            ["clients"] = traffic.Connections,
            ["read-bytes"] = traffic.ReadBytes,
            ["written-bytes"] = traffic.WrittenBytes,
            ["snapshot"] = Snapshots.LastStatus,
        };
    }

    /// <inheritdoc/>
    protected override void Close() => Disk.Dispose();

    private void WarnOfFormat()
    {
        if (LayerStack.ImageOf(Disk) is not { } image)
            return;
        if (image.Length == 0)
        {
            Log.LogWarning(
                "'{Image}' is empty: clients see a disk of 0 bytes (if that is meant: --format raw)", _options.Image);
        }
        else if (ImageFormat.Find(image) is { } format)
        {
            Log.LogWarning(
                "'{Image}' looks like {Article} {Format} image; it is served as raw bytes "
                    + "(if that is meant: --format raw)",
                _options.Image,
                format[0] is 'x' ? "an" : "a",
                format);
        }
    }

    /// <summary>Composes the disk. This is where the modes of local images are defined.</summary>
    private Disk Compose()
    {
        if (_options.CowLayers.Count > 0)
        {
            return LayerStack.OpenKept(
                _options.Image,
                _options.CowLayers,
                _options.ReadOnly,
                _options.Force,
                what => Log.LogWarning("{What}; used all the same, as --force says", what));
        }

        if (_options.CowTarget)
        {
            return LayerStack.OpenDisposable(
                _options.Image,
                _options.CowDirectory,
                _options.ReadOnly,
                path => Log.LogWarning("removed a layer that a killed server left: {Path}", path));
        }

        ImageFile image = OpenTarget();
        foreach (string abandoned in _options.ReadOnly ? [] : image.RemoveAbandonedSnapshots())
            Log.LogWarning("removed an unfinished snapshot that a killed server left: {Path}", abandoned);
        return image;
    }

    private ImageFile OpenTarget()
    {
        try
        {
            return ImageFile.Open(
                _options.Image, _options.ReadOnly, _options.IsShared ? ImageUse.Shared : ImageUse.OnlyWriter);
        }
        catch (InUseException failure) when (failure.Conflict == UseConflict.AnotherWriter)
        {
            throw new FailureException(
                failure.Message
                + "; servers that are meant to write one image together need --share-image, each of them");
        }
    }
}
