using System.Diagnostics;
using System.Text.Json.Nodes;
using Xnbd.TestKit;

namespace Xnbd.Bench.Moves;

/// <summary>A way to move a disk: one of those that are compared.</summary>
/// <param name="Name">Its name in the table; it begins with that of a peer, so that <c>--peers</c> chooses it.</param>
/// <param name="Program">The program that must be installed.</param>
/// <param name="Prepare">Starts the server at the source.</param>
/// <param name="Move">Moves the disk and the client. The client works at the source when this begins.</param>
internal sealed record MoveWay(
    string Name, string Program, Func<MoveStage, RunningPeer> Prepare, Func<MoveStage, RunningPeer, Task> Move)
{
    private const string Daemon = "qemu-storage-daemon";

    public static readonly IReadOnlyList<MoveWay> All =
    [
        new("xnbd", ServerProcess.Executable, Target, (stage, source) => Proxy(stage, source, "--no-verify")),
        new("xnbd, verified", ServerProcess.Executable, Target, (stage, source) => Proxy(stage, source)),
        new($"{Daemon} mirror", Daemon, StorageDaemon, (stage, _) => Mirror(stage, "background")),
        new($"{Daemon} mirror, write-blocking", Daemon, StorageDaemon, (stage, _) => Mirror(stage, "write-blocking")),
        new("nbdkit cow-on-read", "nbdkit", Target, Nbdkit),
    ];

    public bool IsPresent => Program.StartsWith('/') || Tool.Find(Program) is not null;

    private static RunningPeer Target(MoveStage stage)
        => stage.Start("xnbd", ServerProcess.Executable, s => ["--target", "--unix", s.Endpoint.Path, s.Image]);

    /// <summary>As docs/migration.md has it: the client first, then its disk with one command.</summary>
    private static async Task Proxy(MoveStage stage, RunningPeer source, params string[] options)
    {
        string control = stage.File("control"), events = stage.File("events"), hook = stage.File("hook");
        File.WriteAllText(events, "");
        File.WriteAllText(hook, $"#!/bin/sh\necho \"$XNBD_EVENT\" >> {events}\n");
        File.SetUnixFileMode(hook, UnixFileMode.UserRead | UnixFileMode.UserExecute);
        string port = stage.OpenLine(source), bgctl = Path.Combine(ServerProcess.BinFolder, "xnbd-bgctl");
        stage.StartClock();
        RunningPeer proxy = stage.Start("xnbd", ServerProcess.Executable, s =>
            [
                "--proxy", "--incoming", "--unix", s.Endpoint.Path, "--on-event", hook, "127.0.0.1", port,
                s.File("disk.img"), s.File("disk.map"), control,
            ]);
        await stage.HandOverTo(proxy);
        await Tool.Succeed(bgctl, ["--begin", control], stage.Stop);
        Task<string> move = Tool.Succeed(bgctl, ["--move", .. options, control], stage.Stop);
        long complete = 0; // when nothing is left to do but the switch
        for (int seen = 0; !move.IsCompleted; await Task.Delay(2))
        {
            int count = File.ReadLines(events).Count(line => line is "copied" or "verified");
            (seen, complete) = (count, count > seen ? Stopwatch.GetTimestamp() : complete);
        }

        await move;
        if (complete == 0)
            complete = Stopwatch.GetTimestamp(); // the switch was faster than the hook
        stage.CompleteAt = complete - (Stopwatch.Frequency / 50); // the event, or the command's end, took some of these
        stage.StopClock();
    }

    private static RunningPeer StorageDaemon(MoveStage stage)
        => stage.Start(Daemon, Daemon, s =>
        [
            "--blockdev", $"driver=file,node-name=bench,filename={s.Image},discard=unmap",
            "--nbd-server", $"addr.type=unix,addr.path={s.Endpoint.Path}",
            "--export", "type=nbd,id=bench,node-name=bench,writable=on",
            "--chardev", $"socket,id=monitor,path={stage.File("monitor")},server=on,wait=off",
            "--monitor", "chardev=monitor",
        ]);

    /// <summary>
    /// As libvirt does it: the mirror becomes ready, the client stops, what it wrote last goes over, and the client
    /// goes on at the destination. If the mode is write-blocking, each write waits for the destination, too.
    /// </summary>
    private static async Task Mirror(MoveStage stage, string mode)
    {
        RunningPeer destination = stage.Start("qemu-nbd", "qemu-nbd", s =>
            [
                "-f", "raw", "-k", s.Endpoint.Path, "--shared=0", "-t", "--cache=writeback", "--discard=unmap",
                MovingDisk.CreateEmpty(s.File("destination.img")),
            ]);
        string port = stage.OpenLine(destination);
        using Qmp monitor = await Qmp.Connect(stage.File("monitor"), stage.Stop);
        stage.StartClock();
        await monitor.Execute(
            "blockdev-add",
            new JsonObject
            {
                ["driver"] = "nbd",
                ["node-name"] = "destination",
                ["server"] = new JsonObject { ["type"] = "inet", ["host"] = "127.0.0.1", ["port"] = port },
            },
            stage.Stop);
        await monitor.Execute(
            "blockdev-mirror",
            new JsonObject
            {
                ["job-id"] = "move",
                ["device"] = "bench",
                ["target"] = "destination",
                ["sync"] = "full",
                ["copy-mode"] = mode,
            },
            stage.Stop);
        await monitor.WaitFor("BLOCK_JOB_READY", stage.Stop);
        await stage.HandOverTo(destination, async () =>
        {
            // Of a job that is ready, this is its good end, without a change of the source's disk.
            await monitor.Execute("block-job-cancel", new JsonObject { ["device"] = "move" }, stage.Stop);
            await monitor.WaitFor("BLOCK_JOB_COMPLETED", stage.Stop);
        });
        stage.EndsWithHandOver = true;
        stage.StopClock();
    }

    /// <summary>
    /// The client at the destination, and nbdcopy as another one that reads everything once. nbdkit asks the kernel to
    /// be ended with the thread that has started it, and ours end earlier than the move: so a shell starts it.
    /// </summary>
    private static async Task Nbdkit(MoveStage stage, RunningPeer source)
    {
        string port = stage.OpenLine(source);
        stage.StartClock();
        RunningPeer proxy = stage.Start("nbdkit", "sh", s =>
            [
                "-c", "nbdkit \"$@\"; exit $?", "nbdkit",
                "-f", "-U", s.Endpoint.Path, "--filter=cow", "nbd", $"uri=nbd://127.0.0.1:{port}", "cow-on-read=true",
            ]);
        await stage.HandOverTo(proxy);
        await Tool.Succeed("nbdcopy", ["--no-extents", proxy.Uri, "null:"], stage.Stop);
        stage.StopClock();
    }
}
