using System.Diagnostics;
using System.Text.Json;
using Xnbd.Protocol;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>The program <c>xnbd-layer</c>.</summary>
public sealed class LayerProgramTests : IDisposable
{
    private const int Size = (8 << 20) + 100;

    private readonly TempFolder _folder = new("/dev/shm");
    private readonly string _image;
    private readonly byte[] _before;
    private readonly byte[] _after;

    public LayerProgramTests()
    {
        _image = _folder.Random("golden.img", Size);
        _before = File.ReadAllBytes(_image);
        _after = [.. _before];
    }

    public void Dispose() => _folder.Dispose();

    private string LayerPath => _folder.File("layer");

    private ServerProcess Start(params string[] options)
        => ServerProcess.StartMode("--cow-target", _folder, _image, options);

    /// <summary>Makes a layer: data, zeroes, and a block that was written and is as before.</summary>
    private void MakeLayer(params string[] below)
    {
        using ServerProcess server = Start(
            [.. below.SelectMany(path => (string[])["--cow-layer", path]), "--cow-layer", LayerPath]);
        using NbdTestClient client = server.Open();
        Write(client, 10_000, [.. Enumerable.Repeat((byte)1, 50_000)]);
        Write(client, Size - 50, [.. Enumerable.Repeat((byte)2, 50)]);
        Write(client, 4096, _before[4096..8192]);
        Assert.Equal(NbdError.None, client.Try(NbdCommand.WriteZeroes, 1 << 20, 1 << 20));
        _after.AsSpan(1 << 20, 1 << 20).Clear();
        client.Dispose();
        Assert.Equal(0, server.Stop());
    }

    private void Write(NbdTestClient client, int offset, byte[] data)
    {
        Assert.Equal(NbdError.None, client.Write((ulong)offset, data));
        data.CopyTo(_after, offset);
    }

    private static Task<ToolResult> Run(params string[] args) => Tool.Run(Layers.Program, args);

    private static async Task<JsonElement> Json(params string[] args)
        => JsonDocument.Parse(await Tool.Succeed(Layers.Program, [.. args, "--json"])).RootElement;

    [Fact]
    public async Task Info_tells_what_a_layer_holds_also_while_it_is_in_use()
    {
        MakeLayer();
        JsonElement info = await Json("info", LayerPath);
        Assert.Equal(_image, info.GetProperty("base").GetString());
        Assert.Equal(Size, info.GetProperty("size").GetInt64());
        Assert.Equal(1 << 20, info.GetProperty("zero-bytes").GetInt64());
        Assert.Equal((15 * 4096) - 4096 + 100, info.GetProperty("written-bytes").GetInt64());
        Assert.False(info.GetProperty("in-use").GetBoolean());
        Assert.Equal(
            [(4096, 57_344 - 4096 + 4096, "data"), (1 << 20, 1 << 20, "zero"), (8 << 20, 100, "data")],
            info.GetProperty("map").EnumerateArray().Select(e =>
                (
                    e.GetProperty("offset").GetInt32(),
                    e.GetProperty("length").GetInt32(),
                    e.GetProperty("kind").GetString()!)));

        using ServerProcess server = Start("--cow-layer", LayerPath);
        Assert.True((await Json("info", LayerPath)).GetProperty("in-use").GetBoolean());
        string text = await Tool.Succeed(Layers.Program, "info", LayerPath);
        Assert.Contains("state:     in use", text, StringComparison.Ordinal);
        Assert.Contains("0000", text, StringComparison.Ordinal);
        foreach (string command in (string[])["commit", "discard", "diff"])
        {
            ToolResult refused = await Run(command, LayerPath);
            Assert.Equal(
                (1, $"xnbd-layer: layer '{LayerPath}' is in use by xnbd-server (process {server.Id})\n"),
                (refused.ExitCode, refused.Errors));
        }
    }

    [Fact]
    public async Task Commit_is_refused_while_the_base_is_in_use()
    {
        MakeLayer();
        foreach (string mode in (string[])["--target", "--cow-target"])
        {
            using ServerProcess server = ServerProcess.StartMode(mode, _folder, _image);
            ToolResult refused = await Run("commit", LayerPath);
            Assert.Equal(
                (
                    1,
                    $"xnbd-layer: '{_image}' is in use by xnbd-server (process {server.Id}): "
                    + "another program needs it, or has it, alone\n"),
                (refused.ExitCode, refused.Errors));
        }

        Assert.Equal(_before, File.ReadAllBytes(_image));
        await Tool.Succeed(Layers.Program, "commit", LayerPath);
        Assert.Equal(_after, File.ReadAllBytes(_image));
        Assert.Equal(0, (await Json("info", LayerPath)).GetProperty("written-bytes").GetInt64());
        using ServerProcess again = Start("--cow-layer", LayerPath); // bound to the base as it is now
    }

    [Fact]
    public async Task A_commit_that_is_killed_is_completed_by_the_next_one()
    {
        const int size = 200 << 20;
        string image = _folder.Sparse("big.img", size), layer = _folder.File("big.layer");
        string expected = _folder.File("expected");
        using (ServerProcess server = ServerProcess.StartMode("--cow-target", _folder, image, "--cow-layer", layer))
        {
            using NbdTestClient client = server.Open();
            byte[] data = new byte[4 << 20];
            for (int offset = 0; offset < size; offset += data.Length)
            {
                new Random(offset).NextBytes(data);
                Assert.Equal(NbdError.None, client.Write((ulong)offset, data));
            }

            client.Dispose();
            Assert.Equal(0, server.Stop());
        }

        await Tool.Succeed(Layers.Program, "export", layer, expected);
        int interrupted = 0;
        var random = new Random(1);
        for (int i = 0; i < 40; i++)
        {
            var start = new ProcessStartInfo(Layers.Program, ["commit", layer])
            {
                RedirectStandardOutput = true,
                RedirectStandardError = true,
            };
            using var commit = Process.Start(start)!;
            bool hasEnded = commit.WaitForExit(random.Next(5, 60 + (10 * i)));
            if (!hasEnded)
                commit.Kill();
            await commit.WaitForExitAsync(TestContext.Current.CancellationToken);
            if (hasEnded && commit.ExitCode == 0)
                break;
            if (!(await Json("info", layer)).GetProperty("commit-interrupted").GetBoolean())
                continue; // killed before it began
            interrupted++;
            var refused = Assert.Throws<InvalidOperationException>(
                () => ServerProcess.StartMode("--cow-target", _folder, image, "--cow-layer", layer));
            Assert.Contains(
                "was interrupted; complete it with: xnbd-layer commit", refused.Message, StringComparison.Ordinal);
            Assert.Equal(1, (await Run("discard", layer)).ExitCode);
        }

        Assert.InRange(interrupted, 1, 40);
        await Run("commit", layer);
        await Tool.Succeed("cmp", image, expected);
        Assert.False((await Json("info", layer)).GetProperty("commit-interrupted").GetBoolean());
    }

    [Fact]
    public async Task A_commit_for_which_the_disk_has_no_room_can_be_resumed()
    {
        using TmpfsMount small = await TmpfsMount.Create(_folder, "12m");
        string image = small.File("base.img"), filler = small.File("filler"), layer = _folder.File("l");
        using (FileStream file = File.Create(image))
            file.SetLength(8 << 20);
        byte[] data = new byte[8 << 20];
        new Random(1).NextBytes(data);
        using (ServerProcess server = ServerProcess.StartMode("--cow-target", _folder, image, "--cow-layer", layer))
        {
            using NbdTestClient client = server.Open();
            Assert.Equal(NbdError.None, client.Write(0, data));
            client.Dispose();
            server.Stop();
        }

        File.WriteAllBytes(filler, new byte[8 << 20]);
        ToolResult failed = await Run("commit", layer);
        Assert.Equal(1, failed.ExitCode);
        Assert.Contains("No space left", failed.Errors, StringComparison.Ordinal);
        File.Delete(filler);
        await Tool.Succeed(Layers.Program, "commit", layer);
        Assert.Equal(data, File.ReadAllBytes(image));
    }

    [Theory]
    [InlineData("ext4", true)]
    [InlineData("ext4", false)]
    [InlineData("xfs", true)]
    [InlineData("xfs", false)]
    public async Task After_a_crash_of_the_machine_layers_know_that_their_base_has_changed(string kind, bool isCommit)
    {
        // The crash is the file system's: what is in memory only is lost, such as the time of a file's last change.
        const int size = 32 << 20, place = 8193 * 1000; // none of the blocks that are sampled
        const string shutDown = """
            import fcntl, os, struct, sys
            fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587d, struct.pack("I", 2)) # FS_IOC_SHUTDOWN
            """;
        byte[] data = [.. Enumerable.Repeat((byte)7, 4096)];
        string image, other, mountPoint;
        using (LoopMount mount = await LoopMount.Create(_folder, kind, 512L << 20))
        {
            mountPoint = mount.Path;
            image = Path.Combine(mount.Path, "golden.img");
            other = Path.Combine(mount.Path, "other.layer");
            byte[] content = new byte[size];
            new Random(3).NextBytes(content);
            File.WriteAllBytes(image, content);
            await Tool.Succeed("sync", "-f", image);
            foreach (string layer in (string[])[LayerPath, other])
            {
                using ServerProcess server = ServerProcess.StartMode(
                    "--cow-target", _folder, image, "--cow-layer", layer);
                using NbdTestClient client = server.Open();
                Assert.Equal(
                    NbdError.None, layer == LayerPath ? client.Write(place, data) : client.Try(NbdCommand.Flush, 0, 0));
                client.Dispose();
                Assert.Equal(0, server.Stop());
            }

            if (isCommit)
            {
                await Tool.Succeed(Layers.Program, "commit", LayerPath);
                await Crash(mountPoint);
            }
            else
            {
                using ServerProcess server = ServerProcess.Start(_folder, image);
                using NbdTestClient client = server.Open();
                Assert.Equal(NbdError.None, client.Try(NbdCommand.Flush, 0, 0)); // before the first change
                Assert.Equal(NbdError.None, client.Write(place, data));
                Assert.Equal(NbdError.None, client.Try(NbdCommand.Flush, 0, 0));
                await Crash(mountPoint);
                server.Kill();
            }
        }

        await Tool.Succeed("mount", "-o", "loop", _folder.File($"{kind}.img"), mountPoint);
        try
        {
            Assert.Equal(data, File.ReadAllBytes(image)[place..(place + 4096)]);
            var refused = Assert.Throws<InvalidOperationException>(
                () => ServerProcess.StartMode("--cow-target", _folder, image, "--cow-layer", other).Dispose());
            Assert.Contains("is not as it was", refused.Message, StringComparison.Ordinal);
            if (isCommit)
                // which knows of it
                ServerProcess.StartMode("--cow-target", _folder, image, "--cow-layer", LayerPath).Dispose();
        }
        finally
        {
            await Tool.Succeed("umount", "--lazy", mountPoint);
        }

        async Task Crash(string place) => await Tool.Succeed("python3", "-c", shutDown, place);
    }

    [Fact]
    public async Task A_stack_is_committed_layer_by_layer()
    {
        string lower = _folder.File("lower");
        using (ServerProcess server = Start("--cow-layer", lower))
        {
            using NbdTestClient client = server.Open();
            Write(client, 0, [.. Enumerable.Repeat((byte)8, 20_000)]);
            client.Dispose();
            server.Stop();
        }

        MakeLayer(lower);
        Assert.True((await Json("info", LayerPath)).GetProperty("base-is-layer").GetBoolean());
        await Tool.Succeed(Layers.Program, "export", LayerPath, _folder.File("all"));
        Assert.Equal(_after, File.ReadAllBytes(_folder.File("all")));
        await Tool.Succeed(Layers.Program, "commit", LayerPath);
        Assert.Equal(_before, File.ReadAllBytes(_image));
        await Tool.Succeed(Layers.Program, "export", lower, _folder.File("lower.img"));
        Assert.Equal(_after, File.ReadAllBytes(_folder.File("lower.img")));
        await Tool.Succeed(Layers.Program, "commit", lower);
        Assert.Equal(_after, File.ReadAllBytes(_image));
    }

    [Fact]
    public async Task Diff_lists_what_really_differs()
    {
        MakeLayer();
        JsonElement diff = await Json("diff", LayerPath);
        Assert.Equal(
            [(8192, 53_248 - 0, "data"), (1 << 20, 1 << 20, "zero"), (8 << 20, 100, "data")],
            diff.EnumerateArray().Select(e =>
                (
                    e.GetProperty("offset").GetInt32(),
                    e.GetProperty("length").GetInt32(),
                    e.GetProperty("kind").GetString()!)));
        Assert.Equal(
            3,
            (await Tool.Succeed(Layers.Program, "diff", LayerPath)).Split(
                '\n', StringSplitOptions.RemoveEmptyEntries).Length);
    }

    [Fact]
    public async Task Rebase_keeps_the_disk_and_only_what_differs()
    {
        MakeLayer();
        byte[] newBase = [.. _after];
        newBase.AsSpan(3 << 20, 1 << 20).Fill(5); // the layer must take in what it has there,
        newBase.AsSpan(10_000, 50_000).Fill(1); // and may let go of what is the same
        string path = _folder.File("new.img");
        File.WriteAllBytes(path, newBase);
        await Tool.Succeed(Layers.Program, "rebase", LayerPath, path);
        JsonElement info = await Json("info", LayerPath);
        Assert.Equal(path, info.GetProperty("base").GetString());
        Assert.Equal(1 << 20, info.GetProperty("written-bytes").GetInt64());
        Assert.Equal(0, info.GetProperty("zero-bytes").GetInt64());
        await Tool.Succeed(Layers.Program, "export", LayerPath, _folder.File("out"));
        Assert.Equal(_after, File.ReadAllBytes(_folder.File("out")));
        using ServerProcess server = ServerProcess.StartMode("--cow-target", _folder, path, "--cow-layer", LayerPath);
    }

    [Fact]
    public async Task A_rebase_that_is_killed_leaves_the_disk_as_it_was()
    {
        MakeLayer();
        string other = _folder.Random("other.img", Size, seed: 9);
        string current = _image;
        int completed = 0, killed = 0;
        var random = new Random(2);
        for (int i = 0; i < 30; i++)
        {
            string next = current == _image ? other : _image;
            using (var rebase = Process.Start(Layers.Program, ["rebase", LayerPath, next]))
            {
                if (!rebase.WaitForExit(random.Next(5, 60 + (20 * i))))
                    rebase.Kill();
                await rebase.WaitForExitAsync(TestContext.Current.CancellationToken);
                Assert.Contains(rebase.ExitCode, (int[])[0, 128 + 9]);
                completed += rebase.ExitCode == 0 ? 1 : 0;
                killed += rebase.ExitCode == 0 ? 0 : 1;
            }

            current = (await Json("info", LayerPath)).GetProperty("base").GetString()!;
            string output = _folder.File($"out{i}");
            await Tool.Succeed(Layers.Program, "export", LayerPath, output);
            Assert.Equal(_after, File.ReadAllBytes(output));
            File.Delete(output);
        }

        Assert.True(completed > 0 && killed > 0, $"{completed} completed, {killed} killed: the test tests nothing");
        await Tool.Succeed(Layers.Program, "rebase", LayerPath, other);
        await Tool.Succeed(Layers.Program, "rebase", LayerPath, _image);
        JsonElement info = await Json("info", LayerPath);
        Assert.InRange(info.GetProperty("allocated-bytes").GetInt64(), 1, 2 << 20); // what was let go takes no space
        Assert.Equal(
            1 << 20,
            info.GetProperty("written-bytes").GetInt64() + info.GetProperty("zero-bytes").GetInt64()
                - (14 * 4096) - 100 + 4096);
    }

    [Fact]
    public async Task A_commit_is_resumed_with_the_base_that_it_began_with_and_no_other()
    {
        // What interrupts it is a disk that is full: a time to kill it would be hit or missed.
        const int size = 64 << 20;
        using TmpfsMount full = await TmpfsMount.Create(_folder, "28m");
        string image = _folder.Random("big.img", 16 << 20), moved = full.File("moved.img");
        string layer = _folder.File("big.layer");
        using (FileStream file = File.OpenWrite(image))
            file.SetLength(size);
        await Tool.Succeed("cp", "--preserve=timestamps", "--sparse=always", image, moved);
        byte[] expected = File.ReadAllBytes(image);
        using (ServerProcess server = ServerProcess.StartMode("--cow-target", _folder, image, "--cow-layer", layer))
        {
            using NbdTestClient client = server.Open();
            byte[] data = new byte[20 << 20];
            new Random(7).NextBytes(data);
            client.Write(20 << 20, data);
            data.CopyTo(expected, 20 << 20);
            client.Dispose();
            Assert.Equal(0, server.Stop());
        }

        ToolResult interrupted = await Run("commit", layer, "--base", moved);
        Assert.Equal(1, interrupted.ExitCode);
        Assert.Contains("No space left", interrupted.Errors, StringComparison.Ordinal);
        Assert.True((await Json("info", layer)).GetProperty("commit-interrupted").GetBoolean());

        string small = _folder.Sparse("small.img", 1 << 20), other = _folder.Random("other.img", size, seed: 5);
        foreach (string wrong in (string[])[small, other])
        {
            ToolResult refused = await Run("commit", layer, "--base", wrong);
            Assert.Equal(1, refused.ExitCode);
            Assert.Contains("had begun with another base", refused.Errors, StringComparison.Ordinal);
        }

        await Tool.Succeed("mount", "-o", "remount,size=100m", full.Path);
        await Tool.Succeed(Layers.Program, "commit", layer); // where it began, which is where it was told to
        Assert.Equal(expected, File.ReadAllBytes(moved));
        Assert.False((await Json("info", layer)).GetProperty("commit-interrupted").GetBoolean());
    }

    [Fact]
    public async Task Discard_empties_the_layer_also_over_a_base_that_has_changed()
    {
        MakeLayer();
        File.SetLastWriteTimeUtc(_image, DateTime.UtcNow.AddHours(1));
        Assert.Equal(1, (await Run("commit", LayerPath)).ExitCode);
        Assert.Equal(1, (await Run("export", LayerPath, _folder.File("x"))).ExitCode);
        await Tool.Succeed(Layers.Program, "discard", LayerPath);
        await Tool.Succeed(Layers.Program, "export", LayerPath, _folder.File("out"));
        Assert.Equal(_before, File.ReadAllBytes(_folder.File("out")));
    }

    [Fact]
    public async Task A_base_that_was_moved_is_found_where_the_user_says()
    {
        MakeLayer();
        string moved = _folder.File("moved.img");
        File.Move(_image, moved);
        ToolResult lost = await Run("export", LayerPath, _folder.File("x"));
        Assert.Equal(1, lost.ExitCode);
        Assert.Contains(_image, lost.Errors, StringComparison.Ordinal);
        await Tool.Succeed(Layers.Program, "export", LayerPath, _folder.File("out"), "--base", moved);
        Assert.Equal(_after, File.ReadAllBytes(_folder.File("out")));
    }

    [Fact]
    public async Task Nothing_is_overwritten_and_bad_calls_are_refused()
    {
        MakeLayer();
        string output = _folder.File("out");
        File.WriteAllText(output, "precious");
        Assert.Equal(1, (await Run("export", LayerPath, output)).ExitCode);
        Assert.Equal(1, (await Run("export", LayerPath, output, "--format", "qcow2")).ExitCode);
        Assert.Equal("precious", File.ReadAllText(output));
        Assert.Equal(2, (await Run("export", LayerPath, _folder.File("o"), "--format", "vmdk")).ExitCode);
        Assert.Equal(2, (await Run("info")).ExitCode);
        Assert.Equal(2, (await Run("frobnicate", LayerPath)).ExitCode);
        Assert.Equal(2, (await Run("discard", LayerPath, "--base", "")).ExitCode);
        Assert.Equal(2, (await Run("info", "")).ExitCode);
        string partial = _folder.File("new.partial");
        File.WriteAllText(partial, "precious");
        await Tool.Succeed(Layers.Program, "export", LayerPath, _folder.File("new"));
        Assert.Equal("precious", File.ReadAllText(partial));
        Assert.Equal(1, (await Run("export", LayerPath, _folder.File("no/such/folder"))).ExitCode);
        ToolResult noLayer = await Run("info", _image);
        Assert.Equal(
            (1, $"xnbd-layer: cannot open layer '{_image}': it is no xNBD layer\n"),
            (noLayer.ExitCode, noLayer.Errors));
        Assert.Equal(1, (await Run("rebase", LayerPath, LayerPath)).ExitCode);
    }
}
