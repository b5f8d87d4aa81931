using Xnbd.Protocol;
using Xnbd.Storage;

namespace Xnbd.Client;

/// <content>
/// Making connections, breaking those that are silent, and handing over the requests of those that broke.
/// </content>
internal sealed partial class RemoteConnections
{
    private static readonly TimeSpan s_connectTime = TimeSpan.FromSeconds(10);

    /// <summary>Where connections break within this time, they are made in no hurry.</summary>
    private static readonly TimeSpan s_stableTime = TimeSpan.FromSeconds(5);

    /// <summary>Tries all servers once, from the one on whose turn it is.</summary>
    /// <exception cref="RemoteException">None can be used; the message says why of each.</exception>
    private (RemoteConnection Connection, RemoteAddress Address) OpenAny()
    {
        var failures = new List<RemoteException>();
        for (int i = 0; i < _servers.Count; i++)
        {
            RemoteAddress address = _servers[(_turn + i) % _servers.Count];
            try
            {
                return (OpenFirst(address, isRequired: address != _lastServer), address);
            }
            catch (RemoteException failure)
            {
                failures.Add(failure);
            }
        }

        throw new RemoteException(string.Join("; ", failures.Select(failure => failure.Message)))
        {
            IsOtherDisk = failures.TrueForAll(failure => failure.IsOtherDisk),
        };
    }

    /// <summary>Records another server than the last one, before anything is read from it.</summary>
    /// <exception cref="RemoteException">That failed; the connection is closed.</exception>
    private void Record(RemoteAddress address, RemoteConnection connection)
    {
        try
        {
            _record(address);
        }
        catch (DiskException failure)
        {
            connection.Dispose();
            throw new RemoteException($"{address}: it cannot be recorded: {failure.Message}");
        }
    }

    /// <summary>Uses a connection, and keeps to the limits of its server. The lock is held.</summary>
    private void Adopt(RemoteConnection connection)
    {
        NbdExportInfo export = connection.Export;
        _wanted = (export.Flags & NbdTransmissionFlags.CanMultiConn) != 0 ? _maxConnections : 1;
        _blockBytes = export.MinimumBlock;
        uint max = Math.Min(RemoteDisk.MaxRead, export.MaximumPayload) / export.MinimumBlock * export.MinimumBlock;
        _maxReadBytes = (int)Math.Max(export.MinimumBlock, max);
        _trail = NbdProxyTrail.Find(export.Description);
        if (!connection.IsBroken) // else it has told so before, and nothing was asked of it
            _connections.Add(connection);
    }

    /// <summary>Takes back the requests of a connection that has broken, and gives them to others.</summary>
    private void HandOver(RemoteConnection connection, string reason, List<RemoteRequest> left)
    {
        var late = new List<RemoteRequest>();
        bool isClosed, wasUsed;
        lock (_lock)
        {
            isClosed = _isClosed;
            wasUsed = _connections.Remove(connection); // else it never was, or is not any more
            if (wasUsed)
            {
                (_lastBreak, _lostReason) = (_time.GetTimestamp(), reason);
                Monitor.PulseAll(_lock);
            }

            if (connection.HasTimedOut) // or requests would try the others one by one
                _connections.ForEach(other => other.BreakIfQuiet(RemoteAddress.UnacknowledgedTime));

            // Young requests are tried elsewhere, but not on one silent connection after another.
            TimeSpan patience = connection.IsSilent ? _patience - (_silence / 2)
                : _patience == TimeSpan.Zero && _connections.Count > 0 ? _silence : _patience;
            foreach (RemoteRequest request in left)
            {
                bool isBound = request.Extents is not null || request.IsProbe;
                if (isClosed || isBound || _time.GetElapsedTime(request.StartedAt) > patience)
                {
                    late.Add(request);
                    continue;
                }

                request.Restart();
                _waiting.Enqueue(request);
            }
        }

        if (wasUsed)
            LogBroken(_log, reason);
        DiskError error = isClosed ? DiskError.Unreachable : DiskError.TimedOut;
        late.ForEach(request => request.Fail(error, isClosed ? ClosedMessage : reason));

        if (!isClosed)
            SubmitWaiting();
    }

    /// <summary>
    /// A thread: breaks connections that are silent, and fails requests that have waited too long for one.
    /// </summary>
    private void Watch()
    {
        while (true)
        {
            var late = new List<RemoteRequest>();
            string reason;
            bool isClosed;
            RemoteChange? change;
            lock (_lock)
            {
                change = NoteChange();
                if (!_isClosed && change is null)
                    Monitor.Wait(_lock, TimeSpan.FromMilliseconds(Math.Min(1000, _silence.TotalMilliseconds / 4)));
                isClosed = _isClosed;
                _connections.ForEach(connection => connection.BreakIfSilent(_silence));
                while (_waiting.TryPeek(out RemoteRequest? oldest) && (isClosed || IsLate(oldest)))
                    late.Add(_waiting.Dequeue());
                reason = isClosed ? ClosedMessage : DownMessage;
            }

            if (change is not null)
                _changed?.Invoke(change);
            late.ForEach(request => request.Fail(DiskError.Unreachable, reason));
            if (isClosed)
                return;
        }

        bool IsLate(RemoteRequest request)
            => _connections.Count == 0 && _time.GetElapsedTime(request.StartedAt) > _patience;
    }

    /// <summary>Notes whether there is a connection. The lock is held.</summary>
    /// <returns>What is to be told; null if nothing has changed.</returns>
    private RemoteChange? NoteChange()
    {
        bool isLost = _connections.Count == 0;
        if (_isClosed || isLost == _lostAt is not null)
            return null;
        if (isLost)
        {
            _lostAt = _time.GetTimestamp();
            string reason = _lostReason.Length > 0 ? _lostReason : DownMessage;
            return new RemoteChange(true, _address, reason, TimeSpan.Zero, _waiting.Count);
        }

        TimeSpan away = _time.GetElapsedTime(_lostAt!.Value);
        _lostAt = null;
        return new RemoteChange(false, _address, "", away, 0);
    }

    /// <summary>A thread: makes connections, and makes those anew that have broken.</summary>
    private void KeepConnected()
    {
        var pause = TimeSpan.Zero;
        int failures = 0; // since the last success
        var reasons = new Dictionary<RemoteAddress, string>(); // why each server cannot be used, as it was logged
        while (true)
        {
            RemoteAddress address;
            RemoteAddress? last;
            bool isWanted, isFirst;
            lock (_lock)
            {
                bool isNext = failures % _servers.Count > 0; // the next server is tried at once
                if (_connections.Count >= _wanted && !_isClosed)
                    Monitor.Wait(_lock, TimeSpan.FromSeconds(1));
                else if (pause > TimeSpan.Zero && !isNext && !_isClosed)
                    Monitor.Wait(_lock, pause);
                if (_isClosed)
                    return;
                isFirst = _connections.Count == 0;
                address = isFirst ? _servers[_turn] : _address;
                last = _lastServer;
                isWanted = _connections.Count < _wanted;
            }

            if (!isWanted)
                continue;
            try
            {
                RemoteConnection? connection
                    = isFirst ? OpenFirst(address, isRequired: address != last) : Open(address);
                bool isSoon, isOther = false;
                lock (_believing)
                {
                    bool isStale; // meanwhile the remote may have been changed
                    lock (_lock)
                    {
                        isStale = _isClosed || connection.IsBroken || last != _lastServer
                            || (_connections.Count > 0 && address != _address);
                    }

                    if (!isStale && address != last)
                        Record(address, connection);
                    lock (_lock)
                    {
                        if (!isStale && !_isClosed)
                        {
                            isOther = address != _address;
                            Believe(address);
                            Adopt(connection); // the server may have been started anew, with other limits
                            connection = null;
                            Monitor.PulseAll(_lock);
                        }

                        isSoon = _lastBreak is { } broken && _time.GetElapsedTime(broken) <= s_stableTime;
                    }
                }

                connection?.Dispose();
                if (isOther)
                    LogSwitched(_log, address);
                pause = isSoon ? Longer(pause) : TimeSpan.Zero;
                failures = 0;
                _down = null;
                reasons.Clear();
                SubmitWaiting();
            }
            catch (RemoteException failure)
            {
                if (!reasons.TryGetValue(address, out string? known) || known != failure.Message)
                    LogUnreachable(_log, failure.Message);
                _down = reasons[address] = failure.Message;
                lock (_lock)
                {
                    if (isFirst)
                        _turn = (_servers.IndexOf(address) + 1) % _servers.Count;
                    failures = isFirst ? failures + 1 : 0;
                    if (failures % _servers.Count == 0)
                        pause = Longer(pause);
                }
            }
        }

        static TimeSpan Longer(TimeSpan pause) => TimeSpan.FromSeconds(Math.Clamp(pause.TotalSeconds * 2, 0.1, 2));
    }
}
