using System.Globalization;
using System.Text.Json.Nodes;
using Microsoft.Extensions.Logging;
using Xnbd.Control;
using Xnbd.Server;
using Xnbd.Storage;
using Xnbd.Storage.Images;

namespace Xnbd.Programs.Serving;

/// <summary>
/// A disk with what belongs to serving it: its snapshots, its sync, the methods of its control channel, what its
/// clients do. <c>xnbd-server</c> serves one of them, <c>xnbd-wrapper</c> many. The kinds are <see cref="LocalDisk"/>
/// and <see cref="ProxyMode"/>.
/// <para>
/// First it is opened. Then a server gets an <see cref="Export"/> of it (<see cref="ExportAs"/>,
/// <see cref="Attach"/>). Then it may open a control channel of its own. It is disposed of when no client uses it any
/// more, and waits for the calls that are under way. Meanwhile any thread may call its methods.
/// </para>
/// </summary>
internal abstract class ServedDisk : IDisposable
{
    private NbdServer? _server;
    private Export? _export;
    private ControlServer? _control;
    private readonly object _using = new(); // guards these two
    private int _users; // calls that are under way
    private bool _isClosing;

    /// <summary>Makes it, for its kinds.</summary>
    /// <param name="log">Receives what happens to it.</param>
    /// <param name="stop">Ends what takes long.</param>
    protected ServedDisk(ILogger log, CancellationToken stop)
    {
        Log = log;
        Snapshots = new Snapshots(() => Image, log, stop);
    }

    /// <summary>What it is at present, as users and the control channel name it.</summary>
    public abstract string Mode { get; }

    /// <summary>The disk that is served.</summary>
    public abstract Disk Disk { get; }

    /// <summary>The image of which snapshots are made; null if there is none, or not yet.</summary>
    public abstract ImageFile? Image { get; }

    /// <summary>The file by which users know it: the image, or the cache image.</summary>
    public abstract string FilePath { get; }

    /// <summary>For the log: the files, and who may write.</summary>
    public abstract string Description { get; }

    /// <summary>The ids of the proxies that reads pass through.</summary>
    public virtual IReadOnlyList<ulong> Trail => [];

    /// <summary>Bounds what its clients have in flight.</summary>
    public virtual RequestLimits Limits => RequestLimits.Default;

    /// <summary>Makes snapshots of it.</summary>
    public Snapshots Snapshots { get; }

    /// <summary>Receives what happens to it.</summary>
    protected ILogger Log { get; }

    /// <summary>What its clients have moved.</summary>
    public ServerTraffic Traffic() => _server?.TrafficOf(_export!) ?? default;

    /// <summary>Makes an export of it.</summary>
    /// <param name="name">The export's name.</param>
    /// <param name="front">What clients see, if that is not the disk itself; it passes everything on.</param>
    /// <param name="canMultiConn">As of <see cref="Export"/>.</param>
    public Export ExportAs(string name, Disk? front = null, bool canMultiConn = true)
        => new(name, Path.GetFileName(FilePath), front ?? Disk, canMultiConn)
        {
            Trail = () => Trail,
            Limits = Limits,
        };

    /// <summary>Tells it under which export of which server it is served.</summary>
    public void Attach(NbdServer server, Export export) => (_server, _export) = (server, export);

    /// <summary>Opens its control channel.</summary>
    /// <exception cref="FailureException">It cannot be opened.</exception>
    public void OpenControl(string path) => _control = ServerSockets.OpenControl(path, Call);

    /// <summary>Carries out a method of the control channel (docs/control.md), on any thread.</summary>
    /// <exception cref="ControlException">It failed; the message says why.</exception>
    public JsonNode? Call(string method, JsonObject parameters)
    {
        if (!TryUse())
            throw new ControlException(ControlException.Failed, "this disk is being closed");
        try
        {
            return method switch
            {
                "query" => Query(),
                "clients" => ClientsJson.Of(_server?.ClientsOf(_export!) ?? []),
                "snapshot" => Snapshots.Start(),
                "snapshot.status" => Snapshots.Status(parameters["wait-ms"]?.GetValue<int>() ?? 0),
                "snapshot.cancel" => Snapshots.Cancel(),
                _ => CallOwn(method, parameters),
            };
        }
        catch (Exception failure) when (failure is DiskException or FailureException)
        {
            throw new ControlException(ControlException.Failed, Advice.Describe(failure));
        }
        finally
        {
            EndUse();
        }
    }

    /// <summary>Keeps the disk open until <see cref="EndUse"/>, for one that is no client.</summary>
    /// <returns>False when it is being closed already.</returns>
    public bool TryUse()
    {
        lock (_using)
        {
            if (!_isClosing)
                _users++;
            return !_isClosing;
        }
    }

    /// <summary>The disk may be closed; see <see cref="TryUse"/>.</summary>
    public void EndUse()
    {
        lock (_using)
        {
            _users--;
            Monitor.PulseAll(_using);
        }
    }

    /// <summary>Makes all that was written durable.</summary>
    public virtual Task FlushAll() => Disk.FlushAsync().AsTask();

    /// <summary>Carries out SIGUSR2.</summary>
    public virtual void SwitchBySignal() => Log.LogInformation("SIGUSR2 has no meaning in this mode");

    /// <summary>Waits until no snapshot and no switch is under way: both use the disk.</summary>
    public virtual void WaitUntilEnded() => Snapshots.WaitUntilEnded();

    /// <summary>Removes what must not stay, while operations may be under way. The process ends at once.</summary>
    public virtual void Abandon()
    {
    }

    /// <summary>
    /// Ends jobs, waits for the calls that are under way, and closes the control channel and the disk. No client uses
    /// it any more. Closing it again does nothing.
    /// </summary>
    public void Dispose()
    {
        lock (_using)
        {
            if (_isClosing)
                return;
            _isClosing = true;
        }

        EndJobs(); // calls may wait for them
        _control?.Dispose();
        lock (_using)
        {
            while (_users > 0)
                Monitor.Wait(_using);
        }

        EndJobs(); // the last call may have started one
        WaitUntilEnded();
        Close();
    }

    /// <summary>The state, as the method <c>query</c> answers it.</summary>
    protected abstract JsonObject Query();

    /// <summary>Carries out a method that only this kind has.</summary>
    protected virtual JsonNode? CallOwn(string method, JsonObject parameters)
        => throw new ControlException(ControlException.NoSuchMethod, $"there is no method '{method}' in this mode");

    /// <summary>Ends what works in the background, and waits for that.</summary>
    protected virtual void EndJobs()
    {
    }

    /// <summary>Closes the disk and its files.</summary>
    protected abstract void Close();
}

/// <summary>Clients as the control channel lists them.</summary>
internal static class ClientsJson
{
    /// <summary>A list of clients.</summary>
    public static JsonArray Of(IEnumerable<ServerClient> clients) =>
    [
        .. clients.Select(client => (JsonNode)new JsonObject
        {
            ["address"] = client.Address,
            ["export"] = client.Export,
            ["since"] = client.Since.ToString("yyyy-MM-ddTHH:mm:ssK", CultureInfo.InvariantCulture),
            ["read-bytes"] = client.ReadBytes,
            ["written-bytes"] = client.WrittenBytes,
            ["requests"] = client.Requests,
            ["in-flight"] = client.InFlight,
        }),
    ];
}
