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

    private RemoteConnection Open(RemoteAddress address)
    {
        RemoteConnection connection = RemoteConnection.Connect(address, s_connectTime, SubmitWaiting, HandOver, _time);
        NbdExportInfo export = connection.Export;
        string? reason = null;
        if (export.MinimumBlock > BlockRange.BlockSize)
        {
            reason = $"the server wants blocks of {export.MinimumBlock} bytes; more than {BlockRange.BlockSize} is not"
                + " supported";
        }
        else if (_length is { } length && (long)export.Length != length)
        {
            reason = $"the export has {export.Length} bytes, not {length}: it is another disk";
        }

        if (reason is null)
            return connection;
        connection.Dispose();
        throw new RemoteException($"{address}: {reason}");
    }

    /// <summary>Uses a connection, and keeps to the limits of its server. The lock is held.</summary>
    private void Adopt(RemoteConnection connection)
    {
        NbdExportInfo export = connection.Export;
        _wanted = (export.Flags & NbdTransmissionFlags.CanMultiConn) != 0 ? _maxConnections : 1;
        _blockBytes = export.MinimumBlock;
        uint max = Math.Min(RemoteDisk.MaxRead, export.MaximumPayload) / export.MinimumBlock * export.MinimumBlock;
        _maxReadBytes = (int)Math.Max(export.MinimumBlock, max);
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
                _lastBreak = _time.GetTimestamp();
                Monitor.PulseAll(_lock);
            }

            if (connection.HasTimedOut) // or requests would try the others one by one
                _connections.ForEach(other => other.BreakIfQuiet(RemoteAddress.UnacknowledgedTime));

            // Young requests are tried elsewhere, but not on one silent connection after another.
            TimeSpan patience = connection.IsSilent ? _patience - (_silence / 2)
                : _patience == TimeSpan.Zero && _connections.Count > 0 ? _silence : _patience;
            foreach (RemoteRequest request in left)
            {
                if (isClosed || request.Extents is not null || _time.GetElapsedTime(request.StartedAt) > patience)
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
            lock (_lock)
            {
                if (!_isClosed)
                    Monitor.Wait(_lock, TimeSpan.FromMilliseconds(Math.Min(1000, _silence.TotalMilliseconds / 4)));
                isClosed = _isClosed;
                _connections.ForEach(connection => connection.BreakIfSilent(_silence));
                while (_waiting.TryPeek(out RemoteRequest? oldest) && (isClosed || IsLate(oldest)))
                    late.Add(_waiting.Dequeue());
                reason = isClosed ? ClosedMessage : DownMessage;
            }

            late.ForEach(request => request.Fail(DiskError.Unreachable, reason));
            if (isClosed)
                return;
        }

        bool IsLate(RemoteRequest request)
            => _connections.Count == 0 && _time.GetElapsedTime(request.StartedAt) > _patience;
    }

    /// <summary>A thread: makes connections, and makes those anew that have broken.</summary>
    private void KeepConnected()
    {
        var pause = TimeSpan.Zero;
        while (true)
        {
            RemoteAddress address;
            bool isWanted;
            lock (_lock)
            {
                if (_connections.Count >= _wanted && !_isClosed)
                    Monitor.Wait(_lock, TimeSpan.FromSeconds(1));
                else if (pause > TimeSpan.Zero && !_isClosed)
                    Monitor.Wait(_lock, pause);
                if (_isClosed)
                    return;
                address = _address;
                isWanted = _connections.Count < _wanted;
            }

            if (!isWanted)
                continue;
            try
            {
                RemoteConnection connection = Open(address);
                bool isStale, isSoon;
                lock (_lock)
                {
                    isStale = _isClosed || _address != address || connection.IsBroken;
                    if (!isStale)
                        Adopt(connection); // the server may have been started anew, with other limits
                    isSoon = _lastBreak is { } last && _time.GetElapsedTime(last) <= s_stableTime;
                }

                if (isStale)
                    connection.Dispose();
                if (_down is not null)
                    LogBack(_log, address);
                pause = isSoon ? Longer(pause) : TimeSpan.Zero;
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
}
