using System.Diagnostics;
using System.Net.Sockets;
using Xnbd.Protocol;
using Xnbd.TestKit;

namespace Xnbd.Bench.Moves;

/// <summary>An operation that was replied to: when it began and ended, as time stamps.</summary>
internal readonly record struct Sample(long Start, long End, bool IsRead)
{
    public double Milliseconds => Stopwatch.GetElapsedTime(Start, End).TotalMilliseconds;
}

/// <summary>
/// The machine whose disk moves: it does one operation of a trace after the other, and checks what it reads. It can be
/// held between two operations, and goes on at another server, as a virtual machine that migrates does.
/// <para>
/// A thread of its own does the operations. Its figures are read after its end. <c>_lock</c> guards where it is to
/// work; nothing is sent or received while it is held, other than while the client is being opened or closed.
/// </para>
/// </summary>
internal sealed class MoveClient : IDisposable
{
    private const int CompareBlocks = 256;

    private readonly MovingDisk _disk;
    private readonly Operation[] _trace;
    private readonly Thread _thread;
    private readonly object _lock = new();
    private NbdTestClient? _connection; // null: it is held
    private bool _isHeld; // it is to be held
    private TaskCompletionSource<long>? _firstReply; // at the server of the last GoOn
    private volatile bool _isEnding;

    /// <summary>Begins to work at a server.</summary>
    public MoveClient(MovingDisk disk, Operation[] trace, RunningPeer server)
    {
        (_disk, _trace) = (disk, trace);
        _connection = Open(server);
        _thread = new Thread(Work) { IsBackground = true };
        _thread.Start();
    }

    /// <summary>All operations that succeeded, in order.</summary>
    public List<Sample> Samples { get; } = [];

    /// <summary>Operations without a reply, or with an error.</summary>
    public int Lost { get; private set; }

    /// <summary>Blocks that a read returned, and that were not as they must be.</summary>
    public int Differences { get; private set; }

    /// <summary>Why an operation was lost; empty when none was.</summary>
    public string LastFailure { get; private set; } = "";

    /// <summary>The longest operation that ended at a time stamp or later, in milliseconds.</summary>
    public double Longest(long since)
        => Samples.Where(sample => sample.End >= since).Select(sample => sample.Milliseconds).DefaultIfEmpty().Max();

    /// <summary>Ends the operation that is under way, and leaves the server.</summary>
    /// <returns>The time stamp since which the client has no disk.</returns>
    public long Hold()
    {
        lock (_lock)
        {
            _isHeld = true;
            while (_connection is not null)
                Monitor.Wait(_lock);
            return Stopwatch.GetTimestamp();
        }
    }

    /// <summary>Goes on at a server.</summary>
    /// <returns>The time stamp of the first reply.</returns>
    public Task<long> GoOn(RunningPeer server)
    {
        NbdTestClient connection = Open(server);
        lock (_lock)
        {
            (_connection, _isHeld) = (connection, false);
            _firstReply = new TaskCompletionSource<long>(TaskCreationOptions.RunContinuationsAsynchronously);
            Monitor.PulseAll(_lock);
            return _firstReply.Task;
        }
    }

    /// <summary>Ends the work, and compares the whole disk at the last server.</summary>
    /// <returns>Blocks that differ, those of earlier reads included.</returns>
    /// <exception cref="IOException">The server answers no more.</exception>
    public int Compare()
    {
        End();
        NbdTestClient connection = _connection ?? throw new IOException("the client has no server");
        try
        {
            for (int at = 0; at < MovingDisk.BlockCount; at += CompareBlocks)
                Differences += _disk.Differences(at, Read(connection, at, CompareBlocks));
            return Differences;
        }
        catch (Exception failure) when (failure is SocketException or EndOfStreamException)
        {
            throw new IOException(failure.Message, failure);
        }
    }

    public void Dispose()
    {
        End();
        _connection?.Dispose();
    }

    private void End()
    {
        lock (_lock)
        {
            _isEnding = true;
            Monitor.PulseAll(_lock);
        }

        _thread.Join();
    }

    private static NbdTestClient Open(RunningPeer server)
        => NbdTestClient.Open(server.Endpoint.Remote, name: server.Peer.ExportName);

    private static byte[] Read(NbdTestClient connection, int blockIndex, int blockCount)
        => connection.Read(
            (ulong)blockIndex * MovingDisk.BlockBytes, (uint)blockCount * MovingDisk.BlockBytes);

    private void Work()
    {
        for (int i = 0; !_isEnding; i = (i + 1) % _trace.Length)
        {
            Operation operation = _trace[i];
            Thread.Sleep(operation.Think);
            if (Connection() is not { } connection)
                return;
            long start = Stopwatch.GetTimestamp();
            try
            {
                Do(connection, operation);
                Samples.Add(new Sample(start, Stopwatch.GetTimestamp(), operation.Kind == 'R'));
                _firstReply?.TrySetResult(Samples[^1].End);
            }
            catch (Exception failure) when (failure is SocketException or EndOfStreamException or IOException)
            {
                Lost++;
                LastFailure = failure.Message;
                if (operation.Kind != 'R')
                    _disk.LostWrite(operation.BlockIndex, operation.BlockCount);
            }
        }
    }

    /// <summary>The connection to work with; waits while the client is held.</summary>
    /// <returns>Null at the end.</returns>
    private NbdTestClient? Connection()
    {
        lock (_lock)
        {
            if (_isHeld)
            {
                _connection?.Disconnect();
                _connection?.Dispose();
                _connection = null;
                Monitor.PulseAll(_lock);
            }

            while (_connection is null && !_isEnding)
                Monitor.Wait(_lock);
            return _isEnding ? null : _connection;
        }
    }

    private void Do(NbdTestClient connection, Operation operation)
    {
        (_, char kind, int at, int count) = operation;
        if (kind == 'R')
        {
            Differences += _disk.Differences(at, Read(connection, at, count));
            return;
        }

        NbdCommandFlags flags = kind == 'S' ? NbdCommandFlags.Fua : NbdCommandFlags.None;
        NbdError error = connection.Write(
            (ulong)at * MovingDisk.BlockBytes, _disk.Next(at, count), flags);
        if (error != NbdError.None)
            throw new IOException($"write at block {at}: {error}");
        _disk.Wrote(at, count);
    }
}
