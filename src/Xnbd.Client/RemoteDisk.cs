using Microsoft.Extensions.Logging;
using Xnbd.Linux;
using Xnbd.Protocol;
using Xnbd.Storage;

namespace Xnbd.Client;

/// <summary>
/// A disk on another machine, read-only, over one connection, or several where the server allows that.
/// <para>
/// A connection that breaks is made anew, by a thread of its own, as long as it takes; reads that were under way go to
/// another connection, or wait for one, as long as there is patience. The address can be changed while reads are under
/// way. Nothing is ever written to the server.
/// </para>
/// Locks: <c>_lock</c> guards connections and waiting reads; a connection's own lock is taken inside it, never outside.
/// </summary>
public sealed partial class RemoteDisk : Disk
{
    /// <summary>The largest read that is sent, in bytes; less where the server says that it takes less.</summary>
    public const int MaxRead = 1 << 20;

    /// <summary>A read from which on a system call of its own costs nothing, in bytes; its data are better spread over connections.</summary>
    private const int LargeRead = 64 * 1024;

    /// <summary>The most that is asked about at once, in bytes: a server may have to look at all of it.</summary>
    private const int MostAsked = 1 << 30;

    /// <summary>How long a read waits for a connection to come back, or for a silent server, before it fails.</summary>
    public static readonly TimeSpan PatienceTime = TimeSpan.FromSeconds(30);

    private static readonly TimeSpan ConnectTime = TimeSpan.FromSeconds(10);

    private readonly object _lock = new();
    private readonly ILogger _log;
    private readonly int _mostConnections;
    private readonly List<RemoteConnection> _connections = [];
    private readonly Queue<RemoteRequest> _waiting = new();
    private readonly TimeSpan _patience;
    private volatile uint _blockBytes; // reads are multiples of it,
    private volatile int _mostBytes; // and no longer than this
    private long _lastBreak; // of a connection, in milliseconds of the system's clock
    private RemoteAddress _address;
    private int _wanted;
    private volatile string? _down; // why a connection could not be made
    private bool _isClosed;

    private RemoteDisk(RemoteAddress address, RemoteConnection first, int connections, ILogger log, TimeSpan patience)
    {
        _patience = patience;
        _address = address;
        _log = log;
        Length = (long)first.Export.Length;
        _mostConnections = connections;
        Suit(first);
    }

    /// <summary>Keeps to what a server wants.</summary>
    private void Suit(RemoteConnection connection)
    {
        NbdExportInfo export = connection.Export;
        _wanted = WantedOf(connection);
        _blockBytes = export.MinimumBlock;
        _mostBytes = (int)Math.Max(export.MinimumBlock, Math.Min(MaxRead, export.MaximumPayload) / export.MinimumBlock * export.MinimumBlock);
    }

    private int WantedOf(RemoteConnection connection)
        => (connection.Export.Flags & NbdTransmissionFlags.CanMultiConn) != 0 ? _mostConnections : 1;

    /// <inheritdoc/>
    public override long Length { get; }

    /// <inheritdoc/>
    public override DiskFeatures Features => DiskFeatures.ReadOnly;

    /// <summary>Where the server is.</summary>
    public RemoteAddress Address
    {
        get
        {
            lock (_lock)
                return _address;
        }
    }

    /// <summary>Connections that are open.</summary>
    public int ConnectionCount
    {
        get
        {
            lock (_lock)
                return _connections.Count;
        }
    }

    /// <summary>Connects.</summary>
    /// <param name="address">The server and its export.</param>
    /// <param name="connections">How many connections are made, at most, if the server allows several.</param>
    /// <param name="log">Told when connections break and come back.</param>
    /// <param name="patience">How long a read waits for a server that is away or silent; <see cref="PatienceTime"/> unless given.</param>
    /// <exception cref="RemoteException">The server cannot be used.</exception>
    public static RemoteDisk Connect(RemoteAddress address, int connections, ILogger log, TimeSpan? patience = null)
    {
        RemoteDisk? disk = null;
        var ready = new ManualResetEventSlim(); // not disposed of: the connection may break at any later time
        RemoteConnection first = RemoteConnection.Connect(
            address,
            ConnectTime,
            connection => disk!.SubmitWaiting(),
            (connection, reason, left) =>
            {
                ready.Wait(); // it may break before there is a disk
                disk!.Broken(connection, reason, left);
            });
        if (first.Export.MinimumBlock > BlockRange.BlockSize)
        {
            disk = new RemoteDisk(address, first, 0, log, PatienceTime) { _isClosed = true };
            ready.Set();
            first.Dispose();
            throw TooLargeBlocks(address, first);
        }

        disk = new RemoteDisk(address, first, connections, log, patience ?? PatienceTime);
        disk._connections.Add(first);
        ready.Set();
        if (LinuxThread.TryStart("remote keeper", disk.KeepConnected) is not null
            && LinuxThread.TryStart("remote watch", disk.Watch) is not null)
            return disk;
        disk.Dispose();
        throw new RemoteException($"{address}: cannot connect: the system has no thread to spare");
    }

    /// <summary>Reads from another server from now on. Reads that are under way go there, too.</summary>
    /// <param name="address">The server and its export.</param>
    /// <param name="record">Records the address, when the server has turned out to fit. If it throws, nothing has
    /// changed.</param>
    /// <exception cref="RemoteException">It cannot be used, or its export has another length; nothing has changed.</exception>
    public void SwitchTo(RemoteAddress address, Action<RemoteAddress>? record = null)
    {
        RemoteConnection fresh = Open(address);
        List<RemoteConnection> old;
        try
        {
            if (fresh.IsBroken)
                throw new RemoteException($"{address}: the server has closed the connection");
            record?.Invoke(address);
            lock (_lock)
            {
                if (_isClosed)
                    throw new RemoteException("the remote is not needed any more");
                _address = address;
                Suit(fresh);
                old = [.. _connections];
                _connections.Clear();
                if (!fresh.IsBroken)
                    _connections.Add(fresh);
                Monitor.PulseAll(_lock);
            }
        }
        catch
        {
            fresh.Dispose();
            throw;
        }

        LogSwitched(_log, address);
        old.ForEach(connection => connection.Dispose());
        SubmitWaiting();
    }

    /// <inheritdoc/>
    public override bool TryRead(long offset, Span<byte> buffer) => false; // there is a network between

    /// <inheritdoc/>
    public override bool TryWrite(long offset, ReadOnlySpan<byte> data) => throw ReadOnlyFailure();

    /// <inheritdoc/>
    public override FileRange TryLocate(long offset, int length, bool findHoles) => FileRange.None;

    /// <inheritdoc/>
    public override ValueTask ReadAsync(long offset, Memory<byte> buffer)
    {
        if (offset % _blockBytes + buffer.Length > _mostBytes)
            return ReadInParts(offset, buffer);
        if (offset % _blockBytes != 0 || buffer.Length % _blockBytes != 0)
            return ReadWidened(offset, buffer);
        RemoteRequest request = RemoteRequest.Rent(offset, buffer);
        ValueTask task = request.Task;
        Submit(request);
        return task;
    }

    /// <inheritdoc/>
    public override ValueTask WriteAsync(long offset, ReadOnlyMemory<byte> data, bool durable) => ValueTask.FromException(ReadOnlyFailure());

    /// <inheritdoc/>
    public override ValueTask ZeroAsync(long offset, long length, ZeroMode mode, bool durable) => ValueTask.FromException(ReadOnlyFailure());

    /// <inheritdoc/>
    public override ValueTask TrimAsync(long offset, long length, bool durable) => ValueTask.FromException(ReadOnlyFailure());

    /// <inheritdoc/>
    public override ValueTask FlushAsync() => ValueTask.CompletedTask;

    /// <inheritdoc/>
    public override ValueTask PrefetchAsync(long offset, long length) => ValueTask.CompletedTask;

    /// <inheritdoc/>
    /// <remarks>Zeroes are what the server says of them. Where it says nothing, or there is no time to ask, all is data: that is never wrong.</remarks>
    public override async ValueTask GetExtentsAsync(long offset, long length, ExtentList extents)
    {
        int most = (int)Math.Min(length, MostAsked);
        var found = new ExtentList(extents.Room);
        RemoteRequest request = RemoteRequest.RentQuestion(offset, most, found);
        ValueTask task = request.Task;
        if (offset % _blockBytes != 0 || most % _blockBytes != 0 || !TryAsk(request))
            request.Fail("it cannot be asked");
        try
        {
            await task;
        }
        catch (DiskException)
        {
            _ = extents.Add(length, isHole: false);
            return;
        }

        foreach (Extent extent in found.Extents)
            _ = extents.Add(extent.Length, extent.IsHole);
    }

    private bool TryAsk(RemoteRequest request)
    {
        lock (_lock)
            return _waiting.Count == 0 && _connections.Exists(connection => connection.TellsZeroes && !connection.IsBroken && connection.TrySubmit(request));
    }

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (!disposing)
            return;
        List<RemoteConnection> open;
        lock (_lock)
        {
            _isClosed = true;
            open = [.. _connections];
            _connections.Clear();
            Monitor.PulseAll(_lock);
        }

        open.ForEach(connection => connection.Dispose());
    }

    private static RemoteException TooLargeBlocks(RemoteAddress address, RemoteConnection connection)
        => new($"{address}: the server wants blocks of {connection.Export.MinimumBlock} bytes; more than {BlockRange.BlockSize} is not supported");

    private DiskException ReadOnlyFailure() => new(DiskError.Permission, $"{Address}: nothing is written to a remote disk");

    private async ValueTask ReadInParts(long offset, Memory<byte> buffer)
    {
        for (int done = 0; done < buffer.Length;)
        {
            int length = (int)Math.Min(buffer.Length - done, _mostBytes - ((offset + done) % _blockBytes)); // the block that it begins in counts whole
            await ReadAsync(offset + done, buffer.Slice(done, length));
            done += length;
        }
    }

    /// <summary>For servers that take whole blocks only.</summary>
    private async ValueTask ReadWidened(long offset, Memory<byte> buffer)
    {
        long block = _blockBytes, start = offset / block * block;
        long end = Math.Min((offset + buffer.Length + block - 1) / block * block, Length);
        byte[] wide = new byte[end - start];
        RemoteRequest request = RemoteRequest.Rent(start, wide);
        ValueTask task = request.Task;
        Submit(request);
        await task;
        wide.AsMemory((int)(offset - start), buffer.Length).CopyTo(buffer);
    }

    private RemoteConnection Open(RemoteAddress address)
    {
        RemoteConnection connection = RemoteConnection.Connect(address, ConnectTime, _ => SubmitWaiting(), Broken);
        if ((long)connection.Export.Length == Length && connection.Export.MinimumBlock <= BlockRange.BlockSize)
            return connection;
        connection.Dispose();
        if (connection.Export.MinimumBlock > BlockRange.BlockSize)
            throw TooLargeBlocks(address, connection);
        throw new RemoteException($"{address}: the export has {connection.Export.Length} bytes, not {Length}: it is another disk");
    }

    private void Submit(RemoteRequest request)
    {
        string? failure = null;
        lock (_lock)
        {
            if (_isClosed)
                failure = "the remote disk is closed";
            else if (_waiting.Count > 0 || !TrySubmit(request))
                _waiting.Enqueue(request);
        }

        if (failure is not null)
            request.Fail(failure);
    }

    /// <summary>To a connection that is about to send anyway; else to the one with the fewest reads under way.</summary>
    private bool TrySubmit(RemoteRequest request)
    {
        RemoteConnection? best = null;
        foreach (RemoteConnection connection in _connections)
        {
            if (connection.IsBroken)
                continue;
            if (connection.IsGathering && request.Buffer.Length < LargeRead && connection.TrySubmit(request))
                return true;
            if (best is null || connection.UnderWay < best.UnderWay)
                best = connection;
        }

        return best is not null && best.TrySubmit(request);
    }

    private void SubmitWaiting()
    {
        var misfits = new List<RemoteRequest>();
        lock (_lock)
        {
            while (_waiting.TryPeek(out RemoteRequest? request))
            {
                if (_connections.Count > 0 && !IsFitting(request.Offset, request.Length))
                    misfits.Add(request);
                else if (!TrySubmit(request))
                    break;
                _waiting.Dequeue();
            }
        }

        misfits.ForEach(request => _ = ReadAgain(request));
    }

    private bool IsFitting(long offset, int length)
        => length <= _mostBytes && offset % _blockBytes == 0 && (length % _blockBytes == 0 || offset + length == Length); // as ReadWidened makes it

    /// <summary>Of a read that was made for a server with other limits.</summary>
    private async Task ReadAgain(RemoteRequest request)
    {
        try
        {
            await ReadAsync(request.Offset, request.Buffer);
        }
        catch (DiskException failure)
        {
            request.Fail(failure.Message);
            return;
        }

        request.Succeed();
    }

    private void Broken(RemoteConnection connection, string reason, List<RemoteRequest> left)
    {
        bool isClosed;
        lock (_lock)
        {
            isClosed = _isClosed;
            if (_connections.Remove(connection)) // else it was never used
            {
                LogBroken(_log, reason);
                _lastBreak = Environment.TickCount64;
                Monitor.PulseAll(_lock);
            }

            if (connection.IsTimedOut)
                _connections.ForEach(other => other.BreakIfQuiet(RemoteAddress.UnacknowledgedTime)); // or reads would try them one by one
            double patience = _patience.TotalMilliseconds / (connection.IsSilent ? 2 : 1); // young reads are tried elsewhere, but not on one silent connection after another
            bool IsLate(RemoteRequest request) => isClosed || request.Extents is not null || Environment.TickCount64 - request.StartedAt > patience;
            foreach (RemoteRequest request in left.Where(r => !IsLate(r)))
            {
                request.Restart();
                _waiting.Enqueue(request);
            }

            left.RemoveAll(r => !IsLate(r));
        }

        left.ForEach(request => request.Fail(isClosed ? "the remote disk is closed" : reason));
        if (!isClosed)
            SubmitWaiting();
    }

    /// <summary>Breaks connections that are silent, and fails reads that have waited too long for one. A thread of its own: making connections takes time.</summary>
    private void Watch()
    {
        while (true)
        {
            var late = new List<RemoteRequest>();
            string reason;
            bool isClosed;
            lock (_lock)
            {
                if (!_isClosed)
                    Monitor.Wait(_lock, TimeSpan.FromMilliseconds(Math.Min(1000, _patience.TotalMilliseconds / 4)));
                isClosed = _isClosed;
                _connections.ForEach(connection => connection.BreakIfSilent(_patience));
                while (_waiting.TryPeek(out RemoteRequest? oldest)
                    && (isClosed || (_connections.Count == 0 && Environment.TickCount64 - oldest.StartedAt > _patience.TotalMilliseconds)))
                    late.Add(_waiting.Dequeue());
                reason = isClosed ? "the remote disk is closed" : _down ?? $"{_address}: the server cannot be reached";
            }

            late.ForEach(request => request.Fail(reason));
            if (isClosed)
                return;
        }
    }

    /// <summary>Makes connections, and makes those anew that have broken.</summary>
    private void KeepConnected()
    {
        var pause = TimeSpan.Zero;
        while (true)
        {
            RemoteAddress address;
            lock (_lock)
            {
                if (_connections.Count >= _wanted && !_isClosed)
                    Monitor.Wait(_lock, TimeSpan.FromSeconds(1));
                else if (pause > TimeSpan.Zero && !_isClosed)
                    Monitor.Wait(_lock, pause);
                if (_isClosed)
                    return;
                address = _address;
            }

            if (ConnectionCount >= _wanted)
                continue;
            try
            {
                RemoteConnection connection = Open(address);
                bool isStale;
                lock (_lock)
                {
                    isStale = _isClosed || _address != address || connection.IsBroken;
                    if (!isStale)
                    {
                        Suit(connection); // it may be another server by now
                        _connections.Add(connection);
                    }
                }

                if (isStale)
                    connection.Dispose();
                if (_down is not null)
                    LogBack(_log, address);

                // Where connections keep breaking soon, they are made in no hurry.
                pause = Environment.TickCount64 - Volatile.Read(ref _lastBreak) > 5000 ? TimeSpan.Zero : Longer(pause);
                _down = null;
                SubmitWaiting();
            }
            catch (RemoteException failure)
            {
                if (_down != failure.Message)
                    LogUnreachable(_log, failure.Message);
                _down = failure.Message;
                pause = Longer(pause);
            }
        }

        static TimeSpan Longer(TimeSpan pause) => TimeSpan.FromSeconds(Math.Clamp(pause.TotalSeconds * 2, 0.1, 2));
    }

    [LoggerMessage(Level = LogLevel.Warning, Message = "a connection to the remote has broken: {Reason}")]
    private static partial void LogBroken(ILogger log, string reason);

    [LoggerMessage(Level = LogLevel.Warning, Message = "the remote cannot be used; trying again: {Reason}")]
    private static partial void LogUnreachable(ILogger log, string reason);

    [LoggerMessage(Level = LogLevel.Information, Message = "connected to the remote again: {Address}")]
    private static partial void LogBack(ILogger log, RemoteAddress address);

    [LoggerMessage(Level = LogLevel.Information, Message = "the remote is now {Address}")]
    private static partial void LogSwitched(ILogger log, RemoteAddress address);
}
