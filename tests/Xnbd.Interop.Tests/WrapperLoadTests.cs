using System.Globalization;
using System.Net.Sockets;
using System.Text.Json.Nodes;
using Xnbd.Control;
using Xnbd.Protocol;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>Many exports, many clients, and kills amid changes of the state.</summary>
public sealed class WrapperLoadTests : IDisposable
{
    private readonly TempFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    private static int Kills
        => int.Parse(Environment.GetEnvironmentVariable("XNBD_KILLS") ?? "25", CultureInfo.InvariantCulture) * 2 / 5;

    private static int Soak
        => int.Parse(Environment.GetEnvironmentVariable("XNBD_SOAK") ?? "1", CultureInfo.InvariantCulture);

    private void WriteState(int count)
    {
        var images = new JsonObject();
        for (int i = 0; i < count; i++)
        {
            images[$"disk{i}"] = new JsonObject
            {
                ["mode"] = i % 10 == 0 ? "cow-target" : "target",
                ["image_path"] = _folder.Sparse($"{i}.img", 1 << 20),
            };
        }

        File.WriteAllText(
            _folder.File("w.state"), new JsonObject { ["version"] = 2, ["images"] = images }.ToJsonString());
    }

    [Fact]
    public void A_thousand_exports_with_a_thousand_clients_fit_in_256_MiB()
    {
        WriteState(1000);
        using var wrapper = new WrapperProcess(_folder);
        var clients = new List<NbdTestClient>();
        try
        {
            for (int i = 0; i < 1000; i++)
            {
                clients.Add(wrapper.Open($"disk{i}"));
                Assert.Equal(NbdError.None, clients[i].Write((ulong)i * 512, [(byte)i]));
                Assert.Equal(4096, clients[i].Read(0, 4096).Length);
            }

            Assert.Equal((byte)7, clients[7].Read(7 * 512, 1)[0]);
            long kilobytes = wrapper.Server.Status("VmRSS");
            TestContext.Current.TestOutputHelper?.WriteLine($"{kilobytes / 1024} MiB");
            Assert.InRange(kilobytes, 1, 256 * 1024);
        }
        finally
        {
            clients.ForEach(client => client.Dispose());
        }
    }

    [Fact]
    public async Task All_of_many_exports_are_listed_and_described()
    {
        const int count = 300; // with more options than a client of one export may send
        WriteState(count);
        using var wrapper = new WrapperProcess(_folder);
        string listed = await Tool.Succeed("nbdinfo", "--list", wrapper.Server.Uri);
        Assert.Equal(count, listed.Split("export-size: 1048576").Length - 1);
    }

    /// <summary>
    /// Whenever the wrapper is killed, its state is the one before or after the change that was under way.
    /// </summary>
    [Fact]
    public async Task Kills_amid_changes_leave_the_old_state_or_the_new_one()
    {
        string image = _folder.Sparse("disk.img", 4096);
        var random = new Random(20263);
        HashSet<string> known = [];
        for (int kill = 0; kill < Kills; kill++)
        {
            using var wrapper = new WrapperProcess(_folder);
            Assert.Equal(known.Order(), (await wrapper.List()).Keys.Order());
            bool isKilled = false;
            Task killing = Task.Run(async () =>
            {
                await Task.Delay(random.Next(1, 120));
                Volatile.Write(ref isKilled, true);
                wrapper.Server.Kill();
            });
            string? underWay = null;
            for (int change = 0; !Volatile.Read(ref isKilled); change++)
            {
                bool isRemoval = known.Count > 3;
                underWay = isRemoval ? known.First() : $"k{kill}c{change}";
                ToolResult result = await (isRemoval
                    ? wrapper.Try("--remove-by-exportname", underWay)
                    : wrapper.Try("--add-cow", underWay, image));
                if (result.ExitCode != 0)
                    break;
                _ = isRemoval ? known.Remove(underWay) : known.Add(underWay);
                underWay = null;
            }

            await killing;
            HashSet<string> saved = [];
            if (File.Exists(_folder.File("w.state")))
            {
                JsonNode state = JsonNode.Parse(File.ReadAllText(_folder.File("w.state")))!;
                saved = [.. state["images"]!.AsObject().Select(entry => entry.Key)];
            }

            HashSet<string> different = [.. saved];
            different.SymmetricExceptWith(known);
            Assert.DoesNotContain(different, name => name != underWay);
            known = saved;
        }
    }

    /// <summary>Clients write and check their disks; beside them exports come and go.</summary>
    [Fact]
    public async Task Exports_come_and_go_beside_clients_that_lose_nothing()
    {
        const int count = 20, size = 256 * 1024;
        WriteState(count);
        using var wrapper = new WrapperProcess(_folder);
        bool isOver = false;
        Task[] clients =
        [
            .. Enumerable.Range(0, count).Select(i => Task.Factory.StartNew(
                () =>
                {
                    byte[] model = new byte[size];
                    var random = new Random(i);
                    using NbdTestClient client = wrapper.Open($"disk{i}");
                    while (!Volatile.Read(ref isOver))
                    {
                        int offset = random.Next(size - 8192);
                        byte[] data = new byte[random.Next(1, 8192)];
                        random.NextBytes(data);
                        Assert.Equal(NbdError.None, client.Write((ulong)offset, data));
                        data.CopyTo(model, offset);
                        Assert.Equal(model[offset..(offset + 8192)], client.Read((ulong)offset, 8192));
                    }

                    Assert.Equal(model, client.Read(0, size));
                },
                TestContext.Current.CancellationToken,
                TaskCreationOptions.LongRunning,
                TaskScheduler.Default)),
        ];
        string image = _folder.Sparse("more.img", 1 << 20);
        DateTime end = DateTime.UtcNow.AddSeconds(4 + Math.Min(Soak, 56));
        int rounds = 0;
        for (; DateTime.UtcNow < end && !clients.Any(client => client.IsFaulted); rounds++)
        {
            await wrapper.Do("--add-target", "more", image);
            using (NbdTestClient client = wrapper.Open("more"))
                client.Read(0, 4096);
            await wrapper.Do("--remove-by-exportname", "more", "--force");
        }

        Volatile.Write(ref isOver, true);
        await Task.WhenAll(clients).WaitAsync(TimeSpan.FromSeconds(30));
        Assert.True(rounds > 3);
        Assert.Equal(count, (await wrapper.Served()).Length);
    }

    /// <summary>Lists, queries and jobs use a disk that is being removed, through both control channels.</summary>
    [Fact]
    public async Task Control_calls_amid_removals_are_answered_or_refused()
    {
        string image = _folder.Random("disk.img", 1 << 20), own = _folder.File("px.ctl");
        using ServerProcess origin = ServerProcess.Start(_folder, image, "--readonly");
        using var wrapper = new WrapperProcess(_folder);
        using var end = new CancellationTokenSource();
        string all = _folder.File("w.ctl");
        (string Method, string Export, string Path)[] calls =
            [("list", "", all), ("query", "px", all), ("query", "", own), ("cache-all", "px", all), ("watch", "", own)];
        Task<int>[] callers =
        [
            .. calls.Select(call => Task.Factory.StartNew(
                () => CallAgainAndAgain(call.Path, call.Method, call.Export, end.Token),
                TestContext.Current.CancellationToken,
                TaskCreationOptions.LongRunning,
                TaskScheduler.Default)),
        ];
        for (int round = 0; round < 15; round++)
        {
            foreach (string file in (string[])["cache", "map"])
                File.Delete(_folder.File(file));
            await wrapper.Do(
                "--add-proxy", "px", $"unix:{origin.SocketPath}", "-", _folder.File("cache"), _folder.File("map"), own);
            using (NbdTestClient client = wrapper.Open("px"))
                Assert.Equal(File.ReadAllBytes(image)[..4096], client.Read(0, 4096));
            await wrapper.Do("--remove-by-exportname", "px", "--force");
        }

        end.Cancel();
        int[] answers = await Task.WhenAll(callers).WaitAsync(TimeSpan.FromSeconds(30));
        Assert.All(answers, count => Assert.True(count > 0));
        Assert.Empty(await wrapper.List());
    }

    /// <returns>How many calls were answered with a result.</returns>
    private static int CallAgainAndAgain(string path, string method, string export, CancellationToken end)
    {
        int answers = 0;
        while (!end.IsCancellationRequested)
        {
            try
            {
                using var client = new ControlClient(path) { Export = export.Length > 0 ? export : null };
                while (!end.IsCancellationRequested)
                {
                    client.Call(method);
                    answers++;
                }
            }
            catch (Exception failure) when (failure is IOException or SocketException or ControlException)
            {
                // It is not there, or is being removed.
            }
        }

        return answers;
    }

    [Fact]
    public void Clients_that_come_and_leave_by_the_thousand_leave_nothing_behind()
    {
        WriteState(10);
        using var wrapper = new WrapperProcess(_folder);
        for (int i = 0; i < 10; i++)
            wrapper.Open($"disk{i}").Dispose();
        Wait.Until(() => wrapper.Server.Status("Threads") < 60, "the sessions have ended");
        int descriptors = wrapper.Server.OpenDescriptors;
        int rounds = 200 * Soak;
        Parallel.For(0, 4, worker =>
        {
            for (int i = 0; i < Math.Min(rounds, 2500); i++)
            {
                using NbdTestClient client = wrapper.Open($"disk{(i + worker) % 10}");
                client.Read(0, 512);
            }
        });
        Wait.Until(
            () => wrapper.Server.OpenDescriptors <= descriptors && wrapper.Server.Status("Threads") < 60,
            "all descriptors and threads are back");
    }
}
