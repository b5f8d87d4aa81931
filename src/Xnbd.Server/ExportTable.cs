namespace Xnbd.Server;

/// <summary>
/// The exports of a server, by name. They may come and go at any time, on any thread; a handshake sees the table as it
/// is at that moment. <see cref="NbdServer.Remove"/> ends the sessions of one, too.
/// </summary>
public sealed class ExportTable
{
    private readonly Lock _changing = new();
    private volatile Contents _contents;

    /// <summary>Makes a table that may change.</summary>
    /// <param name="defaultName">
    /// The export that the empty name means, whether it is there or not; null for none.
    /// </param>
    public ExportTable(string? defaultName)
    {
        DefaultName = defaultName;
        _contents = new Contents([], []);
    }

    /// <summary>Makes a table of one export, which the empty name means, too.</summary>
    public ExportTable(Export only)
        : this(only.Name)
        => Add(only);

    /// <summary>All exports, in the order in which they came.</summary>
    public IReadOnlyList<Export> All => _contents.All;

    /// <summary>The export that the empty name means; null if an empty name is refused.</summary>
    public string? DefaultName { get; }

    /// <summary>The export that the empty name means; null when there is none.</summary>
    public Export? Default => DefaultName is null ? null : _contents.ByName.GetValueOrDefault(DefaultName);

    /// <summary>Finds an export by its name.</summary>
    /// <returns>Null when there is no such export.</returns>
    public Export? Find(string name) => name.Length == 0 ? Default : _contents.ByName.GetValueOrDefault(name);

    /// <summary>Adds an export: clients find it from now on.</summary>
    /// <returns>False when there is one of that name.</returns>
    public bool Add(Export export)
    {
        lock (_changing)
        {
            Contents before = _contents;
            if (before.ByName.ContainsKey(export.Name))
                return false;
            _contents = Contents.Of([.. before.All, export]);
            return true;
        }
    }

    /// <summary>
    /// Removes an export, if it is there: clients that have not entered it yet do not find it any more, and its name is
    /// free.
    /// </summary>
    public void Remove(Export export)
    {
        lock (_changing)
            _contents = Contents.Of([.. _contents.All.Where(other => other != export)]);
    }

    /// <summary>The table at one moment. It never changes, so that readers need no lock.</summary>
    private sealed record Contents(IReadOnlyList<Export> All, Dictionary<string, Export> ByName)
    {
        public static Contents Of(IReadOnlyList<Export> all)
            => new(all, all.ToDictionary(export => export.Name, StringComparer.Ordinal));
    }
}
