using System.Net;
using Xnbd.Protocol;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>
/// What a reply holds does not change after it has been sent, because of a request on other bytes. One client asks for
/// data, and does not take them yet; another one discards or zeroes a part of a block, between which and its neighbours
/// the file system (XFS above all) makes no difference in memory.
/// </summary>
public sealed class SharedPagesTests : IDisposable
{
    private const int Length = 8 << 20, Read = 512 << 10, Sector = 512;

    private readonly TempFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [Theory]
    [InlineData("xfs", 4096, "--target")]
    [InlineData("xfs", 16384, "--target")]
    [InlineData("xfs", 16384, "--cow-target")]
    [InlineData("ext4", 4096, "--target")]
    [InlineData("btrfs", 4096, "--target")]
    public async Task A_reply_that_was_sent_does_not_change(string kind, int block, string mode)
    {
        string[] options = kind == "xfs" ? [$"-bsize={block}"] : [];
        using LoopMount mount = await LoopMount.Create(_folder, kind, 512 << 20, options);
        byte[] bytes = File.ReadAllBytes(_folder.Random("bytes", Length));
        string image = Path.Combine(mount.Path, "image");
        File.WriteAllBytes(image, bytes);
        // Over TCP within one machine no pages are shared, so the server is at the end of a line.
        (NetworkNamespace? line, string? reason) = await NetworkNamespace.TryCreate();
        Skip.Unless(line is not null, reason ?? "");
        using NetworkNamespace network = line!;
        const int port = 8520;
        var address = new IPEndPoint(IPAddress.Parse(network.Address), port);
        string socket = _folder.File("s");
        string[] layer = mode == "--target" ? [] : ["--cow-layer", Path.Combine(mount.Path, "layer")];
        string[] listen = ["--unix", socket, "--laddr", network.Address, "--lport", $"{port}"];
        using ServerProcess server = ServerProcess.StartCommand(
            socket, [.. network.Prefix, ServerProcess.Executable, mode, .. listen, .. layer, image]);
        using NbdTestClient changer = server.Open();
        if (mode != "--target") // all of it is in the layer
            Assert.Equal(NbdError.None, changer.Write(0, bytes));

        foreach (bool isTcp in (bool[])[false, true])
        {
            foreach ((NbdCommand command, NbdCommandFlags flags) in ((NbdCommand, NbdCommandFlags)[])
                [(NbdCommand.Trim, 0), (NbdCommand.WriteZeroes, 0), (NbdCommand.WriteZeroes, NbdCommandFlags.NoHole)])
            {
                foreach (int length in (int[])[Sector, 4096])
                {
                    using NbdTestClient reader = isTcp ? NbdTestClient.Connect(address) : NbdTestClient.Connect(socket);
                    reader.Start();
                    reader.Enter();
                    ulong cookie = reader.SendRequest(NbdCommand.Read, 0, Read);
                    Wait.Until(() => reader.Socket.Available > 32 << 10, "a part of the reply has arrived");
                    var touched = new List<int>();
                    for (int offset = block; offset < Read; offset += 4 * block)
                    {
                        touched.Add(offset + (length == Sector ? 1024 : 0));
                        Assert.Equal(NbdError.None, changer.Try(command, (ulong)touched[^1], (uint)length, flags));
                    }

                    var chunks = new List<Reply>();
                    do
                    {
                        chunks.Add(reader.ReceiveReply());
                        Assert.Equal(cookie, chunks[^1].Cookie);
                    }
                    while (!chunks[^1].IsLast);
                    byte[] seen = NbdTestClient.Assemble(chunks, 0, Read);
                    foreach (int offset in touched) // its own bytes may have been seen before or after
                        bytes.AsSpan(offset, length).CopyTo(seen.AsSpan(offset));
                    Assert.True(
                        seen.AsSpan().SequenceEqual(bytes.AsSpan(0, Read)),
                        $"{command} {flags} of {length} bytes changed others, over "
                            + (isTcp ? "TCP" : "a Unix socket"));
                    Assert.Equal(NbdError.None, changer.Write(0, bytes[..Read]));
                }
            }
        }

        Assert.Equal(bytes, changer.Read(0, Length));
    }
}
