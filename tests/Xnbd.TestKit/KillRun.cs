using System.Net.Sockets;
using Xnbd.Protocol;

namespace Xnbd.TestKit;

/// <summary>
/// A server that is killed at random moments under load, started again, and compared. Every write that was replied to
/// must be there. Of a write that was under way, each byte is the old one or the new one.
/// <para>
/// Four clients write at the same time. In the first half of the disk they write interleaved stripes that are shorter
/// than a block, so blocks are shared. In the second half each client has its own region.
/// </para>
/// </summary>
/// <param name="start">Starts the server, on the same files each time.</param>
/// <param name="model">The disk's contents at first, and then the contents that it must have.</param>
/// <param name="seed">Seed of all that is random, except how long each server lives.</param>
public sealed class KillRun(Func<ServerProcess> start, byte[] model, int seed)
{
    private const int Clients = 4;
    private const int Stripe = 1536;

    private readonly Random _random = new(seed);
    private readonly List<(int Offset, byte[]? Data)> _underWay = []; // writes that may or may not have happened

    /// <summary>
    /// Whether the whole disk is read after each kill; otherwise only after the last one. A proxy whose disk was read
    /// has nothing left to fetch.
    /// </summary>
    public bool ComparesAfterEachKill { get; init; } = true;

    /// <summary>Writes that were replied to.</summary>
    public long Acknowledged;

    /// <summary>How many servers were killed during writes.</summary>
    public int KilledUnderWay { get; private set; }

    /// <summary>Runs and kills.</summary>
    public void Run(int kills)
    {
        for (int kill = 0; kill < kills; kill++)
        {
            using ServerProcess server = start();
            if (ComparesAfterEachKill)
                Compare(server, kill);
            var writers =
                Enumerable.Range(0, Clients).Select(i => new Writer(this, server, i, _random.Next())).ToList();
            Thread.Sleep(_random.Next(1, 60));
            server.Kill();
            foreach (Writer writer in writers)
                writer.Join();
            int before = _underWay.Count;
            _underWay.AddRange(writers.Select(w => w.UnderWay).Where(w => w.Data is not null));
            KilledUnderWay += _underWay.Count > before ? 1 : 0;
        }

        using ServerProcess last = start();
        Compare(last, kills);
    }

    private void Compare(ServerProcess server, int kill)
    {
        using NbdTestClient client = server.Open();
        byte[] seen = new byte[model.Length];
        const int piece = 8 << 20;
        for (int offset = 0; offset < seen.Length; offset += piece)
            client.Read((ulong)offset, (uint)Math.Min(piece, seen.Length - offset)).CopyTo(seen, offset);
        client.Disconnect();
        for (int at = 0; ;)
        {
            at += seen.AsSpan(at).CommonPrefixLength(model.AsSpan(at));
            if (at == seen.Length)
                break;
            if (!_underWay.Any(w => at >= w.Offset && at < w.Offset + w.Data!.Length
                && seen[at] == w.Data[at - w.Offset]))
                throw new InvalidOperationException(
                    $"seed {seed}, kill {kill}: byte {at} is {seen[at]}, not {model[at]}\n{server.Log}");
            model[at] = seen[at];
        }

        _underWay.Clear();
    }

    private sealed class Writer
    {
        private readonly KillRun _run;
        private readonly Thread _thread;
        private readonly int _index;
        private readonly Random _random;
        private readonly byte[] _model;

        public Writer(KillRun run, ServerProcess server, int index, int seed)
        {
            (_run, _index, _random, _model) = (run, index, new Random(seed), run.Model);
            NbdTestClient client = server.Open();
            _thread = new Thread(() => Write(client)) { IsBackground = true };
            _thread.Start();
        }

        public (int Offset, byte[]? Data) UnderWay { get; private set; }

        public void Join() => _thread.Join();

        private void Write(NbdTestClient client)
        {
            using (client)
            {
                try
                {
                    while (true)
                        WriteOnce(client);
                }
                catch (Exception failure) when (failure is SocketException or EndOfStreamException)
                {
                    // Killed.
                }
            }
        }

        private void WriteOnce(NbdTestClient client)
        {
            int half = _model.Length / 2, offset, length;
            if (_random.Next(2) == 0)
            {
                int stripe = (_random.Next(half / Stripe / Clients) * Clients) + _index, at = _random.Next(Stripe);
                (offset, length) = ((stripe * Stripe) + at, 1 + _random.Next(Stripe - at));
            }
            else
            {
                int share = (_model.Length - half) / Clients;
                int at = _random.Next(share);
                (offset, length) =
                    (half + (_index * share) + at, 1 + _random.Next(Math.Min(share - at, 1 << _random.Next(17))));
            }

            byte[] data = new byte[length];
            bool isZero = _random.Next(6) == 0;
            if (!isZero)
                _random.NextBytes(data);
            NbdCommandFlags flags = _random.Next(20) == 0 ? NbdCommandFlags.Fua : NbdCommandFlags.None;
            UnderWay = (offset, data);
            NbdError error = isZero
                ? client.Try(NbdCommand.WriteZeroes, (ulong)offset, (uint)length, flags)
                : client.Write((ulong)offset, data, flags);
            if (error != NbdError.None)
                throw new InvalidOperationException($"write of {length} at {offset}: {error}");
            data.CopyTo(_model, offset); // each client's bytes are its own
            UnderWay = default;
            Interlocked.Increment(ref _run.Acknowledged);
            if (_random.Next(40) == 0)
                client.Try(NbdCommand.Flush, 0, 0);
        }
    }

    private byte[] Model => model;
}
