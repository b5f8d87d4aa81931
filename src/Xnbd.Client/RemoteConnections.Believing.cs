using Xnbd.Protocol;
using Xnbd.Storage;

namespace Xnbd.Client;

/// <content>What is asked of a server before it is believed to have the disk.</content>
internal sealed partial class RemoteConnections
{
    /// <summary>Time for the blocks that are compared.</summary>
    private static readonly TimeSpan s_compareTime = TimeSpan.FromSeconds(10);

    /// <summary>Connects to a server, and checks what can be known without reading from it.</summary>
    /// <exception cref="RemoteException">The server cannot be used, or has another disk.</exception>
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
        else if (NbdProxyTrail.Find(export.Description).Contains(_proxyId))
        {
            reason = "its data come from this proxy itself: reads would go round in a circle";
        }

        if (reason is null)
            return connection;
        connection.Dispose();
        throw new RemoteException($"{address}: {reason}") { IsOtherDisk = true };
    }

    /// <summary>Connects to a server when there is no other connection, and compares blocks that are known.</summary>
    /// <param name="address">The server.</param>
    /// <param name="isRequired">
    /// The server must have what is known. Otherwise a difference is only logged: the server is the one that was used
    /// last, and may have been written to before its disk was moved here.
    /// </param>
    /// <exception cref="RemoteException">The server cannot be used, or has another disk.</exception>
    private RemoteConnection OpenFirst(RemoteAddress address, bool isRequired)
    {
        DiskSamples samples = _takeSamples();
        RemoteConnection connection = Open(address);
        if (isRequired && samples.Blocks.Count == 0 && _lastServer is { } last && last != address)
            LogUnknown(_log, address);
        try
        {
            List<byte[]?> others = ReadSamples(connection, address, samples);
            if (isRequired && others.Count(data => data is null) > others.Count / 2)
                throw new RemoteException($"{address}: most of the blocks by which it is recognized cannot be read");
            if (samples.FindDifference(others) is { } offset)
            {
                if (isRequired)
                {
                    throw new RemoteException(
                        $"{address}: the block at byte {offset} is not the one that was fetched: it is another disk,"
                        + " or it has changed since")
                    {
                        IsOtherDisk = true,
                    };
                }

                LogChanged(_log, address, offset);
            }

            return connection;
        }
        catch
        {
            connection.Dispose();
            throw;
        }
    }

    /// <summary>Reads the blocks by which a disk is recognized.</summary>
    /// <returns>What the server has, in their order; null where a sector is bad.</returns>
    private List<byte[]?> ReadSamples(RemoteConnection connection, RemoteAddress address, DiskSamples samples)
    {
        var reads = new List<(Task Task, byte[] Data)>();
        bool mustSend = false;
        foreach ((long offset, byte[] expected) in samples.Blocks)
        {
            byte[] data = new byte[expected.Length];
            RemoteRequest request = RemoteRequest.RentProbe(offset, data, _time.GetTimestamp());
            reads.Add((request.Task.AsTask(), data));
            if (connection.TryAdd(request, out bool isFirst))
                mustSend |= isFirst;
            else
                request.Fail(DiskError.Unreachable, $"{address}: the connection has broken");
        }

        if (mustSend)
            connection.SendSoon();
        var others = new List<byte[]?>();
        long start = Environment.TickCount64;
        foreach ((Task task, byte[] data) in reads)
        {
            TimeSpan left = s_compareTime - TimeSpan.FromMilliseconds(Environment.TickCount64 - start);
            try
            {
                if (!task.Wait(left > TimeSpan.Zero ? left : TimeSpan.Zero))
                    throw new RemoteException($"{address}: the server has not answered in time");
                others.Add(data);
            }
            catch (AggregateException failure) when (failure.InnerException is DiskException { Error: DiskError.Io })
            {
                others.Add(null); // a bad sector says nothing
            }
            catch (AggregateException failure)
            {
                throw new RemoteException(failure.InnerException!.Message); // it names the server
            }
        }

        return others;
    }
}
