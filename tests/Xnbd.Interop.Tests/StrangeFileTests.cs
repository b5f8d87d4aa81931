using System.Diagnostics;
using Xnbd.Protocol;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>
/// Files that are not what their names promise: FIFOs, links, formats of others. Nothing hangs, and nothing of others
/// is lost.
/// </summary>
public sealed class StrangeFileTests : IDisposable
{
    private readonly TempFolder _folder = new();
    private readonly string _image;

    public StrangeFileTests() => _image = _folder.Random("disk.img", 1 << 20);

    public void Dispose() => _folder.Dispose();

    private async Task<string> Fifo(string name)
    {
        await Tool.Succeed("mkfifo", _folder.File(name));
        return _folder.File(name);
    }

    private static void StopsAt(ServerProcess server, string line)
        => Wait.Until(() => server.Log.Contains(line, StringComparison.Ordinal), line);

    [Fact]
    public async Task Files_with_the_names_of_leftovers_are_left_alone()
    {
        string precious = _folder.Random("precious", 1000);
        byte[] before = File.ReadAllBytes(precious);
        string[] strange =
        [
            await Fifo("disk.img.snapshot.1.partial"), await Fifo("disk.img.cow0.layer1"),
            _folder.File("disk.img.snapshot.2.partial"), _folder.File("disk.img.cow1.layer1"),
            _folder.File("disk.img.snapshot.3.partial"), _folder.File("disk.img.cow2.layer1"),
        ];
        foreach (string link in strange[2..4])
            File.CreateSymbolicLink(link, precious);
        foreach (string link in strange[4..])
            File.CreateSymbolicLink(link, _folder.File("absent"));

        using (ServerProcess server = ServerProcess.Start(_folder, _image))
        {
            server.Signal(10);
            StopsAt(server, "snapshot complete");
            Assert.Equal(0, server.Stop());
        }

        using (ServerProcess server = ServerProcess.StartMode("--cow-target", _folder, _image))
        {
            Assert.True(File.Exists(_folder.File("disk.img.cow3.layer1")));
            using NbdTestClient client = server.Open();
            Assert.Equal(NbdError.None, client.Write(0, new byte[4096]));
        }

        Assert.Equal(before, File.ReadAllBytes(precious));
        Assert.False(File.Exists(_folder.File("absent")));
        string[] present = Directory.GetFileSystemEntries(_folder.Path);
        Assert.All(strange, path => Assert.Contains(path, present));
    }

    [Fact]
    public async Task A_fifo_is_refused_at_once_wherever_a_file_is_named()
    {
        string fifo = await Fifo("fifo"), layer = _folder.File("layer");
        using (ServerProcess.StartMode("--cow-target", _folder, _image, "--cow-layer", layer))
        {
        }

        using ServerProcess remote = ServerProcess.Start(_folder, _image, "--readonly");
        string from = "unix:" + remote.SocketPath;
        string[] unix = ["--unix", _folder.File("u")];
        foreach (string[] args in (string[][])[
            ["--target", fifo], ["--target", "--readonly", fifo], ["--cow-target", fifo],
            ["--cow-target", "--cow-layer", layer, fifo],
            ["--cow-target", "--cow-layer", fifo, _image], ["--cow-target", "--readonly", "--cow-layer", fifo, _image],
            ["--cow-target", "--cow-layer", fifo, "--cow-layer", layer, _image],
            ["--target", "--logpath", fifo, "--readonly", _image],
            ["--proxy", from, "-", fifo, _folder.File("m"), _folder.File("c")],
            ["--proxy", from, "-", _folder.File("i"), fifo, _folder.File("c")]])
        {
            ToolResult refused = await Tool.Run("timeout", ["20", ServerProcess.Executable, .. unix, .. args]);
            Assert.True(refused.ExitCode == 1, $"{string.Join(' ', args)}: {refused.ExitCode} {refused.Errors}");
            Assert.Matches(
                "neither a regular file nor a block device|no regular file|that nobody reads", refused.Errors);
        }

        foreach (string[] args in (string[][])[
            ["info", fifo], ["commit", fifo], ["discard", fifo], ["diff", fifo], ["export", fifo, _folder.File("o")],
            ["rebase", fifo, _image],
            ["rebase", layer, fifo], ["rebase", layer, fifo, "--base-is-layer"], ["commit", layer, "--base", fifo],
            ["diff", layer, "--base", fifo]])
        {
            ToolResult refused = await Tool.Run("timeout", ["20", Layers.Program, .. args]);
            Assert.True(refused.ExitCode == 1, $"{string.Join(' ', args)}: {refused.ExitCode} {refused.Errors}");
        }

        ToolResult socket = await Tool.Run(ServerProcess.Executable, "--target", remote.SocketPath);
        Assert.Contains("neither a regular file nor a block device", socket.Errors, StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_fifo_that_somebody_reads_takes_the_log()
    {
        string fifo = await Fifo("log");
        using var reader = Process.Start(new ProcessStartInfo("cat", [fifo]) { RedirectStandardOutput = true })!;
        try
        {
            // The server refuses as long as cat has not opened it.
            ServerProcess? server = null;
            Wait.Until(() => (server = TryStart(fifo)) is not null, "the server finds a reader");
            using (server)
            {
                Assert.Contains(
                    "serving",
                    await reader.StandardOutput.ReadLineAsync() + await reader.StandardOutput.ReadLineAsync(),
                    StringComparison.Ordinal);
                for (int i = 0; i < 2000; i++)
                    server!.Open().Dispose(); // far more than the pipe holds
                Assert.Equal(0, server!.Stop());
            }
        }
        finally
        {
            reader.Kill();
        }

        ServerProcess? TryStart(string log)
        {
            try
            {
                return ServerProcess.Start(_folder, _image, "--logpath", log);
            }
            catch (InvalidOperationException)
            {
                return null;
            }
        }
    }

    public static TheoryData<string, string> Formats => new()
    {
        { "qcow2", "qcow2" }, { "qcow", "qcow" }, { "vmdk", "vmdk" },
        { "vmdk -o subformat=twoGbMaxExtentSparse", "vmdk" }, { "vhdx", "vhdx" },
        { "vdi", "vdi" }, { "vpc", "vpc" }, { "vpc -o subformat=fixed", "vpc" }, { "qed", "qed" },
        { "parallels", "parallels" },
    };

    [Theory]
    [MemberData(nameof(Formats))]
    public async Task A_file_in_a_format_of_its_own_gets_a_warning(string make, string format)
    {
        string image = _folder.File("foreign.img");
        ToolResult made = await Tool.Run("qemu-img", ["create", "-q", "-f", .. make.Split(' '), image, "8M"]);
        Assert.SkipUnless(made.ExitCode == 0, $"this qemu-img does not make {make}: {made.Errors}");
        string warning = $"'{image}' looks like a {format} image; it is served as raw bytes";
        foreach (string mode in (string[])["--target", "--cow-target"])
        {
            using (ServerProcess server = ServerProcess.StartMode(mode, _folder, image))
                StopsAt(server, warning);
            using ServerProcess meant = ServerProcess.StartMode(mode, _folder, image, "--format", "raw");
            StopsAt(meant, "serving");
            Assert.DoesNotContain("looks like", meant.Log, StringComparison.Ordinal);
        }
    }

    [Fact]
    public void An_empty_file_gets_a_warning_and_a_raw_one_gets_none()
    {
        using (ServerProcess server = ServerProcess.Start(_folder, _folder.Sparse("empty.img", 0)))
            StopsAt(server, "is empty: clients see a disk of 0 bytes");
        foreach (int size in (int[])[1, 100, 511, 512, 1 << 20])
        {
            using ServerProcess server = ServerProcess.Start(_folder, _folder.Random($"{size}.img", size));
            StopsAt(server, "serving");
            Assert.DoesNotContain("raw", server.Log, StringComparison.Ordinal);
        }
    }
}
