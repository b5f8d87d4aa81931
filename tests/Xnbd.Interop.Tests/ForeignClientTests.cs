using System.Globalization;
using System.Text.Json;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>The clients in use today, against the native server.</summary>
public sealed class ForeignClientTests : IDisposable
{
    private readonly TempFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    private static void Need(string program, string package)
        => Assert.SkipWhen(Tool.Find(program) is null, $"{program} is absent (apt install {package})");

    [Fact]
    public async Task Nbdinfo_shows_sensible_fields()
    {
        Need("nbdinfo", "libnbd-bin");
        string image = _folder.Sparse("disk.img", (1 << 20) + 77);
        using ServerProcess server = ServerProcess.Start(_folder, image, "--export-name", "golden");
        string uri = server.Uri.Replace("///", "///golden", StringComparison.Ordinal);
        using JsonDocument info = JsonDocument.Parse(await Tool.Succeed("nbdinfo", "--json", uri));
        JsonElement root = info.RootElement;
        Assert.Equal("newstyle-fixed", root.GetProperty("protocol").GetString());
        Assert.True(root.GetProperty("structured").GetBoolean());
        JsonElement export = root.GetProperty("exports")[0];
        Assert.Equal("golden", export.GetProperty("export-name").GetString());
        Assert.Equal("disk.img", export.GetProperty("description").GetString());
        Assert.Equal((1 << 20) + 77, export.GetProperty("export-size").GetInt64());
        Assert.Equal(["base:allocation"], export.GetProperty("contexts").EnumerateArray().Select(c => c.GetString()));
        string[] abilities =
        [
            "can_cache", "can_df", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero",
        ];
        foreach (string can in abilities)
            Assert.True(export.GetProperty(can).GetBoolean(), can);
        Assert.False(export.GetProperty("is_read_only").GetBoolean());
        Assert.Equal(1, export.GetProperty("block_size_minimum").GetInt32());
        Assert.Equal(4096, export.GetProperty("block_size_preferred").GetInt32());
        Assert.Equal(32 << 20, export.GetProperty("block_size_maximum").GetInt32());

        string list = await Tool.Succeed("nbdinfo", "--list", server.Uri);
        Assert.Contains("golden", list, StringComparison.Ordinal);
        Assert.NotEqual(
            0, (await Tool.Run("nbdinfo", server.Uri.Replace("///", "///other", StringComparison.Ordinal))).ExitCode);
    }

    [Fact]
    public async Task Nbdinfo_maps_holes_and_data()
    {
        Need("nbdinfo", "libnbd-bin");
        string image = _folder.Sparse("disk.img", 1 << 20);
        using (FileStream file = File.OpenWrite(image))
        {
            file.Position = 256 * 1024;
            file.Write(new byte[65536]);
        }

        using ServerProcess server = ServerProcess.Start(_folder, image);
        string map = await Tool.Succeed("nbdinfo", "--map", server.Uri);
        string[][] lines = [.. map.Split('\n', StringSplitOptions.RemoveEmptyEntries)
            .Select(l => l.Split(' ', StringSplitOptions.RemoveEmptyEntries))];
        Assert.Equal(["0 262144 3", "262144 65536 0", "327680 720896 3"], lines.Select(l => string.Join(' ', l[..3])));
    }

    [Theory]
    [InlineData(1)]
    [InlineData(4)]
    public async Task Nbdcopy_copies_both_ways(int connections)
    {
        Need("nbdcopy", "libnbd-bin");
        string source = _folder.Random("source", (24 << 20) + 511);
        using (FileStream file = File.OpenWrite(source))
        {
            file.Position = 4 << 20;
            file.Write(new byte[8 << 20]); // zeroes among the data
        }

        string image = _folder.Sparse("disk.img", (24 << 20) + 511);
        using ServerProcess server = ServerProcess.Start(_folder, image);
        string flag = $"--connections={connections.ToString(CultureInfo.InvariantCulture)}";
        await Tool.Succeed("nbdcopy", flag, "--flush", source, server.Uri);
        await Tool.Succeed("nbdcopy", flag, server.Uri, _folder.File("back"));
        await Tool.Succeed("cmp", source, image);
        await Tool.Succeed("cmp", source, _folder.File("back"));
    }

    [Fact]
    public async Task A_sparse_image_stays_sparse_when_copied()
    {
        Need("nbdcopy", "libnbd-bin");
        string source = _folder.Sparse("source", 256 << 20);
        using (FileStream file = File.OpenWrite(source))
            file.Write(new byte[100_000].Select(_ => (byte)7).ToArray());
        string image = _folder.Sparse("disk.img", 256 << 20);
        using (ServerProcess server = ServerProcess.Start(_folder, image))
        {
            await Tool.Succeed("nbdcopy", "--flush", source, server.Uri);
            await Tool.Succeed("nbdcopy", server.Uri, _folder.File("back"));
        }

        await Tool.Succeed("cmp", source, image);
        foreach (string file in (string[])[image, _folder.File("back")])
            Assert.InRange(
                long.Parse(await Tool.Succeed("stat", "-c", "%b", file), CultureInfo.InvariantCulture), 1, 2048);
    }

    [Fact]
    public async Task Qemu_img_reads_writes_and_compares()
    {
        Need("qemu-img", "qemu-utils");
        string source = _folder.Random("source", 16 << 20);
        string image = _folder.Sparse("disk.img", 16 << 20);
        using ServerProcess server = ServerProcess.Start(_folder, image);
        string uri = server.Uri;
        using JsonDocument info = JsonDocument.Parse(await Tool.Succeed("qemu-img", "info", "--output=json", uri));
        Assert.Equal(16 << 20, info.RootElement.GetProperty("virtual-size").GetInt64());
        await Tool.Succeed("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, uri);
        await Tool.Succeed("qemu-img", "compare", "-f", "raw", "-F", "raw", source, uri);
        await Tool.Succeed("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, _folder.File("back.qcow2"));
        await Tool.Succeed("qemu-img", "compare", "-F", "raw", _folder.File("back.qcow2"), uri);
        using JsonDocument map =
            JsonDocument.Parse(await Tool.Succeed("qemu-img", "map", "--output=json", "-f", "raw", uri));
        Assert.Equal(16 << 20, map.RootElement.EnumerateArray().Sum(e => e.GetProperty("length").GetInt64()));
    }

    [Fact]
    public async Task Qemu_io_zeroes_discards_and_flushes()
    {
        Need("qemu-io", "qemu-utils");
        string image = _folder.Random("disk.img", 4 << 20);
        using ServerProcess server = ServerProcess.Start(_folder, image);
        string output = await Tool.Succeed(
            "qemu-io", "-f", "raw", "-d", "unmap",
            "-c", "write -P 5 0 64k", "-c", "write -f -P 6 64k 64k", "-c", "write -z 128k 64k",
            "-c", "write -z -u 192k 64k",
            "-c", "discard 256k 64k", "-c", "flush", "-c", "read -P 5 0 64k", "-c", "read -P 6 64k 64k",
            "-c", "read -P 0 128k 128k",
            "-c", "write -P 9 1000001 333", "-c", "read -P 9 1000001 333", server.Uri);
        Assert.DoesNotContain("fail", output, StringComparison.OrdinalIgnoreCase);

        byte[] bytes = File.ReadAllBytes(image);
        Assert.All(bytes[..65536], b => Assert.Equal(5, b));
        Assert.All(bytes[65536..131072], b => Assert.Equal(6, b));
        Assert.All(bytes[131072..(320 * 1024)], b => Assert.Equal(0, b));
        Assert.All(bytes[1000001..1000334], b => Assert.Equal(9, b));
    }

    [Fact]
    public async Task Fio_verifies_what_it_wrote()
    {
        Need("fio", "fio");
        Assert.SkipUnless(
            (await Tool.Succeed("fio", "--enghelp")).Contains("nbd", StringComparison.Ordinal),
            "this fio has no nbd engine");
        string image = _folder.Sparse("disk.img", 32 << 20);
        using ServerProcess server = ServerProcess.Start(_folder, image);
        await Tool.Succeed(
            "fio", "--name=verify", "--ioengine=nbd", $"--uri={server.Uri}", "--rw=randwrite",
            "--bsrange=512-128k", "--bs_unaligned=1",
            "--iodepth=32", "--size=32m", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--fsync=100");
        await Tool.Succeed(
            "fio", "--name=trim", "--ioengine=nbd", $"--uri={server.Uri}", "--rw=randtrim", "--bs=64k",
            "--iodepth=16", "--size=32m");
    }

    [Fact]
    public async Task Nbdsh_sees_the_rules_kept()
    {
        Assert.SkipUnless(
            File.Exists("/usr/bin/python3") && (await Tool.Run("/usr/bin/python3", "-c", "import nbd")).ExitCode == 0,
            "python3-libnbd is absent");
        string image = _folder.Sparse("disk.img", 1 << 20);
        using ServerProcess server = ServerProcess.Start(_folder, image);
        const string script = """
            import errno, nbd, sys
            h = nbd.NBD()
            h.set_handshake_flags(nbd.HANDSHAKE_FLAG_MASK)
            h.add_meta_context("base:allocation")
            h.connect_uri(sys.argv[1])
            assert h.get_structured_replies_negotiated() and h.can_df() and h.can_multi_conn()
            h.set_strict_mode(0)
            h.pwrite(b"x" * 1000, 123, nbd.CMD_FLAG_FUA)
            assert h.pread(1000, 123) == b"x" * 1000
            chunks = []
            def chunk(data, offset, status, err):
                chunks.append((offset, len(data), status))
            buf = h.pread_structured(200000, 0, chunk)
            assert sum(c[1] for c in chunks) == 200000, chunks
            assert any(c[2] == nbd.READ_HOLE for c in chunks), chunks
            h.zero(4096, 0, nbd.CMD_FLAG_FAST_ZERO)
            h.zero(4096, 4096, nbd.CMD_FLAG_NO_HOLE)
            h.trim(4096, 8192, nbd.CMD_FLAG_FUA)
            h.cache(65536, 0)
            h.flush()
            entries = []
            h.block_status(1 << 20, 0, lambda name, off, e, err: entries.extend(e))
            assert sum(entries[0::2]) == 1 << 20, entries
            entries = []
            h.block_status(4096, 4096, lambda name, off, e, err: entries.extend(e), nbd.CMD_FLAG_REQ_ONE)
            assert entries == [4096, 0], entries
            for call, expected in ((lambda: h.pread(2, (1 << 20) - 1), "EINVAL"),
                                   (lambda: h.pwrite(b"ab", (1 << 20) - 1), "ENOSPC"),
                                   (lambda: h.trim(2, (1 << 20) - 1), "EINVAL")):
                try:
                    call()
                    assert False, expected
                except nbd.Error as e:
                    assert e.errno == expected, e.errno
            assert h.pread(1, 0) == b"\0"
            h.shutdown()
            """;
        await Tool.Succeed("/usr/bin/python3", "-c", script, server.Uri);
    }

    [Fact]
    public async Task A_file_system_lives_on_the_disk()
    {
        Need("mkfs.ext4", "e2fsprogs");
        Need("nbdcopy", "libnbd-bin");
        string files = Directory.CreateDirectory(_folder.File("files")).FullName;
        for (int i = 0; i < 50; i++)
            File.WriteAllBytes(
                Path.Combine(files, $"f{i}"), new byte[i * 1000].Select((_, k) => (byte)(k * i)).ToArray());
        string made = _folder.Sparse("made", 32 << 20);
        await Tool.Succeed("mkfs.ext4", "-q", "-F", "-d", files, made);

        string image = _folder.Sparse("disk.img", 32 << 20);
        using ServerProcess server = ServerProcess.Start(_folder, image);
        await Tool.Succeed("nbdcopy", "--flush", made, server.Uri);
        await Tool.Succeed("nbdcopy", server.Uri, _folder.File("back"));
        await Tool.Succeed("e2fsck", "-fn", _folder.File("back"));
        await Tool.Succeed("debugfs", "-R", "dump /f49 " + _folder.File("f49"), _folder.File("back"));
        await Tool.Succeed("cmp", Path.Combine(files, "f49"), _folder.File("f49"));
    }

    /// <summary>Through nbdfuse, which makes the disk a file: mkfs, mount, files, trim, and fsck.</summary>
    [Fact]
    public async Task A_file_system_is_made_and_used_through_nbd()
    {
        string image = _folder.Sparse("disk.img", 64 << 20);
        using ServerProcess server = ServerProcess.Start(_folder, image);
        await FileSystemUse.Run(_folder, server.Uri, make: true);
        Assert.Equal(0, server.Stop());
        await Tool.Succeed("e2fsck", "-fn", image);
        string listing = await Tool.Succeed("debugfs", "-R", "ls /", image);
        Assert.Contains("f19", listing, StringComparison.Ordinal);
        Assert.DoesNotContain(" f3 ", listing, StringComparison.Ordinal);
    }

    [Fact]
    public async Task Oldstyle_serves_qemu_and_libnbd()
    {
        Need("qemu-img", "qemu-utils");
        string image = _folder.Random("disk.img", 4 << 20);
        int port = ServerProcess.FreePort();
        string socket = _folder.File("s");
        string number = port.ToString(CultureInfo.InvariantCulture);
        using ServerProcess server = ServerProcess.Start(
            socket, ["--target", "--oldstyle", "--unix", socket, "--lport", number, image]);
        await Tool.Succeed("qemu-img", "compare", "-f", "raw", "-F", "raw", image, $"nbd:localhost:{port}");
        string info = await Tool.Succeed("nbdinfo", server.Uri);
        Assert.Contains("oldstyle", info, StringComparison.Ordinal);
        await Tool.Succeed("nbdcopy", server.Uri, _folder.File("back"));
        await Tool.Succeed("cmp", image, _folder.File("back"));
    }

    [Fact]
    public async Task Nbd_client_lists_the_export()
    {
        Need("nbd-client", "nbd-client");
        string image = _folder.Sparse("disk.img", 1 << 20);
        int port = ServerProcess.FreePort();
        string socket = _folder.File("s");
        string number = port.ToString(CultureInfo.InvariantCulture);
        using ServerProcess server = ServerProcess.Start(
            socket, ["--target", "--export-name", "golden", "--unix", socket, "--lport", number, image]);
        string list = await Tool.Succeed("nbd-client", "-l", "localhost", number);
        Assert.Contains("golden", list, StringComparison.Ordinal);
    }
}
