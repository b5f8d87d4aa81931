using System.Text;
using Microsoft.Extensions.Logging.Abstractions;
using Xnbd.Protocol;
using Xnbd.Storage;
using Xnbd.TestKit;

namespace Xnbd.Server.Tests;

/// <summary>Many exports behind one address: they come and go, and none can stop another.</summary>
public sealed class ManyExportsTests : IDisposable
{
    private const int Size = 4 << 20, ReadLength = 256 * 1024;
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(30);

    private readonly TempFolder _folder = new();
    private readonly ExportTable _exports = new("first");
    private readonly NbdServer _server;
    private readonly TaskCompletionSource _never = new();

    public ManyExportsTests()
    {
        _server = new NbdServer(
            _exports, HandshakeStyle.FixedNewstyle, NullLogger.Instance, maxBytes: 8L << 20);
        _server.Listen(SocketPath);
        _server.Start();
    }

    private string SocketPath => _folder.File("s");

    public void Dispose()
    {
        _never.TrySetResult();
        _server.Dispose();
        foreach (Export export in _exports.All)
            export.Disk.Dispose();
        _folder.Dispose();
    }

    private Export Add(string name, Disk? disk = null)
    {
        var export = new Export(name, $"the disk {name}", disk ?? new MemoryDisk(Size));
        Assert.True(_exports.Add(export));
        return export;
    }

    private NbdTestClient Open(string name) => NbdTestClient.Open(SocketPath, name: name);

    /// <summary>An export whose disk never answers, and a client that asks for all that it may.</summary>
    private NbdTestClient Hang(string name)
    {
        Add(name, new FaultDisk(new MemoryDisk(Size)) { Slow = true, Before = (_, _, _) => _never.Task });
        NbdTestClient client = Open(name);
        for (uint i = 0; i < 64; i++)
            client.SendRequest(NbdCommand.Read, 0, ReadLength);
        return client;
    }

    private Export AddSlow(string name)
        => Add(name, new FaultDisk(new MemoryDisk(Size)) { Slow = true, Before = (_, _, _) => Task.Delay(1) });

    [Fact]
    public void Clients_list_the_exports_and_choose_one_by_its_name()
    {
        Add("first");
        Add("ä second/one");
        using (NbdTestClient client = NbdTestClient.Connect(SocketPath))
        {
            client.Start();
            string[] names =
            [
                .. client.Ask(NbdOption.List)
                    .Where(reply => reply.Type == NbdOptionReplyType.Server)
                    .Select(reply => Encoding.UTF8.GetString(reply.Data)[4..].Split("the disk")[0]),
            ];
            Assert.Equal(["first", "ä second/one"], names);
        }

        using NbdTestClient second = Open("ä second/one"), first = Open("first"), other = Open("");
        Assert.Equal(NbdError.None, first.Write(0, [1]));
        Assert.Equal(NbdError.None, second.Write(0, [2]));
        Assert.Equal([1], other.Read(0, 1)); // the default one
        Assert.Equal([2], second.Read(0, 1));
        Assert.Equal(3, _server.Clients.Count);
        ServerClient seen = Assert.Single(_server.Clients, client => client.Export == "ä second/one");
        Assert.Equal((1, 1, 2), (seen.ReadBytes, seen.WrittenBytes, seen.Requests));
    }

    [Fact]
    public void Two_exports_do_not_share_a_name()
    {
        Add("one");
        Assert.False(_exports.Add(new Export("one", "", new MemoryDisk(1))));
        Assert.Equal(Size, _exports.Find("one")!.Disk.Length);
        Assert.Null(_exports.Find("ONE"));
        Assert.Null(_exports.Find("")); // the default one is not there
    }

    [Fact]
    public async Task A_removed_export_takes_no_new_client_and_waits_for_those_that_are_in()
    {
        Export export = Add("one");
        using NbdTestClient client = Open("one");
        Task<bool> removal = Task.Run(() => _server.Remove(export, TimeSpan.FromSeconds(60)));
        Wait.Until(() => _exports.All.Count == 0, "it is out of the list");
        using (NbdTestClient late = NbdTestClient.Connect(SocketPath))
        {
            late.Start();
            OptionReply reply = Assert.Single(late.Ask(NbdOption.Go, NbdTestClient.InfoQuery("one")));
            Assert.Equal(NbdOptionReplyType.ErrUnknown, reply.Type);
        }

        Add("one", new MemoryDisk(512)); // the name is free at once
        using NbdTestClient successor = Open("one");
        Assert.Equal(512UL, successor.Size);
        Assert.Equal(NbdError.None, client.Write(0, [9]));
        Assert.False(removal.IsCompleted);
        client.Disconnect();
        Assert.True(await removal.WaitAsync(s_deadline));
        Assert.Equal(new byte[1], successor.Read(0, 1));
        export.Disk.Dispose();
    }

    [Fact]
    public void After_its_grace_a_removed_export_disconnects_its_clients_and_answers_what_they_have_sent()
    {
        Export export = AddSlow("one");
        Add("two");
        using NbdTestClient client = Open("one"), other = Open("two");
        for (ulong i = 0; i < 20; i++)
            client.SendRequest(NbdCommand.Read, i * 4096, 4096);
        Wait.Until(() => _server.Clients.Any(one => one.Requests == 20), "all are received");
        Assert.True(_server.Remove(export, TimeSpan.Zero));
        int answers = 0;
        while (answers < 20)
            answers += client.ReceiveReply().IsLast ? 1 : 0;
        Assert.True(client.IsClosed());
        Assert.Equal(NbdError.None, other.Write(0, [9])); // nothing has happened to the other export's client
        export.Disk.Dispose();
    }

    [Fact]
    public void A_removal_says_when_the_disk_never_answers()
    {
        using NbdTestClient client = Hang("dead");
        Export export = _exports.All[0];
        Wait.Until(() => _server.Clients.Any(one => one.InFlight > 0), "the disk is asked");
        Assert.False(_server.Remove(export, TimeSpan.Zero));
        Assert.Empty(_exports.All);
    }

    [Fact]
    public async Task The_end_of_the_server_does_not_wait_for_the_grace_of_a_removed_export()
    {
        Export export = Add("one");
        using NbdTestClient client = Open("one");
        Task<bool> removal = Task.Run(() => _server.Remove(export, TimeSpan.FromDays(1000)));
        Wait.Until(() => _exports.All.Count == 0, "it is out of the list");
        _server.Stop();
        Assert.True(await removal.WaitAsync(s_deadline));
        export.Disk.Dispose();
    }

    /// <summary>One disk hangs, then many: the busy ones go on, with long requests and with short ones.</summary>
    [Theory]
    [InlineData(1, 512 * 1024)]
    [InlineData(12, 64 * 1024)]
    public async Task Disks_that_never_answer_do_not_stop_others(int hanging, int length)
    {
        NbdTestClient[] stuck = [.. Enumerable.Range(0, hanging).Select(i => Hang($"dead{i}"))];
        Wait.Until(() => _server.Clients.Count(one => one.InFlight > 0) == hanging, "all dead disks are asked");
        Task[] busy =
        [
            .. Enumerable.Range(0, 10).Select(i =>
            {
                AddSlow($"busy{i}");
                return Task.Factory.StartNew(
                    () =>
                    {
                        using NbdTestClient client = Open($"busy{i}");
                        for (int round = 0; round < 20; round++)
                        {
                            Assert.Equal(NbdError.None, client.Write(0, new byte[length]));
                            Assert.Equal(length, client.Read(0, (uint)length).Length);
                        }
                    },
                    TestContext.Current.CancellationToken,
                    TaskCreationOptions.LongRunning,
                    TaskScheduler.Default);
            }),
        ];
        await Task.WhenAll(busy).WaitAsync(s_deadline);
        Array.ForEach(stuck, client => client.Dispose());
    }

    [Fact]
    public void An_export_may_hold_as_much_as_it_leaves_free()
    {
        var total = new BudgetTotal(16 << 20);
        RequestBudget first = new(RequestLimits.Default, total), second = new(RequestLimits.Default, total);
        Assert.True(first.TryAcquire(8 << 20, isFar: false));
        Assert.False(first.TryAcquire(1, isFar: false)); // one export: at most half
        Assert.True(second.TryAcquire(4 << 20, isFar: false));
        Assert.False(second.TryAcquire(1, isFar: false)); // then half of the rest
        first.Release(8 << 20, isFar: false);
        Assert.True(second.TryAcquire(2 << 20, isFar: false));
        var third = new RequestBudget(RequestLimits.Default, total);
        Assert.True(third.TryAcquire(10 << 20, isFar: false)); // its only request, which fits
        var fourth = new RequestBudget(RequestLimits.Default, total);
        Assert.False(fourth.TryAcquire(ServerLimits.SurePassBytes + 1, isFar: false)); // which does not
        Assert.True(fourth.TryAcquire(ServerLimits.SurePassBytes, isFar: false)); // nor this one, but it is short
        Assert.False(fourth.TryAcquire(1, isFar: false));
    }

    [Fact]
    public async Task Who_waits_for_what_another_export_holds_goes_on_when_it_is_given_back()
    {
        var total = new BudgetTotal(4 << 20);
        RequestBudget first = new(RequestLimits.Default, total), second = new(RequestLimits.Default, total);
        first.Acquire(3 << 20, isFar: false, () => false); // its only request
        Task waiting = Task.Run(() => second.Acquire(2 << 20, isFar: false, () => false));
        Wait.Until(() => total.Waiting == 1, "it waits");
        Assert.True(first.IsContended);
        first.Release(3 << 20, isFar: false);
        await waiting.WaitAsync(s_deadline);
        Assert.False(first.IsContended || second.IsContended);
        second.Release(2 << 20, isFar: false);
        Assert.Equal(0, total.Bytes);
    }

    /// <summary>Clients that enter while their export is being removed are served, or refused.</summary>
    [Fact]
    public async Task Exports_come_and_go_while_clients_enter()
    {
        using var end = new CancellationTokenSource();
        Task[] clients =
        [
            .. Enumerable.Range(0, 4).Select(_ => Task.Run(
                () =>
                {
                    int served = 0;
                    while (!end.IsCancellationRequested)
                    {
                        try
                        {
                            using NbdTestClient client = Open("one");
                            Assert.Equal(new byte[512], client.Read(0, 512));
                            served++;
                        }
                        catch (Exception failure) when (failure is not Xunit.Sdk.IAssertionException)
                        {
                            // It was refused, or disconnected.
                        }
                    }

                    Assert.True(served > 0);
                })),
        ];
        int late = 0; // operations on a disk whose export was removed
        for (int round = 0; round < 200; round++)
        {
            var guarded = new FaultDisk(new MemoryDisk(4096));
            bool isClosed = false;
            guarded.Before = (_, _, _) =>
            {
                if (Volatile.Read(ref isClosed))
                    Interlocked.Increment(ref late);
                return Task.CompletedTask;
            };
            Export export = Add("one", guarded);
            await Task.Delay(1);
            Assert.True(_server.Remove(export, TimeSpan.Zero));
            Volatile.Write(ref isClosed, true);
        }

        end.Cancel();
        await Task.WhenAll(clients).WaitAsync(s_deadline);
        Assert.Equal(0, late);
    }
}
