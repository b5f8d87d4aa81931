using System.Net;
using System.Net.Sockets;
using Xnbd.Protocol;
using Xnbd.Storage;
using Xnbd.TestKit;

namespace Xnbd.Server.Tests;

/// <summary>Clients that leave while their requests wait for another machine.</summary>
public sealed class GoneClientTests : IDisposable
{
    private readonly byte[] _bytes = [.. Enumerable.Range(0, 1 << 20).Select(i => (byte)(i * 7))];
    private readonly MemoryDisk _memory = new(1 << 20);
    private readonly TaskCompletionSource _isBack = new();
    private readonly FaultDisk _disk;
    private readonly ServerFixture _server;
    private int _asked;

    public GoneClientTests()
    {
        _memory.TryWrite(0, _bytes);
        _disk = new FaultDisk(_memory) { IsRemote = true, SlowAt = offset => offset >= 4096, Before = Wait };
        _server = new ServerFixture(_disk);
    }

    public void Dispose()
    {
        _isBack.TrySetResult();
        _server.Dispose();
    }

    private Task Wait(string operation, long offset, long length)
    {
        if (offset < 4096)
            return Task.CompletedTask;
        Interlocked.Increment(ref _asked);
        return _isBack.Task;
    }

    private void WaitUntilAsked(int count)
        => Assert.True(SpinWait.SpinUntil(() => Volatile.Read(ref _asked) == count, 20_000));

    private void AssertAllHaveLeft()
        => Assert.True(SpinWait.SpinUntil(() => _server.Server.ConnectionCount == 0, 20_000));

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void A_client_that_leaves_is_forgotten_although_its_requests_still_wait(bool isReset)
    {
        NbdTestClient client = isReset ? ConnectByTcp() : _server.Open();
        for (uint i = 1; i <= 100; i++)
            client.SendRequest(NbdCommand.Read, i * 4096, 4096);
        WaitUntilAsked(100);
        if (isReset)
            client.Socket.LingerState = new LingerOption(enable: true, seconds: 0);
        client.Dispose();
        AssertAllHaveLeft();
        Assert.False(_isBack.Task.IsCompleted);
    }

    [Fact]
    public void A_client_whose_requests_must_be_answered_in_order_is_forgotten_as_well()
    {
        NbdTestClient client = _server.Open();
        for (int i = 0; i < 2; i++)
        {
            client.NextCookie = 7; // twice: the second request waits for the first one
            client.SendRequest(NbdCommand.Read, 8192, 4096);
        }

        WaitUntilAsked(1);
        client.Dispose();
        AssertAllHaveLeft();
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void A_client_that_only_sends_nothing_more_gets_its_replies(bool byTcp)
    {
        using NbdTestClient client = byTcp ? ConnectByTcp() : _server.Open();
        client.SendRequest(NbdCommand.Read, 8192, 4096);
        WaitUntilAsked(1);
        client.Socket.Shutdown(SocketShutdown.Send);
        Thread.Sleep(2 * ServerLimits.ClientCheckTime); // it is looked at meanwhile
        Assert.Equal(1, _server.Server.ConnectionCount);
        _isBack.SetResult();
        Assert.Equal(_bytes[8192..12288], NbdTestClient.Assemble([client.ReceiveReply()], 8192, 4096));
        Assert.True(client.IsClosed());
    }

    [Fact]
    public void Others_are_served_while_clients_wait_for_places_and_after_they_have_left()
    {
        using ServerFixture server = new(_disk, limits: new RequestLimits(Requests: 16, Bytes: 1 << 20));
        using NbdTestClient stays = server.Open();
        NbdTestClient[] others = [.. Enumerable.Range(0, 40).Select(_ => server.Open())];
        foreach (NbdTestClient other in others)
            other.SendRequest(NbdCommand.Read, 8192, 4096);
        WaitUntilAsked(12); // three fourths of the places
        Assert.Equal(NbdError.None, stays.Write(0, new byte[512]));
        foreach (NbdTestClient other in others)
            other.Dispose();
        Assert.True(SpinWait.SpinUntil(() => server.Server.ConnectionCount == 1, 60_000));
        Assert.Equal(NbdError.None, stays.Write(0, new byte[512]));
    }

    private NbdTestClient ConnectByTcp()
    {
        using var listener = new TcpListener(IPAddress.Loopback, 0);
        listener.Start();
        _ = Task.Run(() => _server.Server.Serve(listener.AcceptSocket()));
        return NbdTestClient.Open(listener.LocalEndpoint);
    }
}
