using System.Diagnostics;
using System.Net.Sockets;
using Xnbd.Protocol;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>
/// Several servers on one image: who excludes whom, who is named, and what is promised to clients that have several
/// connections.
/// </summary>
public sealed class SharingTests : IDisposable
{
    private const int Size = 4 << 20;

    private readonly TempFolder _folder = new();
    private readonly string _image;

    public SharingTests() => _image = _folder.Random("disk.img", Size);

    public void Dispose() => _folder.Dispose();

    private ServerProcess Target(params string[] options) => ServerProcess.Start(_folder, _image, options);

    private string Refusal(params string[] options)
        => Assert.Throws<InvalidOperationException>(() => Target(options).Dispose()).Message;

    [Fact]
    public void A_second_writer_is_refused_and_told_who_the_first_one_is()
    {
        using ServerProcess first = Target();
        string refusal = Refusal();
        Assert.Contains(
            $"'{_image}' is in use by xnbd-server (process {first.Id}): another program writes it",
            refusal,
            StringComparison.Ordinal);
        Assert.Contains("--share-image", refusal, StringComparison.Ordinal);
        // it was not asked
        Assert.Contains("tolerates no other writer", Refusal("--share-image"), StringComparison.Ordinal);
        using ServerProcess reader = Target("--readonly");
        first.Kill();
        using ServerProcess next = Target(); // the reader is in nobody's way
    }

    [Fact]
    public void Who_means_it_shares_the_image_with_those_who_mean_it_too()
    {
        using ServerProcess first = Target("--share-image"), second = Target("--share-image");
        string refusal = Refusal();
        Assert.Contains("another program writes it", refusal, StringComparison.Ordinal);
        Assert.Matches($@"\(process ({first.Id}|{second.Id})\)", refusal);
        using NbdTestClient one = first.Open(), other = second.Open();
        Assert.Equal(NbdError.None, one.Write(5, [1, 2, 3]));
        Assert.Equal([1, 2, 3], other.Read(5, 3));
    }

    [Fact]
    public void Of_those_who_start_at_the_same_moment_one_serves()
    {
        for (int round = 0; round < 20; round++)
        {
            var started = new List<(Process Process, string Socket)>();
            for (int i = 0; i < 4; i++)
            {
                string socket = _folder.File($"r{round}.{i}");
                started.Add((Process.Start(new ProcessStartInfo(
                    ServerProcess.Executable, ["--target", "--unix", socket, _image])
                { RedirectStandardError = true })!, socket));
            }

            try
            {
                Wait.Until(
                    () => started.Count(s => s.Process.HasExited) >= 3
                        && started.All(s => s.Process.HasExited || ServerProcess.Listens(s.Socket)),
                    "three were refused");
                Assert.Equal(1, started.Count(s => !s.Process.HasExited));
            }
            finally
            {
                foreach ((Process process, _) in started)
                {
                    if (!process.HasExited)
                        process.Kill();
                    process.WaitForExit();
                    process.Dispose();
                }
            }
        }
    }

    [Fact]
    public async Task Qemu_and_this_program_do_not_write_at_the_same_time()
    {
        Assert.SkipWhen(Tool.Find("qemu-io") is null || Tool.Find("qemu-nbd") is null, "qemu-io or qemu-nbd is absent");
        // it tolerates other writers, as a guest's disk does not
        string[] write = ["-f", "raw", "-c", "write 0 4k", _image];
        using (Target())
        {
            ToolResult refused = await Tool.Run("qemu-io", write);
            Assert.NotEqual(0, refused.ExitCode);
            Assert.Contains("lock", refused.Errors, StringComparison.Ordinal);
        }

        using (Target("--share-image"))
            await Tool.Succeed("qemu-io", write);

        string socket = _folder.File("qemu.sock");
        using var qemu = Process.Start(Tool.Find("qemu-nbd")!, ["-f", "raw", "-k", socket, "-t", _image]);
        try
        {
            Wait.Until(() => ServerProcess.Listens(socket), "qemu-nbd listens");
            Assert.Contains(
                $"is in use by qemu-nbd (process {qemu.Id}): another program writes it",
                Refusal(),
                StringComparison.Ordinal);
            using (Target("--share-image"))
            {
                // Both are meant to share.
            }

            Assert.Contains(
                $"is in use by qemu-nbd (process {qemu.Id}): another program writes it",
                Assert.Throws<InvalidOperationException>(
                    () => ServerProcess.StartMode("--cow-target", _folder, _image)).Message,
                StringComparison.Ordinal);
        }
        finally
        {
            qemu.Kill();
            await qemu.WaitForExitAsync(TestContext.Current.CancellationToken);
        }
    }

    [Fact]
    public async Task The_one_who_is_in_the_way_is_named_for_every_kind_of_file()
    {
        string layer = _folder.File("layer"), cache = _folder.File("cache.img"), map = _folder.File("cache.map");
        using ServerProcess remote = Target("--readonly");
        string[] proxy = ["unix:" + remote.SocketPath, "-", cache, map];
        using (ServerProcess server = ServerProcess.StartMode("--cow-target", _folder, _image, "--cow-layer", layer))
        {
            string who = $"in use by xnbd-server (process {server.Id})";
            Assert.Contains(
                $"'{_image}' is {who}: another program relies on its staying as it is",
                Refusal(),
                StringComparison.Ordinal);
            string[][] works = [["commit", layer], ["discard", layer], ["export", layer, _folder.File("out")]];
            foreach (string[] work in works)
            {
                ToolResult refused = await Tool.Run(Layers.Program, work);
                Assert.Contains($"layer '{layer}' is {who}", refused.Errors, StringComparison.Ordinal);
            }
        }

        using var first = ServerProcess.Start(
            _folder.File("p"), ["--proxy", "--unix", _folder.File("p"), .. proxy, _folder.File("ctl")]);
        ToolResult second = await Tool.Run(
            ServerProcess.Executable, ["--proxy", "--unix", _folder.File("p2"), .. proxy, _folder.File("ctl2")]);
        Assert.Contains(
            $"the map '{map}' is in use by xnbd-server (process {first.Id})", second.Errors, StringComparison.Ordinal);
        ToolResult target = await Tool.Run(ServerProcess.Executable, "--target", "--unix", _folder.File("t"), cache);
        Assert.Contains(
            $"'{cache}' is in use by xnbd-server (process {first.Id})", target.Errors, StringComparison.Ordinal);
        await Tool.Succeed(Path.Combine(ServerProcess.BinFolder, "xnbd-bgctl"), "--cache-all", _folder.File("ctl"));
        await Tool.Succeed(Path.Combine(ServerProcess.BinFolder, "xnbd-bgctl"), "--switch", _folder.File("ctl"));
        // it is a target like any other now
        target = await Tool.Run(ServerProcess.Executable, "--target", "--unix", _folder.File("t"), cache);
        Assert.Contains($"(process {first.Id}): another program writes it", target.Errors, StringComparison.Ordinal);
    }

    /// <summary>Servers of one connection each, as a super-server starts them.</summary>
    private sealed class SuperServer : IDisposable
    {
        private readonly string _socket;
        private readonly Process _process;

        /// <param name="folder">Where its socket is.</param>
        /// <param name="args">The arguments of the server.</param>
        public SuperServer(TempFolder folder, params string[] args)
        {
            const string program = """
                import socket, subprocess, sys
                s = socket.socket(socket.AF_UNIX)
                s.bind(sys.argv[1])
                s.listen()
                children = []
                try:
                    while True:
                        c, _ = s.accept()
                        children.append(subprocess.Popen(sys.argv[2:], stdin=c, stdout=c, stderr=subprocess.DEVNULL))
                        c.close()
                except KeyboardInterrupt:
                    pass
                """;
            _socket = folder.File("super" + Guid.NewGuid().ToString("N")[..6]);
            _process = Process.Start("python3", ["-c", program, _socket, ServerProcess.Executable, .. args]);
            Wait.Until(() => File.Exists(_socket), "the super-server listens");
        }

        public string Uri => $"nbd+unix:///?socket={_socket}";

        public NbdTestClient Open()
        {
            NbdTestClient? client = null;
            Wait.Until(() =>
            {
                try
                {
                    client = NbdTestClient.Open(_socket);
                    return true;
                }
                catch (SocketException failure) when (failure.SocketErrorCode == SocketError.ConnectionRefused)
                {
                    return false; // its file is there before it listens
                }
            }, "it takes the connection");
            return client!;
        }

        public void Dispose()
        {
            if (!_process.HasExited)
                _process.Kill();
            _process.WaitForExit();
            _process.Dispose();
        }
    }

    private static bool IsMultiConn(NbdTestClient client) => (client.Flags & NbdTransmissionFlags.CanMultiConn) != 0;

    [Theory]
    [InlineData(true, "--target")]
    [InlineData(true, "--target", "--readonly")]
    [InlineData(false, "--cow-target")]
    [InlineData(false, "--cow-target", "--cow-layer", "LAYER")]
    [InlineData(false, "--cow-target", "--readonly")]
    public void A_server_of_one_connection_promises_for_several_what_holds(bool promises, params string[] args)
    {
        args = [.. args.Select(arg => arg == "LAYER" ? _folder.File("layer") : arg)];
        using (ServerProcess listening = ServerProcess.StartMode(args[0], _folder, _image, args[1..]))
        {
            using NbdTestClient client = listening.Open();
            Assert.True(IsMultiConn(client)); // all its connections see one disk, in every mode
        }

        using var super = new SuperServer(_folder, [.. args, "--inetd", _image]);
        using NbdTestClient single = super.Open();
        Assert.Equal(promises, IsMultiConn(single));
    }

    [Fact]
    public void A_proxy_of_one_connection_promises_nothing_for_several()
    {
        using ServerProcess remote = Target("--readonly");
        using var super = new SuperServer(
            _folder,
            "--proxy",
            "--inetd",
            "unix:" + remote.SocketPath,
            "-",
            _folder.File("cache.img"),
            _folder.File("cache.map"),
            _folder.File("ctl"));
        using NbdTestClient client = super.Open();
        Assert.False(IsMultiConn(client));
    }

    [Fact]
    public async Task A_flush_in_one_process_covers_what_another_one_has_written()
    {
        // The image is a device: what has not been synced is in its page cache, and not in the file behind it.
        using LoopDevice device = await LoopDevice.Attach(_image);
        using var super = new SuperServer(_folder, "--target", "--inetd", device.Path);
        using NbdTestClient writer = super.Open(), other = super.Open();
        Assert.True(IsMultiConn(writer) && IsMultiConn(other));
        bool wasUnsynced = false;
        for (byte i = 1; i <= 20; i++)
        {
            byte[] data = [.. Enumerable.Repeat(i, 4096)];
            Assert.Equal(NbdError.None, writer.Write(i * 65536u, data));
            wasUnsynced |= !Behind(i).SequenceEqual(data); // the kernel may have written it back by itself
            Assert.Equal(data, other.Read(i * 65536u, 4096));
            Assert.Equal(NbdError.None, other.Try(NbdCommand.Flush, 0, 0));
            Assert.Equal(data, Behind(i));
        }

        Assert.True(wasUnsynced, "the test tests nothing");

        byte[] Behind(int number) => File.ReadAllBytes(_image)[(number * 65536)..((number * 65536) + 4096)];
    }

    [Fact]
    public async Task A_copy_over_several_processes_is_whole()
    {
        Assert.SkipWhen(Tool.Find("nbdcopy") is null, "nbdcopy is absent");
        string target = _folder.Sparse("target.img", Size);
        using (var super = new SuperServer(_folder, "--target", "--inetd", target))
        {
            using (super.Open())
                await Tool.Succeed("nbdcopy", "--connections=4", "--flush", _image, super.Uri);
        }

        await Tool.Succeed("cmp", _image, target);

        // With layers, which go with their connections: one connection, so what it reads back is what it wrote.
        using var layers = new SuperServer(_folder, "--cow-target", "--inetd", _folder.Sparse("golden.img", Size));
        using (layers.Open())
            Assert.Contains(
                "can_multi_conn: false", await Tool.Succeed("nbdinfo", layers.Uri), StringComparison.Ordinal);
    }
}
