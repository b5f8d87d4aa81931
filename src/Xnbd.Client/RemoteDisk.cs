using Xnbd.Storage;

namespace Xnbd.Client;

/// <summary>
/// A disk on another machine, read-only, over one connection, or several where the server allows that.
/// <para>
/// A read keeps to the limits of the server: it is cut into parts, or widened to whole blocks. It waits for a
/// connection, and for its reply, as long as there is patience; see <see cref="RemoteConnections"/>, which holds all
/// state. The address can be changed while reads are under way. Nothing is ever written to the server.
/// </para>
/// A read fails as <see cref="DiskError.TimedOut"/> if the server is silent, as <see cref="DiskError.Unreachable"/> if
/// there is no connection, or the disk is closed, and as <see cref="DiskError.Io"/> if the server answers with an
/// error.
/// </summary>
public sealed class RemoteDisk : Disk
{
    /// <summary>The largest read that is sent, in bytes; less where the server says that it takes less.</summary>
    public const int MaxRead = 1 << 20;

    /// <summary>How much is asked about at once at most, in bytes: a server may have to look at all of it.</summary>
    private const int MaxAsked = 1 << 30;

    private readonly RemoteConnections _connections;
    private readonly TimeProvider _time;
    private readonly ulong _proxyId;

    private RemoteDisk(RemoteOptions options)
    {
        _time = options.Time;
        _proxyId = options.ProxyId;
        _connections = new RemoteConnections(options) { ReadAnew = ReadAnew };
    }

    /// <inheritdoc/>
    public override long Length => _connections.Length;

    /// <inheritdoc/>
    public override DiskFeatures Features => DiskFeatures.ReadOnly;

    /// <summary>Where the server is.</summary>
    public RemoteAddress Address => _connections.Address;

    /// <summary>The ids of the proxies that reads pass through, this one's first.</summary>
    public IReadOnlyList<ulong> Trail => [_proxyId, .. _connections.Trail];

    /// <summary>Connections that are open.</summary>
    public int ConnectionCount => _connections.Count;

    /// <summary>How the remote is at this moment.</summary>
    public RemoteState State => _connections.State;

    /// <summary>Connects.</summary>
    /// <param name="options">Where to, and how.</param>
    /// <exception cref="RemoteException">The server cannot be used.</exception>
    public static RemoteDisk Connect(RemoteOptions options) => Start(options, length: null);

    /// <summary>
    /// Makes a disk whose server is away. It is connected to as soon as it is there, if it has this length.
    /// </summary>
    /// <param name="options">Where to, and how.</param>
    /// <param name="length">Length of the disk in bytes, which is known from somewhere else.</param>
    /// <exception cref="RemoteException">The system has no thread to spare.</exception>
    public static RemoteDisk ConnectLater(RemoteOptions options, long length) => Start(options, length);

    private static RemoteDisk Start(RemoteOptions options, long? length)
    {
        var disk = new RemoteDisk(options);
        disk._connections.Start(length);
        return disk;
    }

    /// <summary>Reads from another server from now on. Reads that are under way go there, too.</summary>
    /// <param name="address">The server and its export.</param>
    /// <exception cref="RemoteException">
    /// It cannot be used, or has another disk; nothing has changed.
    /// </exception>
    /// <exception cref="DiskException">It cannot be recorded; nothing has changed.</exception>
    public void SwitchTo(RemoteAddress address) => _connections.SwitchTo(address);

    /// <inheritdoc/>
    public override bool TryRead(long offset, Span<byte> buffer) => false; // there is a network between

    /// <inheritdoc/>
    public override bool TryWrite(long offset, ReadOnlySpan<byte> data) => throw ReadOnlyFailure();

    /// <inheritdoc/>
    public override FileRange TryLocate(long offset, int length, bool findHoles) => FileRange.None;

    /// <inheritdoc/>
    public override bool IsFar(long offset, long length, bool isWrite) => true;

    /// <inheritdoc/>
    public override ValueTask ReadAsync(long offset, Memory<byte> buffer, CancellationToken cancel = default)
    {
        uint block = _connections.BlockBytes;
        if (offset % block + buffer.Length > _connections.MaxReadBytes)
            return ReadInParts(offset, buffer, cancel);
        return offset % block != 0 || buffer.Length % block != 0
            ? ReadWidened(offset, buffer, cancel)
            : Read(offset, buffer, cancel);
    }

    /// <inheritdoc/>
    public override ValueTask WriteAsync(
        long offset, ReadOnlyMemory<byte> data, bool durable, CancellationToken cancel = default)
        => ValueTask.FromException(ReadOnlyFailure());

    /// <inheritdoc/>
    public override ValueTask ZeroAsync(
        long offset, long length, ZeroMode mode, bool durable, CancellationToken cancel = default)
        => ValueTask.FromException(ReadOnlyFailure());

    /// <inheritdoc/>
    public override ValueTask TrimAsync(long offset, long length, bool durable, CancellationToken cancel = default)
        => ValueTask.FromException(ReadOnlyFailure());

    /// <inheritdoc/>
    public override ValueTask FlushAsync() => ValueTask.CompletedTask;

    /// <inheritdoc/>
    public override ValueTask PrefetchAsync(long offset, long length, CancellationToken cancel = default)
        => ValueTask.CompletedTask;

    /// <inheritdoc/>
    /// <remarks>
    /// Zeroes are what the server says they are. Where it says nothing, or there is no time to ask, all is data: that
    /// is never wrong.
    /// </remarks>
    public override async ValueTask GetExtentsAsync(long offset, long length, ExtentList extents)
    {
        int asked = (int)Math.Min(length, MaxAsked);
        uint block = _connections.BlockBytes;
        var found = new ExtentList(extents.Room);
        RemoteRequest question = RemoteRequest.RentQuestion(offset, asked, found, _time.GetTimestamp());
        ValueTask task = question.Task;
        if (offset % block != 0 || asked % block != 0 || !_connections.TryAsk(question))
            question.Fail(DiskError.NotSupported, "it cannot be asked");
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

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (disposing)
            _connections.Close();
    }

    private DiskException ReadOnlyFailure()
        => new(DiskError.Permission, $"{Address}: nothing is written to a remote disk");

    private ValueTask Read(long offset, Memory<byte> buffer, CancellationToken cancel)
    {
        RemoteRequest request = RemoteRequest.Rent(offset, buffer, _time.GetTimestamp());
        ValueTask task = request.Task;
        int use = request.Use;
        _connections.Submit(request);
        return cancel.CanBeCanceled ? Wait(task, request, use, cancel) : task;
    }

    /// <summary>
    /// Waits for a read that may be given up as long as it waits for a connection. (Then a connection may be filling
    /// its buffer.)
    /// </summary>
    private async ValueTask Wait(ValueTask task, RemoteRequest request, int use, CancellationToken cancel)
    {
        using (cancel.Register(() => _connections.Withdraw(request, use)))
            await task;
    }

    private async ValueTask ReadInParts(long offset, Memory<byte> buffer, CancellationToken cancel)
    {
        for (int done = 0; done < buffer.Length;)
        {
            // The block in which a part begins counts whole.
            long max = _connections.MaxReadBytes - ((offset + done) % _connections.BlockBytes);
            int length = (int)Math.Min(buffer.Length - done, max);
            await ReadAsync(offset + done, buffer.Slice(done, length), cancel);
            done += length;
        }
    }

    /// <summary>For servers that take whole blocks only.</summary>
    private async ValueTask ReadWidened(long offset, Memory<byte> buffer, CancellationToken cancel)
    {
        long block = _connections.BlockBytes, start = offset / block * block;
        long end = Math.Min((offset + buffer.Length + block - 1) / block * block, Length);
        byte[] wide = new byte[end - start];
        await Read(start, wide, cancel);
        wide.AsMemory((int)(offset - start), buffer.Length).CopyTo(buffer);
    }

    /// <summary>Completes a read that was made for a server with other limits.</summary>
    private async Task ReadAnew(RemoteRequest request)
    {
        try
        {
            await ReadAsync(request.Offset, request.Buffer);
        }
        catch (DiskException failure)
        {
            request.Fail(failure.Error, failure.Message);
            return;
        }

        request.Succeed();
    }
}
