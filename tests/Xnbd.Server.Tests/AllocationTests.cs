using System.Net.Sockets;
using Xnbd.Protocol;
using Xnbd.Storage.Images;
using Xnbd.TestKit;

namespace Xnbd.Server.Tests;

/// <summary>Alone in the process at its time: it counts what the whole process allocates.</summary>
[CollectionDefinition(nameof(AllocationTests), DisableParallelization = true)]
[Collection(nameof(AllocationTests))]
public class AllocationTests
{
    [Theory]
    [InlineData(NbdCommand.Read, 4096, NbdCommandFlags.None)] // copied, on the session's thread
    [InlineData(NbdCommand.Read, 256 * 1024, NbdCommandFlags.None)] // from the file
    [InlineData(NbdCommand.Write, 4096, NbdCommandFlags.None)] // in a batch
    [InlineData(NbdCommand.Write, 256 * 1024, NbdCommandFlags.None)] // in a buffer of its own
    [InlineData(NbdCommand.Write, 4096, NbdCommandFlags.Fua)] // on a disk thread
    [InlineData(NbdCommand.Flush, 0, NbdCommandFlags.None)]
    public void A_steady_load_allocates_nothing(NbdCommand command, int length, NbdCommandFlags flags)
    {
        const int depth = 8, warmUp = 300, rounds = 1000;
        using var folder = new TempFolder("/dev/shm");
        using var server = new ServerFixture(ImageFile.Open(folder.Random("image", 4 << 20), readOnly: false));
        using NbdTestClient client = server.Open();
        bool isWrite = command == NbdCommand.Write;
        int requestLength = NbdSize.Request + (isWrite ? length : 0);
        byte[] batch = new byte[depth * requestLength];
        for (int i = 0; i < depth; i++)
            new NbdRequest(flags, command, (ulong)i, 4096, (uint)length).Write(batch.AsSpan(i * requestLength));

        // A reply is of a known length: a simple one, or for a read the data's chunk, and for a large one its end's.
        int replyLength = command != NbdCommand.Read ? NbdSize.SimpleReply
            : NbdSize.StructuredReply + 8 + length + (length > 32 * 1024 ? NbdSize.StructuredReply : 0);
        byte[] replies = new byte[depth * replyLength];
        Socket socket = client.Socket;

        for (int i = 0; i < warmUp; i++)
            RoundTrip();
        long before = GC.GetTotalAllocatedBytes(precise: true);
        for (int i = 0; i < rounds; i++)
            RoundTrip();
        long allocated = GC.GetTotalAllocatedBytes(precise: true) - before;

        // Less than a byte for each request: what little there is comes from the runtime's own threads.
        Assert.InRange(allocated, 0, depth * rounds);

        void RoundTrip()
        {
            int sent = 0, received = 0;
            while (received < replies.Length)
            {
                if (sent < batch.Length && socket.Poll(0, SelectMode.SelectWrite))
                    sent += socket.Send(batch.AsSpan(sent, Math.Min(65536, batch.Length - sent)));
                if (sent == batch.Length || socket.Poll(0, SelectMode.SelectRead))
                    received += socket.Receive(replies.AsSpan(received));
            }
        }
    }
}
