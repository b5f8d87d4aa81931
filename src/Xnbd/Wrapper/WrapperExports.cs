using System.Text.Json.Nodes;
using Microsoft.Extensions.Logging;
using Xnbd.Linux;
using Xnbd.Programs.Serving;
using Xnbd.Server;
using Xnbd.Storage;

namespace Xnbd.Programs.Wrapper;

/// <summary>
/// The exports of <c>xnbd-wrapper</c>: those of the state file and of the command line. They come and go while it runs.
/// <para>
/// An export is added in this order: its name and files are reserved; its disk is opened; the state is saved; clients
/// find it. It is removed in this order: the state is saved; clients do not find it any more; its last client leaves;
/// its disk is synced and closed. So whoever kills this process finds the state before or after the change, and if a
/// step fails, nothing has changed. A failure of the last step is logged, and shown in the list.
/// </para>
/// <para>
/// An entry of the state file that makes no sense, or cannot be opened, stays in the file, and is shown with the
/// reason. Opening is tried again every <see cref="s_retryTime"/>: a remote may come back. Files are looked at and
/// opened without a lock and on threads of their own, since a file system may not answer.
/// </para>
/// <c>_changing</c> is held while the state is saved and what was saved comes true, and during a reload. <c>_lock</c>
/// guards the lists, and is held for moments; queries take only this one. The first one is taken before the second.
/// </summary>
internal sealed class WrapperExports : IDisposable
{
    private static readonly TimeSpan s_retryTime = TimeSpan.FromSeconds(10);

    /// <summary>How long a start or a reload waits for one image to be opened; then it goes on without it.</summary>
    private static readonly TimeSpan s_maxOpen = TimeSpan.FromSeconds(1);

    /// <summary>How long a reload waits for an export to be closed.</summary>
    private static readonly TimeSpan s_maxLeave = TimeSpan.FromSeconds(10);

    private readonly WrapperOptions _options;
    private readonly StateFile _state;
    private readonly NbdServer _server;
    private readonly ExportTable _table;
    private readonly ILogger _log;
    private readonly CancellationToken _stop;
    private readonly Lock _changing = new();
    private readonly object _lock = new();
    private readonly List<WrapperEntry> _entries = []; // in the order in which they came
    private readonly Dictionary<string, (JsonNode? Json, string Problem)> _unreadable = []; // entries of the state file
    private int _closing; // removals that are not complete
    private bool _isRetrying;

    /// <summary>Takes the state; nothing is opened yet.</summary>
    public WrapperExports(
        WrapperOptions options,
        StateFile state,
        NbdServer server,
        ExportTable table,
        ILogger log,
        CancellationToken stop)
    {
        (_options, _state, _server, _table, _log, _stop) = (options, state, server, table, log, stop);
    }

    /// <summary>Opens the exports of the state file and of the command line. Those that fail are logged.</summary>
    public void OpenAll()
    {
        foreach ((string name, JsonNode? json) in _state.Images)
            OpenOfState(name, json);
        foreach ((string name, string path) in _options.Images)
        {
            lock (_lock)
            {
                if (Find(name) is { } known && known.Definition.Image == path)
                    continue; // the state has it, too
            }

            var definition = new ExportDefinition(
                name, new JsonObject { ["mode"] = ExportDefinition.Target, ["image_path"] = path });
            try
            {
                WrapperEntry entry = Reserve(definition);
                Publish(entry, Open(entry));
            }
            catch (Exception failure) when (failure is FailureException or DiskException)
            {
                throw new FailureException($"--imgfile {name}: {Advice.Describe(failure)}");
            }
        }
    }

    /// <summary>Adds an export, and saves the state.</summary>
    /// <exception cref="FailureException">It cannot be added; nothing has changed.</exception>
    /// <exception cref="DiskException">A file cannot be used; nothing has changed.</exception>
    public void Add(ExportDefinition definition)
    {
        WrapperEntry entry = Reserve(definition);
        ServedDisk? served = null;
        try
        {
            served = Open(entry); // this may take a while
            lock (_changing)
            {
                Save(with: entry);
                entry.IsKept = true;
                Publish(entry, served);
            }
        }
        catch
        {
            served?.Dispose();
            lock (_lock)
                _entries.Remove(entry);
            throw;
        }
    }

    /// <summary>Removes an export, and saves the state. Its clients may go on for a time.</summary>
    /// <param name="name">The export.</param>
    /// <param name="grace">How long its clients may go on.</param>
    /// <returns>The number of clients that are still in.</returns>
    /// <exception cref="FailureException">There is no such export, or the state cannot be saved.</exception>
    public int Remove(string name, TimeSpan grace)
    {
        lock (_changing)
        {
            WrapperEntry? entry;
            lock (_lock)
            {
                entry = Find(name);
                if (entry is null && !_unreadable.ContainsKey(name))
                {
                    WrapperEntry? leaving = _entries.Find(other => other.Definition.Name == name);
                    return Expel(leaving ?? throw NoExport(name), grace);
                }

                if (entry is { IsKept: false, State: EntryState.Opening })
                    throw new FailureException($"the export '{name}' is just being added");
            }

            if (entry is not { IsKept: false })
                Save(without: name);
            if (entry is null)
            {
                lock (_lock)
                    _unreadable.Remove(name);
                _log.LogInformation("'{Name}' was removed", name);
                return 0;
            }

            return Leave(entry, grace);
        }
    }

    /// <summary>Changes the definition of an export that goes on as it is: its disk has changed itself.</summary>
    /// <exception cref="FailureException">The state cannot be saved.</exception>
    public void Redefine(string name, Func<ExportDefinition, ExportDefinition> change)
    {
        lock (_changing)
        {
            lock (_lock)
            {
                WrapperEntry entry = Find(name) ?? throw NoExport(name);
                entry.Definition = change(entry.Definition);
            }

            Save();
        }
    }

    /// <summary>Writes the state file.</summary>
    /// <exception cref="FailureException">It cannot be written.</exception>
    public void SaveNow()
    {
        lock (_changing)
            Save();
    }

    /// <summary>
    /// Compares the state file with what is served, and changes what differs. Exports that are the same keep their
    /// clients; one that differs is closed, after its clients' requests have ended, and opened anew.
    /// </summary>
    /// <returns>What was changed, for people.</returns>
    /// <exception cref="FailureException">The state file cannot be read; nothing has changed.</exception>
    public IReadOnlyList<string> Reload()
    {
        var changes = new List<string>();
        lock (_changing)
        {
            _state.Reload();
            Dictionary<string, JsonNode?> wanted = new(_state.Images);
            WrapperEntry[] kept;
            lock (_lock)
            {
                kept = [.. _entries.Where(entry => entry.IsKept && entry.State != EntryState.Leaving)];
                _unreadable.Clear();
            }

            foreach (WrapperEntry entry in kept)
            {
                string name = entry.Definition.Name;
                bool isThere = wanted.TryGetValue(name, out JsonNode? json);
                if (isThere && JsonNode.DeepEquals(json, entry.Definition.ToJson()))
                {
                    if (entry.State != EntryState.Failed)
                    {
                        wanted.Remove(name);
                        continue;
                    }

                    lock (_lock)
                        _entries.Remove(entry); // it is tried again
                    continue;
                }

                changes.Add(isThere ? $"changed: {name}" : $"removed: {name}");
                int clients = Leave(entry, isThere ? TimeSpan.Zero : TimeSpan.MaxValue);
                if (isThere || clients == 0)
                    WaitUntilLeft(entry); // its files may be those of another entry
            }

            foreach ((string name, JsonNode? json) in wanted)
            {
                if (!changes.Contains($"changed: {name}") && !kept.Any(entry => entry.Definition.Name == name))
                    changes.Add($"added: {name}");
                OpenOfState(name, json);
            }
        }

        string what = changes.Count > 0 ? string.Join(", ", changes) : "all is as it was";
        _log.LogInformation("the state was read again; {Changes}", what);
        return changes;
    }

    /// <summary>Waits a while until an export that is leaving is closed.</summary>
    private void WaitUntilLeft(WrapperEntry entry)
    {
        long end = Environment.TickCount64 + (long)s_maxLeave.TotalMilliseconds;
        lock (_lock)
        {
            while (_entries.Contains(entry) && entry.Problem is null && end > Environment.TickCount64)
                Monitor.Wait(_lock, 100);
        }
    }

    /// <summary>Ends the time of the clients of an export that was removed before. The lock is held.</summary>
    /// <returns>The number of clients that are still in.</returns>
    private int Expel(WrapperEntry leaving, TimeSpan grace)
    {
        if (grace == TimeSpan.Zero)
            _server.Expel(leaving.Export!);
        else if (grace != TimeSpan.MaxValue && LinuxThread.TryStart("grace", ExpelLater) is null)
            throw new FailureException("the system has no thread to spare");
        return leaving.Served!.Traffic().Connections;

        void ExpelLater()
        {
            _stop.WaitHandle.WaitOne((int)Math.Min(grace.TotalMilliseconds, int.MaxValue));
            _server.Expel(leaving.Export!);
        }
    }

    /// <summary>The disk of an export.</summary>
    /// <exception cref="FailureException">There is none.</exception>
    public ServedDisk Disk(string name)
    {
        lock (_lock)
        {
            WrapperEntry entry = Find(name) ?? throw NoExport(name);
            if (entry.State == EntryState.Served)
                return entry.Served!;
            throw new FailureException($"the export '{name}' is not served: {entry.Problem ?? "it is being opened"}");
        }
    }

    /// <summary>The names of the exports that use a file.</summary>
    public IReadOnlyList<string> NamesOf(string path)
    {
        FileUse wanted = FileUse.Of(path, isChanged: false);
        lock (_lock)
        {
            return
            [
                .. _entries.Where(entry => entry.Files.Any(file => file.IsSame(wanted)))
                    .Select(entry => entry.Definition.Name).Distinct(),
            ];
        }
    }

    /// <summary>All exports, as the method <c>list</c> answers them.</summary>
    public JsonArray List()
    {
        WrapperEntry[] entries;
        (string Name, string Problem)[] unreadable;
        lock (_lock)
        {
            entries = [.. _entries];
            unreadable = [.. _unreadable.Select(pair => (pair.Key, pair.Value.Problem))];
        }

        return
        [
            .. entries.Select(Describe),
            .. unreadable.Select(entry => (JsonNode)new JsonObject
            {
                ["name"] = entry.Name,
                ["state"] = "failed",
                ["problem"] = entry.Problem,
            }),
        ];
    }

    /// <summary>Makes all disks durable.</summary>
    public async Task FlushAll()
    {
        ServedDisk[] disks;
        lock (_lock)
            disks = [.. _entries.Select(entry => entry.Served).OfType<ServedDisk>().Where(disk => disk.TryUse())];
        try
        {
            await Task.WhenAll(disks.Select(disk => disk.FlushAll()));
        }
        finally
        {
            Array.ForEach(disks, disk => disk.EndUse());
        }
    }

    /// <summary>Waits until nothing else uses the disks.</summary>
    public void WaitUntilEnded()
    {
        lock (_lock)
        {
            while (_closing > 0)
                Monitor.Wait(_lock);
        }

        Array.ForEach(Disks(), disk => disk.WaitUntilEnded());
    }

    /// <summary>Removes what must not stay, while operations may be under way. The process ends at once.</summary>
    public void Abandon() => Array.ForEach(Disks(), disk => disk.Abandon());

    /// <summary>Closes all disks. No client uses them any more.</summary>
    public void Dispose() => Array.ForEach(Disks(), disk => disk.Dispose());

    private ServedDisk[] Disks()
    {
        lock (_lock)
            return [.. _entries.Select(entry => entry.Served).OfType<ServedDisk>()];
    }

    private static FailureException NoExport(string name) => new($"there is no export '{name}'");

    /// <summary>The lock is held.</summary>
    private WrapperEntry? Find(string name)
        => _entries.Find(entry => entry.Definition.Name == name && entry.State != EntryState.Leaving);

    private ServedDisk Open(WrapperEntry entry)
    {
        ExportDefinition definition = entry.Definition;
        ServedDisk served = definition.Open(_options, new ExportLog(definition.Name, _log), _stop);
        try
        {
            if (definition.ControlSocket is { } path)
                served.OpenControl(path);
            FileUse[] files = definition.Files(_options); // some have been made only now
            lock (_lock)
                entry.Files = files;
            return served;
        }
        catch
        {
            served.Dispose();
            throw;
        }
    }

    /// <summary>Reserves name and files.</summary>
    /// <exception cref="FailureException">They are in use.</exception>
    private WrapperEntry Reserve(ExportDefinition definition)
    {
        var entry = new WrapperEntry(definition) { Files = definition.Files(_options) };
        lock (_lock)
        {
            if (Find(definition.Name) is not null || _unreadable.ContainsKey(definition.Name))
                throw new FailureException($"there is an export '{definition.Name}' already");
            ThrowIfInUse(entry);
            _entries.Add(entry);
            return entry;
        }
    }

    /// <summary>
    /// Two exports may not change one file, nor may one change what another one relies on. The lock is held.
    /// </summary>
    private void ThrowIfInUse(WrapperEntry wanted)
    {
        FileUse[] files = wanted.Files;
        for (int i = 1; i < files.Length; i++)
        {
            if (files[..i].FirstOrDefault(other => other.IsSame(files[i])) is { Path: { } same })
                throw new FailureException($"'{files[i].Path}' and '{same}' are one file");
        }

        foreach (WrapperEntry entry in _entries.Where(entry => entry != wanted && entry.HoldsFiles))
        {
            foreach (FileUse file in entry.Files)
            {
                foreach (FileUse own in files)
                {
                    if (!(own.IsChanged || file.IsChanged) || !own.IsSame(file))
                        continue;
                    string leaving = entry.State == EntryState.Leaving ? ", which is being removed" : "";
                    throw new FailureException(
                        $"'{own.Path}' is {(file.IsChanged ? "written" : "used")} by the export "
                        + $"'{entry.Definition.Name}'{leaving}");
                }
            }
        }
    }

    /// <summary>Shows an export to clients; if it was removed meanwhile, closes its disk.</summary>
    private void Publish(WrapperEntry entry, ServedDisk served)
    {
        Export export = served.ExportAs(entry.Definition.Name);
        served.Attach(_server, export);
        bool isWanted;
        lock (_lock)
        {
            isWanted = _entries.Contains(entry) && entry.State == EntryState.Opening && !_stop.IsCancellationRequested
                && _table.Add(export);
            if (isWanted)
                (entry.Served, entry.Export, entry.State, entry.Problem) = (served, export, EntryState.Served, null);
        }

        if (!isWanted)
        {
            served.Dispose();
            return;
        }

        _log.LogInformation(
            "'{Name}' is served: {Disk}; {Uris}",
            entry.Definition.Name,
            served.Description,
            string.Join(", ", _server.UrisOf(entry.Definition.Name)));
    }

    private void Save(WrapperEntry? with = null, string? without = null)
    {
        Dictionary<string, JsonNode?> images;
        lock (_lock)
        {
            images = _unreadable.ToDictionary(pair => pair.Key, pair => pair.Value.Json);
            foreach (WrapperEntry entry in _entries)
            {
                if ((entry.IsKept && entry.State != EntryState.Leaving) || entry == with)
                    images[entry.Definition.Name] = entry.Definition.ToJson();
            }
        }

        _state.Save(images.Where(pair => pair.Key != without));
    }

    /// <summary>Opens an export of the state file. If that takes long, it goes on in the background.</summary>
    private void OpenOfState(string name, JsonNode? json)
    {
        WrapperEntry entry;
        try
        {
            if (json is not JsonObject members)
                throw new FailureException("it is no JSON object");
            entry = new WrapperEntry(new ExportDefinition(name, members)) { IsKept = true };
            lock (_lock)
            {
                if (Find(name) is not null)
                    throw new FailureException("there is an export of this name that is not of the state file");
                _entries.Add(entry);
            }
        }
        catch (Exception failure) when (failure is FailureException or InvalidOperationException or ArgumentException)
        {
            lock (_lock)
                _unreadable[name] = (json, failure.Message);
            _log.LogError("the export '{Name}' of the state file: {Cause}", name, failure.Message);
            return;
        }

        StartOpening(entry);
    }

    /// <summary>Opens an export on a thread of its own, and waits a moment for it, unless it is a proxy.</summary>
    private void StartOpening(WrapperEntry entry)
    {
        bool isProxy = entry.Definition.Mode == ExportDefinition.Proxy;
        Thread? opening = LinuxThread.TryStart("opening", () => TryOpen(entry));
        if (opening is null)
            TryOpen(entry);
        else if (!isProxy)
            opening.Join(s_maxOpen);
    }

    /// <summary>Opens an export that has its place in the list. If that fails, it is tried again later.</summary>
    private void TryOpen(WrapperEntry entry)
    {
        string problem;
        try
        {
            FileUse[] files = entry.Definition.Files(_options);
            lock (_lock)
            {
                entry.Files = files;
                ThrowIfInUse(entry);
            }

            Publish(entry, Open(entry));
            return;
        }
        catch (Exception failure)
        {
            // Whatever is wrong with one export, the others are served.
            problem = failure is FailureException or DiskException or OperationCanceledException
                ? Advice.Describe(failure) : failure.ToString();
        }

        lock (_lock)
        {
            if (!_entries.Contains(entry) || entry.State != EntryState.Opening || _stop.IsCancellationRequested)
                return;
            if (entry.Problem != problem)
                _log.LogError("the export '{Name}' cannot be served: {Cause}", entry.Definition.Name, problem);
            (entry.State, entry.Problem) = (EntryState.Failed, problem);
        }

        StartRetrying();
    }

    private void StartRetrying()
    {
        lock (_lock)
        {
            if (_isRetrying || LinuxThread.TryStart("retry", Retry) is null)
                return;
            _isRetrying = true;
        }
    }

    private void Retry()
    {
        while (!_stop.WaitHandle.WaitOne(s_retryTime))
        {
            WrapperEntry[] failed;
            lock (_lock)
            {
                failed = [.. _entries.Where(entry => entry.State == EntryState.Failed)];
                if (failed.Length == 0)
                {
                    _isRetrying = false;
                    return;
                }
            }

            foreach (WrapperEntry entry in failed)
            {
                lock (_lock)
                {
                    if (!_entries.Contains(entry) || entry.State != EntryState.Failed)
                        continue;
                    entry.State = EntryState.Opening;
                }

                StartOpening(entry);
            }
        }
    }

    /// <summary>Takes an export away from clients, and closes it in the background. The state is saved.</summary>
    private int Leave(WrapperEntry entry, TimeSpan grace)
    {
        string name = entry.Definition.Name;
        int clients = entry.Served?.Traffic().Connections ?? 0;
        lock (_lock)
        {
            if (entry.Export is null)
            {
                _entries.Remove(entry);
                _log.LogInformation("'{Name}' was removed", name);
                return 0;
            }

            entry.State = EntryState.Leaving;
            _table.Remove(entry.Export); // its name is free from here on
            _closing++;
        }

        if (LinuxThread.TryStart("removal", Close) is null)
        {
            grace = TimeSpan.Zero; // it cannot wait here
            Close();
        }

        return clients;

        void Close()
        {
            string? problem = null;
            bool isLeft = _server.Remove(entry.Export!, grace);
            if (isLeft)
            {
                try
                {
                    entry.Served!.FlushAll().GetAwaiter().GetResult();
                }
                catch (DiskException failure)
                {
                    problem = $"could not be synced: {failure.Message}";
                }

                entry.Served!.Dispose();
            }
            else
            {
                problem = "its disk does not answer: its files stay open until the server ends";
            }

            lock (_lock)
            {
                if (isLeft)
                    _entries.Remove(entry);
                entry.Problem = problem;
                _closing--;
                Monitor.PulseAll(_lock);
            }

            if (problem is null)
                _log.LogInformation("'{Name}' was removed; its last client has left", name);
            else
                _log.LogError("'{Name}' was removed: {Cause}", name, problem);
        }
    }

    private JsonNode Describe(WrapperEntry entry)
    {
        ExportDefinition definition = entry.Definition;
        var json = new JsonObject
        {
            ["name"] = definition.Name,
            ["state"] = entry.State.ToString().ToLowerInvariant(),
            ["problem"] = entry.Problem,
            ["mode"] = entry.Served?.Mode ?? definition.Mode,
            ["file"] = definition.Image,
            ["kept"] = entry.IsKept,
        };
        if (entry.State is not (EntryState.Served or EntryState.Leaving) || entry.Served is not { } served
            || !served.TryUse())
            return json;
        try
        {
            ServerTraffic traffic = served.Traffic();
            json["size"] = served.Disk.Length;
            json["read-only"] = entry.Export!.IsReadOnly;
            json["clients"] = traffic.Connections;
            json["read-bytes"] = traffic.ReadBytes;
            json["written-bytes"] = traffic.WrittenBytes;
            if (served is ProxyMode { Image: null } proxy)
                json["cached-percent"] = proxy.CachedPercent;
            json["uris"] = new JsonArray([.. _server.UrisOf(definition.Name).Select(uri => JsonValue.Create(uri))]);
            return json;
        }
        finally
        {
            served.EndUse();
        }
    }
}
