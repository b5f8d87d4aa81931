using System.Net.Sockets;
using Xnbd.Protocol;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>Hostile clients: the native server neither dies, nor hangs, nor grows.</summary>
public sealed class HostileTests : IDisposable
{
    private readonly TempFolder _folder = new();
    private readonly ServerProcess _server;

    public HostileTests() => _server = ServerProcess.Start(_folder, _folder.Sparse("disk.img", 1 << 20));

    public void Dispose()
    {
        _server.Dispose();
        _folder.Dispose();
    }

    /// <summary>The number of rounds: a few, unless the environment asks for more.</summary>
    private static int Rounds(int few) => few * int.Parse(
        Environment.GetEnvironmentVariable("XNBD_SOAK") ?? "1", System.Globalization.CultureInfo.InvariantCulture);

    private void CheckSound()
    {
        Assert.False(_server.HasExited, _server.Log);
        Assert.DoesNotContain("internal error", _server.Log, StringComparison.Ordinal);
        using (NbdTestClient client = _server.Open())
            Assert.Equal(16, client.Read(0, 16).Length);
        Wait.Until(() => _server.OpenDescriptors < 30, "all connections are closed");
        Assert.InRange(_server.Status("VmRSS"), 1, 100 * 1024);
    }

    [Fact]
    public void Random_bytes_at_every_stage()
    {
        var random = new Random(42);
        for (int round = 0; round < Rounds(400); round++)
        {
            using NbdTestClient client = NbdTestClient.Connect(_server.SocketPath);
            try
            {
                int stage = random.Next(4);
                if (stage >= 1)
                    client.Start();
                if (stage >= 2)
                    client.Ask(NbdOption.StructuredReply);
                if (stage >= 3)
                    client.Enter(structured: random.Next(2) == 0);
                byte[] noise = new byte[random.Next(1, 20_000)];
                random.NextBytes(noise);
                if (random.Next(2) == 0 && stage is 1 or 2) // a valid beginning
                {
                    uint option = (uint)random.Next(12), length = (uint)random.Next(40);
                    NbdTestClient.Bytes(b => b.U64(NbdMagic.Option).U32(option).U32(length)).CopyTo(noise, 0);
                }

                client.Send(noise);
                client.Socket.Shutdown(SocketShutdown.Send);
                byte[] sink = new byte[65536];
                while (client.Socket.Receive(sink) > 0)
                {
                }
            }
            catch (Exception failure)
                when (failure is SocketException or EndOfStreamException or InvalidDataException or ArgumentException)
            {
                // It was disconnected, as intended.
            }
        }

        CheckSound();
    }

    [Fact]
    public void Random_requests_with_valid_magic()
    {
        var random = new Random(43);
        byte[] sink = new byte[1 << 20];
        for (int round = 0; round < Rounds(100); round++)
        {
            using NbdTestClient client = _server.Open(round % 2 == 0, "", round % 2 == 0 ? ["base:allocation"] : []);
            try
            {
                byte[] header = new byte[28];
                for (int i = 0; i < 50; i++)
                {
                    var command = (NbdCommand)random.Next(10);
                    ulong offset = random.Next(3) == 0 ? (ulong)random.NextInt64() : (ulong)random.Next(1 << 20);
                    uint length = random.Next(5) == 0 ? (uint)random.Next() : (uint)random.Next(70_000);
                    if (command == NbdCommand.Disconnect || (command == NbdCommand.Write && length > 1 << 20))
                        continue;
                    new NbdRequest((NbdCommandFlags)random.Next(64), command, (ulong)i, offset, length).Write(header);
                    client.Send(header);
                    if (command == NbdCommand.Write)
                        client.Send(new byte[length]);
                }

                client.Socket.Shutdown(SocketShutdown.Send);
                while (client.Socket.Receive(sink) > 0)
                {
                }
            }
            catch (SocketException)
            {
                Assert.Fail("a session with well-formed requests was broken off: " + _server.Log);
            }
        }

        CheckSound();
    }

    [Fact]
    public void Clients_that_leave_at_any_moment()
    {
        var random = new Random(44);
        for (int round = 0; round < Rounds(300); round++)
        {
            NbdTestClient client = _server.Open();
            for (int i = random.Next(30); i > 0; i--)
                client.SendRequest(NbdCommand.Read, 0, (uint)random.Next(1, 1 << 17));
            if (random.Next(2) == 0)
            {
                client.SendRequest(NbdCommand.Write, 0, 1 << 20);
                client.Send(new byte[random.Next(1 << 18)]);
            }

            client.Dispose();
        }

        CheckSound();
    }

    [Fact]
    public void Three_hundred_connections_at_once()
    {
        var clients = new List<NbdTestClient>();
        for (int i = 0; i < 300; i++)
            clients.Add(NbdTestClient.Connect(_server.SocketPath));
        using (NbdTestClient honest = _server.Open())
            Assert.Equal(16, honest.Read(0, 16).Length);
        clients.ForEach(c => c.Dispose());
        CheckSound();
    }

    [Fact]
    public void Writes_that_never_end_do_not_fill_the_memory()
    {
        var clients = new List<NbdTestClient>();
        for (int i = 0; i < 40; i++)
        {
            clients.Add(_server.Open());
            clients[i].SendRequest(NbdCommand.Write, 0, 1 << 20);
            clients[i].Send(new byte[(1 << 20) - 1]); // no socket holds that: most of it is received when this returns
        }

        Assert.InRange(_server.Status("VmRSS"), 1, 100 * 1024);
        clients.ForEach(c => c.Dispose());
        CheckSound();
    }

    [Fact]
    public void Sixty_four_writers_of_the_largest_requests_stay_within_the_budget()
    {
        string image = _folder.Sparse("large.img", 64 << 20);
        using ServerProcess server = ServerProcess.Start(_folder, image);
        using var stop = new CancellationTokenSource(TimeSpan.FromSeconds(4));
        byte[] payload = new byte[32 << 20];
        long peak = 0;
        Task[] writers = [.. Enumerable.Range(0, 64).Select(i => Task.Factory.StartNew(
            () =>
            {
                using NbdTestClient client = server.Open();
                do
                    Assert.Equal(NbdError.None, client.Write((ulong)i << 18, payload));
                while (!stop.IsCancellationRequested);
            },
            TaskCreationOptions.LongRunning))];
        while (!Task.WaitAll(writers, 20))
            peak = Math.Max(peak, server.Status("VmRSS"));
        TestContext.Current.TestOutputHelper?.WriteLine($"peak resident size: {peak} KiB");
        // 128 MiB in flight, 64 input and output buffers, and the program itself.
        Assert.InRange(peak, 1, (128 + 64 / 2 + 32) * 1024);
    }
}
