using System.Net.Sockets;
using System.Text.Json;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>
/// A virtual machine runs while its disk moves. It reads and writes files all the time, and sees nothing of it. Where a
/// test breaks the disk on purpose, it sees that.
/// </summary>
[CollectionDefinition(nameof(GuestTests), DisableParallelization = true)]
[Collection(nameof(GuestTests))]
public sealed class GuestTests : IDisposable
{
    private readonly TempFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    private string Control => Proxies.Socket(_folder);

    private string CacheImage => _folder.File("cache.img");

    private Task<string> Succeed(params string[] command) => Tool.Succeed(Proxies.Control, [.. command, Control]);

    private async Task<JsonElement> Query() => JsonDocument.Parse(await Succeed("--query", "--json")).RootElement;

    private ServerProcess Serve(GuestFiles files, params string[] options)
        => ServerProcess.Start(
            _folder.File("source"), ["--target", "--unix", _folder.File("source"), .. options, files.Image]);

    /// <summary>A line to the source that needs some seconds for the whole disk.</summary>
    private SlowLink Line()
        => new(new UnixDomainSocketEndPoint(_folder.File("source")), 12_500_000, TimeSpan.FromMilliseconds(5));

    private ServerProcess StartProxy(SlowLink line, params string[] options)
        => Proxies.Start(_folder, "127.0.0.1", $"{line.Port}", options);

    [Fact]
    public async Task A_machine_runs_on_while_its_disk_moves_and_the_source_is_lost_for_a_while()
    {
        GuestFiles files = await GuestFiles.Create(_folder);
        ServerProcess source = Serve(files, "--readonly");
        using SlowLink line = Line();
        using ServerProcess proxy = StartProxy(line);
        using Guest guest = files.Boot(proxy.SocketPath);

        Task<string> caching = Succeed("--cache-all");
        GuestFiles.Continue(guest, 3);
        Assert.False(caching.IsCompleted, "the copy ended before the source was lost");
        source.Kill();
        source.Dispose();
        Thread.Sleep(3000); // as long as a server takes that is started again
        using ServerProcess back = Serve(files, "--readonly");
        await caching;
        GuestFiles.Continue(guest, 3);
        await Succeed("--verify");
        await Succeed("--switch");
        Assert.Equal(0, back.Stop());
        GuestFiles.Continue(guest, GuestFiles.Count); // and so reads each file

        Dictionary<string, string> written = GuestFiles.End(guest);
        Assert.Equal(0, proxy.Stop());
        await files.CheckImage(CacheImage, written);
    }

    /// <summary>
    /// As in docs/migration.md. Without --incoming, the proxy has kept all of the disk before, and much of it is old.
    /// </summary>
    [Theory]
    [InlineData(true)]
    [InlineData(false)]
    public async Task A_machine_moves_and_its_disk_follows(bool isIncoming)
    {
        GuestFiles files = await GuestFiles.Create(_folder);
        using ServerProcess source = Serve(files);
        using SlowLink line = Line();
        using ServerProcess proxy = StartProxy(line, isIncoming ? ["--incoming"] : []);
        using Guest guest = await Migrate(files, source, proxy, line, isIncoming);
        if (!isIncoming)
        {
            await Succeed("--invalidate");
            guest.Monitor("cont");
        }

        Assert.Equal(0, source.Stop());
        using ServerProcess readOnly = Serve(files, "--readonly");
        GuestFiles.Continue(guest, 3);
        Assert.False((await Query()).GetProperty("incoming").GetBoolean());
        Assert.StartsWith("moved: ", await Succeed("--move"), StringComparison.Ordinal);
        Assert.Equal(0, readOnly.Stop());
        GuestFiles.Continue(guest, GuestFiles.Count);

        Dictionary<string, string> written = GuestFiles.End(guest);
        Assert.Equal(0, proxy.Stop());
        await files.CheckImage(CacheImage, written);
    }

    /// <summary>A check of the checks: a proxy that kept old blocks is not told that they are old.</summary>
    [Fact]
    public async Task A_machine_that_moves_to_old_blocks_notices()
    {
        GuestFiles files = await GuestFiles.Create(_folder);
        using ServerProcess source = Serve(files);
        using SlowLink line = Line();
        using ServerProcess proxy = StartProxy(line);
        using Guest guest = await Migrate(files, source, proxy, line, isIncoming: false);
        guest.Monitor("cont");
        Assert.Contains("is not what was written", GuestFiles.WaitForWrong(guest), StringComparison.Ordinal);
    }

    /// <summary>A check of the checks: one block of the cache is as it was before it was written.</summary>
    [Fact]
    public async Task A_block_that_is_old_is_noticed()
    {
        GuestFiles files = await GuestFiles.Create(_folder);
        long offset = await GuestFiles.OffsetOf("old7", files.Image);
        using ServerProcess source = Serve(files, "--readonly");
        using ServerProcess proxy = Proxies.Start(_folder, source);
        using Guest guest = files.Boot(proxy.SocketPath);
        await Succeed("--move");
        GuestFiles.Continue(guest, GuestFiles.Count);
        GuestFiles.Stop(guest);
        guest.Run("dd if=/dev/urandom of=/tmp/old7 bs=4k count=1");
        guest.Run("dd if=/tmp/old7 of=/mnt/old7 bs=4k conv=notrunc oflag=direct");
        guest.Run("cd /mnt; md5sum old7 >/tmp/sum; dd if=old7 bs=64k iflag=direct >/tmp/old7; md5sum -c /tmp/sum");
        await Tool.Succeed( // the runtime would want the file's lock
            "dd", $"if={files.Image}", $"of={CacheImage}", "bs=4k", $"skip={offset / 4096}", $"seek={offset / 4096}",
            "count=1", "conv=notrunc");
        guest.Run("echo 3 >/proc/sys/vm/drop_caches");
        ToolResult check = guest.Try("cd /mnt; md5sum -c /tmp/sum");
        Assert.Equal(1, check.ExitCode);
        Assert.Contains("old7: FAILED", check.Output, StringComparison.Ordinal);
    }

    /// <summary>A check of the checks: missing blocks become zeroes.</summary>
    [Fact]
    public async Task A_forced_switch_of_a_partial_cache_is_noticed()
    {
        GuestFiles files = await GuestFiles.Create(_folder);
        using ServerProcess source = Serve(files, "--readonly");
        using ServerProcess proxy = Proxies.Start(_folder, source);
        using Guest guest = files.Boot(proxy.SocketPath);
        await Succeed("--switch", "--force");
        Assert.Contains("is not what came with the disk", GuestFiles.WaitForWrong(guest), StringComparison.Ordinal);
    }

    /// <summary>
    /// Boots a guest on the source, and moves it to another QEMU, whose disk is the proxy. Without --incoming it stands
    /// still there, and the proxy has kept the whole disk as it was before.
    /// </summary>
    private async Task<Guest> Migrate(
        GuestFiles files, ServerProcess source, ServerProcess proxy, SlowLink line, bool isIncoming)
    {
        using Guest old = files.Boot(source.SocketPath);
        if (!isIncoming)
        {
            (long rate, line.BytesPerSecond) = (line.BytesPerSecond, 1_000_000_000);
            await Succeed("--cache-all");
            line.BytesPerSecond = rate;
            GuestFiles.Continue(old, 30); // so that each of its new files is written once more
        }

        string socket = _folder.File("migration");
        string[] options = [.. Guest.NbdDisk(proxy.SocketPath), .. isIncoming ? Array.Empty<string>() : ["-S"]];
        Guest next = Guest.Receive(_folder, files.System, socket, options);
        try
        {
            old.MigrateTo(next, socket);
            old.Quit();
            return next;
        }
        catch
        {
            next.Dispose();
            throw;
        }
    }
}
