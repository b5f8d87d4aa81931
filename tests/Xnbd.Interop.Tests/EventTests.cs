using System.Diagnostics;
using System.Text.Json;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>What is logged of a move, and the program that is told.</summary>
public sealed class EventTests : IDisposable
{
    private const int Size = 4 << 20;

    private readonly TempFolder _folder = new();
    private readonly string _image;
    private readonly string _told;

    public EventTests()
    {
        _image = _folder.Random("origin.img", Size);
        _told = _folder.File("told");
    }

    public void Dispose() => _folder.Dispose();

    private string Socket => Proxies.Socket(_folder);

    /// <summary>A program that does what a test says for each event, and then notes it.</summary>
    private string Hook(string script)
    {
        string path = _folder.File("hook");
        File.WriteAllText(path, $"#!/bin/sh\n{script}\n");
        File.SetUnixFileMode(path, UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute);
        return path;
    }

    private string[] Told => File.Exists(_told) ? File.ReadAllLines(_told) : [];

    private JsonElement Query() => Proxies.Query(_folder).Result;

    private static int Count(ServerProcess proxy, string text) => proxy.Log.Split(text).Length - 1;

    [Fact]
    public async Task Each_event_is_logged_and_told_once_in_order_with_its_numbers()
    {
        string remote = _folder.File("r;touch $(x)"); // nothing of this is ever run
        string hook = Hook(
            $"""
            figures="$XNBD_BYTES|$XNBD_BLOCKS|$XNBD_DIFFERENT_BLOCKS|$XNBD_GIVEN_UP_BLOCKS"
            echo "$XNBD_EVENT|$XNBD_REMOTE|$figures" >> {_told}
            test -n "$XNBD_CONTROL_SOCKET" && test "$XNBD_CACHE_IMAGE" = {_folder.File("cache.img")} || exit 3
            grep SigBlk /proc/$$/status | grep -q 0000000000000000 || exit 4
            grep SigIgn /proc/$$/status | grep -q 0000000000000000 || exit 5
            ls -l /proc/$$/fd | grep -q -e cache.img -e cache.map -e socket: && exit 6
            test "$(cut -d' ' -f6 /proc/$$/stat)" -eq $$ || exit 7
            """);
        string[] serve = ["--target", "--readonly", "--unix", remote, _image];
        ServerProcess origin = ServerProcess.Start(remote, serve);
        using ServerProcess proxy = Proxies.Start(_folder, "unix:" + remote, "-", "--on-event", hook);
        string uri = Query().GetProperty("remote").GetString()!;
        origin.Kill();
        origin.Dispose();
        Wait.Until(() => Told.Length == 1, "the loss is told");
        using ServerProcess back = ServerProcess.Start(remote, serve);
        Wait.Until(() => Told.Length == 2, "the return is told");
        await Tool.Succeed(Proxies.Control, "--move", Socket);
        Wait.Until(() => Told.Length == 5, "the move is told");
        await Tool.Succeed(Proxies.Control, "--switch", Socket); // it is one already
        proxy.Signal(12);
        Assert.Equal(
            [
                $"remote-lost|{uri}||||", $"remote-back|{uri}||||", $"copied||{Size}|||",
                $"verified||{Size}|{Size / 4096}|0|", "switched|||||0",
            ],
            Told);
        Assert.Equal(0, proxy.Stop());
        Assert.Equal(5, Told.Length);
        foreach (string line in (string[])
            ["the remote is lost", "the remote is back after", "all is cached: 4 MiB", "verified: 1024", "switched: "])
            Assert.Equal((line, 1), (line, Count(proxy, line)));
        Assert.DoesNotContain("failed for the event", proxy.Log, StringComparison.Ordinal); // what the program checks
    }

    [Fact]
    public async Task A_program_that_hangs_or_fails_holds_nobody_up_and_is_reaped()
    {
        string hook = Hook(
            $"""
            echo $XNBD_EVENT >> {_told}
            case $XNBD_EVENT in copied) exit 9;; verified) kill -9 $$;; switched) exec sleep 300 2> /dev/null;; esac
            """);
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        using ServerProcess proxy = Proxies.Start(_folder, origin, "--on-event", hook);
        using NbdTestClient client = proxy.Open();
        await Tool.Succeed(Proxies.Control, "--move", Socket);
        Wait.Until(() => Told.Length == 3, "the program hangs");
        byte[] bytes = File.ReadAllBytes(_image);
        Assert.Equal(bytes, client.Read(0, Size));
        Wait.Until(() => Count(proxy, "failed for the event verified: signal 9") == 1, "a signal is logged");
        Assert.Equal(1, Count(proxy, "failed for the event copied: exit status 9"));
        int[] children = ChildrenOf(proxy.Id);
        try
        {
            Assert.Single(children); // the others are reaped
            client.Dispose();
            long start = Stopwatch.GetTimestamp();
            Assert.Equal(0, proxy.Stop());
            Assert.InRange(Stopwatch.GetElapsedTime(start).TotalSeconds, 0, 6);
        }
        finally
        {
            Array.ForEach(children, child => ServerProcess.Signal(child, 9));
        }
    }

    [Fact]
    public void A_program_that_cannot_be_run_is_refused_at_the_start_or_named_in_the_log()
    {
        using ServerProcess origin = ServerProcess.Start(_folder, _image, "--readonly");
        string hook = Hook("exit 0"), plain = _folder.File("plain");
        File.WriteAllText(plain, "");
        foreach (string path in (string[])[_folder.File("nosuch"), plain, _folder.File(".")])
        {
            string refused = Assert.Throws<InvalidOperationException>(
                () => Proxies.Start(_folder, origin, "--on-event", path).Dispose()).Message;
            Assert.Contains("there is no such program", refused, StringComparison.Ordinal);
        }

        using ServerProcess proxy = Proxies.Start(_folder, origin, "--on-event", hook);
        File.Delete(hook);
        Tool.Succeed(Proxies.Control, "--cache-all", Socket).Wait();
        Wait.Until(() => Count(proxy, "the event copied was not told to") == 1, "it is logged");
    }

    private static int[] ChildrenOf(int parent)
        => [.. Directory.GetDirectories("/proc").Select(Path.GetFileName).Where(name => name!.All(char.IsAsciiDigit))
            .Select(int.Parse!).Where(id => IsChild(id, parent))];

    private static bool IsChild(int id, int parent)
    {
        try
        {
            return ServerProcess.ProcStatus(id, "PPid") == parent;
        }
        catch (Exception failure) when (failure is IOException or InvalidOperationException)
        {
            return false; // it has ended
        }
    }
}
