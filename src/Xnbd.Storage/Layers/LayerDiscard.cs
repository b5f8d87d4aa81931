using Xnbd.Storage.Maps;

namespace Xnbd.Storage.Layers;

/// <summary>
/// Empties a layer that is not being served, and binds it to its base as the base is now. If the process dies
/// meanwhile, the layer is marked (<see cref="MapFlags.Discarding"/>), and nothing serves it until a second call has
/// completed this.
/// </summary>
public static class LayerDiscard
{
    /// <summary>Empties a layer.</summary>
    /// <param name="path">The layer.</param>
    /// <param name="basePath">Where the base stands now; null for where the layer's header says.</param>
    /// <exception cref="DiskException">
    /// A file cannot be opened, a commit was interrupted, or a write failed.
    /// </exception>
    public static void Run(string path, string? basePath)
    {
        using LayerFile layer = LayerFile.Open(path, readOnly: false);
        MapHeader header = layer.Map.Header;
        if ((header.Flags & MapFlags.Disposable) != 0)
        {
            throw new DiskException(
                DiskError.Permission,
                $"layer '{path}' was made to be thrown away: the next server on its base removes it");
        }

        if ((header.Flags & MapFlags.Committing) != 0)
        {
            throw new DiskException(
                DiskError.Permission,
                $"a commit of '{path}' was interrupted: its base holds a part of the changes, and needs the rest; "
                    + "nothing was discarded");
        }

        string below = Path.GetFullPath(basePath ?? header.Source.Path);
        bool isLayer = (header.Flags & MapFlags.BaseIsLayer) != 0;
        using Disk baseDisk = LayerStack.OpenBase(below, isLayer, isStackWritten: true);
        BaseIdentity.ValidateLength(path, header.Source.Length, below, baseDisk.Length);
        layer.Map.PrepareToWrite();
        layer.Clear(BaseIdentity.Of(below, baseDisk));
    }
}
