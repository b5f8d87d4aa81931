using Xnbd.Protocol;

namespace Xnbd.TestKit;

/// <summary>
/// Seeded random operations on four connections, many at a time, compared with a byte array. An operation that overlaps
/// one under way waits for it, so that the outcome is defined; all others go out at once.
/// </summary>
public sealed class ModelRun(string socketPath, int size, int seed, int operations)
{
    private const int Connections = 4;
    private const int MaxUnderWay = 24; // for one connection
    private const int LargestLog = 18;

    private readonly byte[] _model = new byte[size];
    private readonly object _lock = new();
    private readonly Dictionary<(int Connection, ulong Cookie), Operation> _underWay = [];
    private Exception? _failure;

    private sealed record Operation(NbdCommand Command, int Offset, int Length, byte[]? Expected)
    {
        public List<Reply> Replies { get; } = [];
    }

    /// <summary>The disk's contents before the run; zeroes unless given.</summary>
    public byte[] Initial
    {
        init => value.CopyTo(_model, 0);
    }

    /// <summary>A trim zeroes whole blocks of this length in bytes; the rest stays.</summary>
    public int TrimUnit { get; init; } = 4096;

    /// <summary>The contents that the disk must have afterwards.</summary>
    public byte[] Model => _model;

    public async Task Run()
    {
        NbdTestClient[] clients = [.. Enumerable.Range(0, Connections)
            .Select(i => NbdTestClient.Open(socketPath, structured: i != 1, "", i != 1 ? ["base:allocation"] : []))];
        try
        {
            Task[] receivers = [.. clients.Select((client, i) => Task.Factory.StartNew(
                () => Receive(client, i), TaskCreationOptions.LongRunning))];
            Drive(clients);
            WaitUntil(() => _underWay.Count == 0);
            foreach (NbdTestClient client in clients)
                client.Disconnect();
            await Task.WhenAll(receivers).WaitAsync(TimeSpan.FromSeconds(60));
        }
        finally
        {
            foreach (NbdTestClient client in clients)
                client.Dispose();
        }

        if (_failure is not null)
            throw new InvalidOperationException($"seed {seed}: {_failure.Message}", _failure);
    }

    private void Drive(NbdTestClient[] clients)
    {
        var random = new Random(seed);
        for (int i = 0; i < operations; i++)
        {
            int connection = random.Next(Connections);
            int offset = random.Next(size), length = 1 + random.Next(1 << random.Next(LargestLog + 1));
            if (random.Next(3) == 0)
                (offset, length) = (offset / 4096 * 4096, (length + 4095) / 4096 * 4096);
            length = Math.Min(length, size - offset);
            NbdCommand command = random.Next(20) switch
            {
                < 8 => NbdCommand.Read,
                < 15 => NbdCommand.Write,
                < 17 => NbdCommand.WriteZeroes,
                17 => NbdCommand.Flush,
                18 => NbdCommand.Trim,
                _ => connection == 1 ? NbdCommand.Cache : NbdCommand.BlockStatus,
            };
            if (command == NbdCommand.Flush)
                (offset, length) = (0, 0);
            var flags = command switch
            {
                NbdCommand.WriteZeroes when random.Next(2) == 0 => NbdCommandFlags.NoHole,
                NbdCommand.Read when connection != 1 && random.Next(4) == 0 => NbdCommandFlags.Df,
                _ => NbdCommandFlags.None,
            };
            if (random.Next(50) == 0)
                flags |= NbdCommandFlags.Fua;
            byte[]? payload = null;
            if (command == NbdCommand.Write)
            {
                payload = new byte[length];
                random.NextBytes(payload);
            }

            WaitUntil(() => _underWay.Count(o => o.Key.Connection == connection) < MaxUnderWay
                && !_underWay.Values.Any(o => Conflicts(o, command, offset, length)));
            Submit(clients[connection], connection, command, offset, length, flags, payload);
        }
    }

    private void Submit(
        NbdTestClient client,
        int connection,
        NbdCommand command,
        int offset,
        int length,
        NbdCommandFlags flags,
        byte[]? payload)
    {
        lock (_lock)
        {
            Span<byte> range = _model.AsSpan(offset, length);
            byte[]? expected = command == NbdCommand.Read ? range.ToArray() : null;
            payload?.CopyTo(range);
            if (command == NbdCommand.WriteZeroes)
                range.Clear();
            if (command == NbdCommand.Trim)
            {
                // This server makes trimmed data zero; clients must not rely on that.
                int start = (offset + TrimUnit - 1) / TrimUnit * TrimUnit;
                int end = offset + length == size ? size : (offset + length) / TrimUnit * TrimUnit;
                if (end > start)
                    _model.AsSpan(start, end - start).Clear();
            }

            _underWay.Add((connection, client.NextCookie), new Operation(command, offset, length, expected));
        }

        client.SendRequest(command, (ulong)offset, (uint)length, flags, payload);
    }

    private static bool Conflicts(Operation other, NbdCommand command, int offset, int length)
        => (Changes(other.Command) || Changes(command))
            && offset < other.Offset + other.Length && other.Offset < offset + length;

    private static bool Changes(NbdCommand command)
        => command is NbdCommand.Write or NbdCommand.WriteZeroes or NbdCommand.Trim;

    private void Receive(NbdTestClient client, int connection)
    {
        try
        {
            while (true)
            {
                Reply reply = client.ReceiveReply();
                lock (_lock)
                {
                    Operation operation = _underWay[(connection, reply.Cookie)];
                    operation.Replies.Add(reply);
                    if (!reply.IsLast)
                        continue;
                    Check(operation);
                    _underWay.Remove((connection, reply.Cookie));
                    Monitor.PulseAll(_lock);
                }
            }
        }
        catch (EndOfStreamException) when (_underWay.Count == 0)
        {
            // It was disconnected, as intended.
        }
        catch (Exception failure)
        {
            lock (_lock)
            {
                _failure ??= failure;
                Monitor.PulseAll(_lock);
            }
        }
    }

    private static void Check(Operation operation)
    {
        if (operation.Replies.FirstOrDefault(r => r.Error != NbdError.None) is { } failed)
            throw new IOException($"{operation.Command} of {operation.Length} at {operation.Offset}: {failed.Error}");
        if (operation.Expected is null)
            return;
        byte[] data = NbdTestClient.Assemble(operation.Replies, (ulong)operation.Offset, (uint)operation.Length);
        int at = data.AsSpan().CommonPrefixLength(operation.Expected);
        if (at != operation.Length)
        {
            throw new IOException(
                $"read of {operation.Length} at {operation.Offset}: "
                + $"byte {at} is {data[at]}, not {operation.Expected[at]}");
        }
    }

    private void WaitUntil(Func<bool> condition)
    {
        lock (_lock)
        {
            while (_failure is null && !condition())
            {
                if (!Monitor.Wait(_lock, TimeSpan.FromSeconds(60)))
                    throw new TimeoutException(
                        $"seed {seed}: no reply for a minute; {_underWay.Count} operations under way");
            }

            if (_failure is not null)
                throw new InvalidOperationException($"seed {seed}: {_failure.Message}", _failure);
        }
    }
}
