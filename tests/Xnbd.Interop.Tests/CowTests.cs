using System.Text.Json;
using Xnbd.Protocol;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>Names and tools for tests of layers.</summary>
internal static class Layers
{
    public static string Program { get; } = Path.Combine(ServerProcess.BinFolder, "xnbd-layer");
}

/// <summary>The copy-on-write mode, with real clients.</summary>
public sealed class CowTests : IDisposable
{
    private const int Size = 8 << 20;

    private readonly TempFolder _folder = new();
    private readonly string _image;
    private readonly byte[] _before;

    public CowTests()
    {
        _image = _folder.Random("golden.img", Size);
        _before = File.ReadAllBytes(_image);
    }

    public void Dispose() => _folder.Dispose();

    private string LayerPath => _folder.File("layer");

    private ServerProcess Start(params string[] options)
        => ServerProcess.StartMode("--cow-target", _folder, _image, options);

    [Fact]
    public void Ten_servers_stand_on_one_base_each_with_its_own_writes()
    {
        var servers = new List<ServerProcess>();
        try
        {
            for (int i = 0; i < 10; i++)
                servers.Add(Start());
            for (int i = 0; i < 10; i++)
            {
                using NbdTestClient client = servers[i].Open();
                Assert.Equal(NbdError.None, client.Write(5000, [.. Enumerable.Repeat((byte)i, 10_000)]));
                client.Disconnect();
            }

            for (int i = 0; i < 10; i++)
            {
                using NbdTestClient first = servers[i].Open(), second = servers[i].Open();
                byte[] expected = [.. _before];
                expected.AsSpan(5000, 10_000).Fill((byte)i);
                Assert.Equal(expected, first.Read(0, Size));
                Assert.Equal(expected, second.Read(0, Size)); // all connections see one disk
                first.Disconnect();
                second.Disconnect();
            }

            Assert.Equal(10, LayerFiles.Length);
            foreach (ServerProcess server in servers)
                Assert.Equal(0, server.Stop());
            Assert.Empty(LayerFiles);
            Assert.Equal(_before, File.ReadAllBytes(_image));
        }
        finally
        {
            servers.ForEach(server => server.Dispose());
        }
    }

    private string[] LayerFiles => Directory.GetFiles(_folder.Path, "*.layer1");

    [Fact]
    public void What_a_killed_server_left_is_cleaned_away_by_the_next_one()
    {
        using (ServerProcess killed = Start())
        {
            using NbdTestClient client = killed.Open();
            client.Write(0, new byte[4096]);
            killed.Kill();
        }

        Assert.Single(LayerFiles);
        using ServerProcess server = Start();
        Wait.Until(
            () => server.Log.Contains("removed a layer that a killed server left", StringComparison.Ordinal),
            "it is logged");
        Assert.Single(LayerFiles);
        using NbdTestClient next = server.Open();
        Assert.Equal(_before[..4096], next.Read(0, 4096));
        next.Dispose();
        Assert.Equal(0, server.Stop());
        Assert.Empty(LayerFiles);
    }

    [Fact]
    public async Task A_base_on_a_read_only_file_system_is_enough()
    {
        using TmpfsMount readOnly = await TmpfsMount.Create(_folder, "16m");
        string image = readOnly.File("golden.img");
        string elsewhere = Directory.CreateDirectory(_folder.File("elsewhere")).FullName;
        await Tool.Succeed("cp", _image, image);
        await Tool.Succeed("mount", "-o", "remount,ro", readOnly.Path);
        var failure = Assert.Throws<InvalidOperationException>(
            () => ServerProcess.StartMode("--cow-target", _folder, image));
        Assert.Contains("Read-only file system", failure.Message, StringComparison.Ordinal);
        using ServerProcess server = ServerProcess.StartMode("--cow-target", _folder, image, "--cow-dir", elsewhere);
        Assert.Single(Directory.GetFiles(elsewhere));
        using NbdTestClient client = server.Open();
        Assert.Equal(NbdError.None, client.Write(1, [1, 2, 3]));
        client.Dispose();
        Assert.Equal(0, server.Stop());
        Assert.Empty(Directory.GetFiles(elsewhere));
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public async Task A_killed_layer_on_a_read_only_file_system_is_served_to_be_read(bool hasRestarted)
    {
        using TmpfsMount mount = await TmpfsMount.Create(_folder, "64m");
        string image = mount.File("golden.img"), layer = mount.File("layer"), top = mount.File("top");
        string outside = _folder.File("outside");
        await Tool.Succeed("cp", _image, image);
        byte[] flushed = [.. Enumerable.Repeat((byte)1, 5000)], last = [.. Enumerable.Repeat((byte)2, 5000)];
        using (ServerProcess killed = ServerProcess.StartMode("--cow-target", _folder, image, "--cow-layer", layer))
        {
            using NbdTestClient client = killed.Open();
            Assert.Equal(NbdError.None, client.Write(10_000, flushed));
            Assert.Equal(NbdError.None, client.Try(NbdCommand.Flush, 0, 0));
            Assert.Equal(NbdError.None, client.Write(1 << 20, last)); // only the live map knows of it
            killed.Kill();
        }

        if (hasRestarted)
            LayerHeader.Change(layer, header => header[40..56].Fill(7)); // the boot id: the machine has died since
        byte[] expected = [.. _before];
        flushed.CopyTo(expected, 10_000);
        if (!hasRestarted)
            last.CopyTo(expected, 1 << 20);
        await Tool.Succeed("mount", "-o", "remount,ro", mount.Path);
        byte[] before = File.ReadAllBytes(layer);
        using (ServerProcess server = ServerProcess.StartMode(
            "--cow-target", _folder, image, "--readonly", "--cow-layer", layer))
        {
            using NbdTestClient client = server.Open();
            Assert.Equal(expected, client.Read(0, Size));
            Assert.Equal(NbdError.Permission, client.Write(0, [1]));
        }

        await Tool.Succeed(Layers.Program, "export", layer, _folder.File("out"));
        Assert.Equal(expected, File.ReadAllBytes(_folder.File("out")));
        await Tool.Succeed(Layers.Program, "diff", layer);

        // Nothing that is written may stand on it: after a crash of the machine it would be another disk.
        bool isSettled = hasRestarted; // then the durable map counts
        Assert.Equal(
            isSettled,
            Record.Exception(() => ServerProcess.StartMode(
                "--cow-target", _folder, image, "--cow-layer", layer, "--cow-layer", outside).Dispose()) is null);
        Assert.Equal(before, File.ReadAllBytes(layer));
        await Tool.Succeed("mount", "-o", "remount,rw", mount.Path);
        using (ServerProcess server = ServerProcess.StartMode(
            "--cow-target", _folder, image, "--cow-layer", layer, "--cow-layer", top))
        {
            using NbdTestClient client = server.Open();
            Assert.Equal(expected, client.Read(0, Size));
        }
    }

    /// <summary>A file system of that kind cannot sync anything, and says so.</summary>
    [Fact]
    public async Task Image_and_layer_may_stand_on_a_file_system_that_is_never_written()
    {
        Assert.SkipUnless(Environment.UserName == "root", "mounting needs root");
        Assert.SkipWhen(Tool.Find("mksquashfs") is null, "mksquashfs is absent");
        string source = Directory.CreateDirectory(_folder.File("source")).FullName, packed = _folder.File("packed");
        string mount = Directory.CreateDirectory(_folder.File("mount")).FullName;
        File.Copy(_image, Path.Combine(source, "golden.img"));
        byte[] expected = [.. _before];
        expected.AsSpan(10_000, 5000).Fill(1);
        using (ServerProcess server = ServerProcess.StartMode(
            "--cow-target", _folder, Path.Combine(source, "golden.img"), "--cow-layer", Path.Combine(source, "layer")))
        {
            using NbdTestClient client = server.Open();
            Assert.Equal(NbdError.None, client.Write(10_000, expected.AsSpan(10_000, 5000).ToArray()));
            client.Disconnect();
            Assert.Equal(0, server.Stop());
        }

        await Tool.Succeed("mksquashfs", source, packed, "-noappend", "-quiet");
        ToolResult mounted = await Tool.Run("mount", "-o", "loop", packed, mount);
        Assert.SkipUnless(mounted.ExitCode == 0, $"squashfs cannot be mounted here: {mounted.Errors}");
        try
        {
            string image = Path.Combine(mount, "golden.img"), layer = Path.Combine(mount, "layer");
            string[] forced = ["--force"]; // such a file system keeps the time of change to the second only
            using (ServerProcess server = ServerProcess.StartMode(
                "--cow-target", _folder, image, [.. forced, "--readonly", "--cow-layer", layer]))
            {
                using NbdTestClient client = server.Open();
                Assert.Equal(expected, client.Read(0, Size));
            }

            using (ServerProcess server = ServerProcess.StartMode(
                "--cow-target", _folder, image, [.. forced, "--cow-layer", layer, "--cow-layer", _folder.File("top")]))
            {
                using NbdTestClient client = server.Open();
                Assert.Equal(expected, client.Read(0, Size));
                Assert.Equal(NbdError.None, client.Write(0, [1]));
                Assert.Equal(NbdError.None, client.Try(NbdCommand.Flush, 0, 0));
            }
        }
        finally
        {
            await Tool.Succeed("umount", "--lazy", mount);
        }
    }

    [Fact]
    public void A_layer_that_is_absent_is_made_unless_the_disk_is_only_read()
    {
        string refusal = Assert.Throws<InvalidOperationException>(
            () => Start("--readonly", "--cow-layer", LayerPath)).Message;
        Assert.Contains(
            $"there is no layer '{LayerPath}'; none is made for a disk that is only read",
            refusal,
            StringComparison.Ordinal);
        Assert.False(File.Exists(LayerPath));
        Start("--cow-layer", LayerPath).Dispose();
        Start("--readonly", "--cow-layer", LayerPath).Dispose();
    }

    [Fact]
    public async Task Nobody_writes_an_image_on_which_layers_stand()
    {
        using (ServerProcess cow = Start())
        {
            var refused = Assert.Throws<InvalidOperationException>(() => ServerProcess.Start(_folder, _image));
            Assert.Contains("relies on its staying as it is", refused.Message, StringComparison.Ordinal);
            using ServerProcess reader = ServerProcess.Start(_folder, _image, "--readonly");
            if (Tool.Find("qemu-io") is not null)
            {
                ToolResult qemu = await Tool.Run("qemu-io", "-f", "raw", "-c", "write 0 4k", _image);
                Assert.NotEqual(0, qemu.ExitCode);
            }
        }

        using ServerProcess first = ServerProcess.Start(_folder, _image, "--share-image");
        using ServerProcess second = ServerProcess.Start(_folder, _image, "--share-image");
        Assert.Contains(
            "another program writes it",
            Assert.Throws<InvalidOperationException>(() => Start()).Message,
            StringComparison.Ordinal);
        Assert.Equal(_before, File.ReadAllBytes(_image));
    }

    [Fact]
    public async Task A_device_as_a_base_needs_a_directory_for_its_layer()
    {
        Assert.SkipUnless(Environment.UserName == "root", "loop devices need root");
        string device = (await Tool.Succeed("losetup", "--find", "--show", "--read-only", _image)).Trim();
        try
        {
            var failure = Assert.Throws<InvalidOperationException>(
                () => ServerProcess.StartMode("--cow-target", _folder, device));
            Assert.Contains("--cow-dir", failure.Message, StringComparison.Ordinal);
            using ServerProcess server = ServerProcess.StartMode(
                "--cow-target", _folder, device, "--cow-dir", _folder.Path);
            using NbdTestClient client = server.Open();
            Assert.Equal(NbdError.None, client.Write(1, [1, 2, 3]));
            Assert.Equal(_before[4..100], client.Read(4, 96));
        }
        finally
        {
            await Tool.Succeed("losetup", "--detach", device);
        }
    }

    [Fact]
    public void Read_only_refuses_writes_and_keeps_the_connection()
    {
        using ServerProcess server = Start("--readonly");
        using NbdTestClient client = server.Open();
        Assert.Equal(NbdError.Permission, client.Write(0, new byte[512]));
        Assert.Equal(_before[..512], client.Read(0, 512));
        Assert.Equal(NbdTransmissionFlags.ReadOnly, client.Flags & NbdTransmissionFlags.ReadOnly);
    }

    [Fact]
    public void Signals_for_snapshots_are_logged_and_harmless()
    {
        using ServerProcess server = Start();
        server.Signal(10);
        Wait.Until(
            () => server.Log.Contains("SIGUSR1 has no meaning in this mode", StringComparison.Ordinal),
            "the signal is logged");
        using NbdTestClient client = server.Open();
        Assert.Equal(_before[..512], client.Read(0, 512));
    }

    [Fact]
    public void A_changed_base_is_refused_unless_forced()
    {
        using (ServerProcess server = Start("--cow-layer", LayerPath))
            Assert.Equal(0, server.Stop());
        File.SetLastWriteTimeUtc(_image, DateTime.UtcNow.AddHours(-3));
        var failure = Assert.Throws<InvalidOperationException>(() => Start("--cow-layer", LayerPath));
        Assert.Contains("is not as it was", failure.Message, StringComparison.Ordinal);
        Assert.Contains("--force", failure.Message, StringComparison.Ordinal);
        using ServerProcess forced = Start("--cow-layer", LayerPath, "--force");
        Wait.Until(() => forced.Log.Contains("used all the same", StringComparison.Ordinal), "it is logged");
    }

    [Fact]
    public async Task Nbdinfo_tells_which_layer_holds_what()
    {
        Assert.SkipWhen(Tool.Find("nbdinfo") is null, "nbdinfo is absent");
        using (ServerProcess lower = Start("--cow-layer", LayerPath))
        {
            using NbdTestClient client = lower.Open();
            client.Write(0, [.. Enumerable.Repeat((byte)1, 8192)]);
            client.Dispose();
            lower.Stop();
        }

        using ServerProcess server = Start("--cow-layer", LayerPath, "--cow-layer", _folder.File("top"));
        using (NbdTestClient client = server.Open())
        {
            client.Write(4096, [.. Enumerable.Repeat((byte)2, 4096)]);
            client.Try(NbdCommand.WriteZeroes, 65536, 65536);
            client.Disconnect();
        }

        string depths = await Tool.Succeed("nbdinfo", "--map=qemu:allocation-depth", "--json", server.Uri);
        Assert.Equal(
            [(0, 4096, 2), (4096, 4096, 1), (8192, 65536 - 8192, 3), (65536, 65536, 1), (131072, Size - 131072, 3)],
            JsonDocument.Parse(depths).RootElement.EnumerateArray().Select(e =>
                (
                    e.GetProperty("offset").GetInt32(),
                    e.GetProperty("length").GetInt32(),
                    e.GetProperty("type").GetInt32())));
        string totals = await Tool.Succeed("nbdinfo", "--map", "--totals", server.Uri);
        Assert.Contains("65536", totals, StringComparison.Ordinal);

        using NbdTestClient both = server.Open(structured: true, "", "base:allocation", "qemu:allocation-depth");
        List<Reply> replies = both.Call(NbdCommand.BlockStatus, 0, Size);
        Assert.Equal([NbdChunkFlags.None, NbdChunkFlags.Done], replies.Select(r => r.Flags));
        Assert.Equal([1, 2], replies.Select(r => (int)r.Payload[3]));
        Assert.Equal([3, 5], replies.Select(r => (r.Payload.Length - 4) / 8)); // neighbours of one kind are one extent
    }

    [Fact]
    public async Task A_golden_image_boots_a_file_system_and_the_layer_can_be_kept_compared_and_committed()
    {
        string golden = _folder.Sparse("fs.img", 64 << 20);
        await Tool.Succeed("mkfs.ext4", "-q", "-F", golden);
        byte[] before = File.ReadAllBytes(golden);
        using ServerProcess server = ServerProcess.StartMode("--cow-target", _folder, golden, "--cow-layer", LayerPath);
        await FileSystemUse.Run(_folder, server.Uri, make: false);
        await Tool.Succeed("nbdcopy", server.Uri, _folder.File("seen"));
        Assert.Equal(0, server.Stop());
        Assert.Equal(before, File.ReadAllBytes(golden));

        await Tool.Succeed(Layers.Program, "export", LayerPath, _folder.File("out.qcow2"));
        await Tool.Succeed("qemu-img", "compare", _folder.File("out.qcow2"), _folder.File("seen"));
        await Tool.Succeed(Layers.Program, "export", LayerPath, _folder.File("out.img"));
        await Tool.Succeed("cmp", _folder.File("out.img"), _folder.File("seen"));
        await Tool.Succeed("e2fsck", "-fn", _folder.File("out.img"));
        await Tool.Succeed(Layers.Program, "commit", LayerPath);
        await Tool.Succeed("cmp", golden, _folder.File("seen"));
        await Tool.Succeed("e2fsck", "-fn", golden);
    }
}
