using System.Diagnostics;
using System.Net.Sockets;
using Xnbd.Protocol;
using Xnbd.TestKit;

namespace Xnbd.Bench.Clients;

/// <summary>
/// Many connections, each with one random read under way, on one thread of this program: it counts what each connection
/// gets, which no other client tells.
/// </summary>
/// <param name="Connections">Number of connections.</param>
internal sealed record ManyConnectionsClient(int Connections)
{
    /// <summary>The size of its requests.</summary>
    public const string Size = "4k";

    private const int RequestBytes = 4096;
    private const int ReplyBytes = NbdSize.SimpleReply + RequestBytes;
    private const int WaitMilliseconds = 100;

    public Task<ClientRun> Run(Job job) => Task.Run(() =>
    {
        var connections = new List<Connection>();
        try
        {
            for (int i = 0; i < Connections; i++)
            {
                job.Stop.ThrowIfCancellationRequested();
                connections.Add(new Connection(NbdTestClient.Open(
                    job.Server.Endpoint.Remote, structured: false, job.Server.Peer.ExportName)));
            }

            return Drive(job, connections);
        }
        finally
        {
            connections.ForEach(connection => connection.Client.Dispose());
        }
    });

    private static ClientRun Drive(Job job, List<Connection> connections)
    {
        using var sockets = new ReadySockets(connections.Select(connection => connection.Client.Socket));
        var random = new Random(1);
        var latencies = new List<double>();
        var ready = new List<int>();
        byte[] buffer = new byte[ReplyBytes];
        double cpu = ProcessorTime.OfCurrentThread(), serverCpu = job.Server.CpuSeconds;
        long start = Stopwatch.GetTimestamp();
        foreach (Connection connection in connections)
            connection.Send(random);
        while (Stopwatch.GetElapsedTime(start).TotalSeconds < job.Seconds)
        {
            job.Stop.ThrowIfCancellationRequested();
            sockets.Wait(ready, WaitMilliseconds);
            foreach (int index in ready)
            {
                Connection connection = connections[index];
                if (!connection.Receive(buffer))
                    continue;
                latencies.Add(Stopwatch.GetElapsedTime(connection.SentAt).TotalMicroseconds);
                connection.Send(random);
            }
        }

        double seconds = Stopwatch.GetElapsedTime(start).TotalSeconds;
        serverCpu = job.Server.CpuSeconds - serverCpu;
        cpu = ProcessorTime.OfCurrentThread() - cpu;
        latencies.Sort();
        if (latencies.Count == 0)
            throw new InvalidOperationException("it answered no request in time");
        double[] replies = [.. connections.Select(connection => (double)connection.Replies)];
        return new ClientRun(
            latencies.Count,
            (double)latencies.Count * RequestBytes,
            seconds,
            cpu,
            latencies[latencies.Count / 2],
            latencies[latencies.Count * 99 / 100])
        {
            ServerCpuSeconds = serverCpu,
            SlowestToMedian = replies.Min() / Measurement.Median(replies),
        };
    }

    private sealed class Connection(NbdTestClient client)
    {
        private readonly byte[] _request = new byte[NbdSize.Request];
        private int _received;

        public NbdTestClient Client => client;

        /// <summary>When the request that is under way was sent.</summary>
        public long SentAt { get; private set; }

        /// <summary>Number of replies so far.</summary>
        public int Replies { get; private set; }

        public void Send(Random random)
        {
            ulong offset = (ulong)random.NextInt64((long)client.Size / RequestBytes) * RequestBytes;
            new NbdRequest(0, NbdCommand.Read, (ulong)Replies, offset, RequestBytes).Write(_request);
            SentAt = Stopwatch.GetTimestamp();
            client.Send(_request);
        }

        /// <summary>Receives what is there.</summary>
        /// <returns>The reply is complete.</returns>
        public bool Receive(byte[] buffer)
        {
            int count = client.Socket.Receive(buffer, ReplyBytes - _received, SocketFlags.None);
            if (count == 0)
                throw new IOException("the server closed a connection");
            _received += count;
            if (_received < ReplyBytes)
                return false;
            _received = 0;
            Replies++;
            return true;
        }
    }
}
