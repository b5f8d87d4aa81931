using Xnbd.Protocol;
using Xnbd.Server;

namespace Xnbd.Fuzz.Targets;

/// <summary>
/// All that a client can send in the transmission phase. The first byte of the input chooses what a handshake without
/// faults agrees on: bit 0 structured replies, bit 1 metadata contexts, bit 2 a disk that is read-only; bit 3 lets 100
/// KiB
/// follow the rest of the input, as the payload of a large write. The rest is the client's stream.
/// </summary>
public sealed class RequestTarget : FuzzTarget
{
    private const byte Structured = 1, Contexts = 2, ReadOnly = 4, Tail = 8;

    private static readonly byte[] s_tail = [.. Enumerable.Range(0, 100 * 1024).Select(i => (byte)(i / 100))];

    private readonly ServedConnection _writable = new(isReadOnly: false, HandshakeStyle.FixedNewstyle);
    private readonly ServedConnection _readOnly = new(isReadOnly: true, HandshakeStyle.FixedNewstyle);

    /// <inheritdoc/>
    public override void Run(byte[] input)
    {
        if (input.Length == 0)
            return;
        byte variant = input[0];
        Bytes stream = new Bytes().U32((uint)NbdClientFlags.Known);
        if ((variant & Structured) != 0)
            stream.Raw(HandshakeTarget.Option(NbdOption.StructuredReply));
        if ((variant & Contexts) != 0)
        {
            byte[] contexts = HandshakeTarget.Contexts("", "base:allocation", "qemu:allocation-depth");
            stream.Raw(HandshakeTarget.Option(NbdOption.SetMetaContext, contexts));
        }

        stream.Raw(HandshakeTarget.Option(NbdOption.Go, HandshakeTarget.Info(""))).Raw(input.AsSpan(1));
        if ((variant & Tail) != 0)
            stream.Raw(s_tail);

        bool isReadOnly = (variant & ReadOnly) != 0;
        ServedConnection connection = isReadOnly ? _readOnly : _writable;
        byte[] fromClient = stream.ToArray();
        var client = new ByteReader(fromClient);
        var server = new ByteReader(connection.Run(fromClient));
        ExpectedAgreement? agreement = new HandshakeCheck(client, server).Run();
        Check.That(agreement is not null, "a handshake without faults leads to the transmission phase");
        var model = new RequestModel(client, agreement!, isReadOnly);
        new ReplyCheck(agreement!, model.Replies).Run(server);
        connection.CheckDisk(model);
    }

    /// <inheritdoc/>
    public override IEnumerable<(string Name, byte[] Input)> Seeds()
    {
        foreach ((string name, byte variant) in ((string, byte)[])[("simple", 0), ("structured", Structured)])
        {
            yield return ($"{name}-reads", new Bytes().U8(variant)
                .Raw(Request(NbdCommand.Read, 0, 512, cookie: 1))
                .Raw(Request(NbdCommand.Read, 1000, 40000, cookie: 2))
                .Raw(Request(NbdCommand.Read, FuzzDisk.SlowStart - 100, 200, cookie: 3))
                .Raw(Request(NbdCommand.Read, FuzzDisk.LateStart, 5000, cookie: 4))
                .Raw(Request(NbdCommand.Read, FuzzDisk.Bytes - 5, 5, cookie: 5))
                .ToArray());
            yield return ($"{name}-long-reads", new Bytes().U8(variant)
                .Raw(Request(NbdCommand.Read, 0, FuzzDisk.SlowStart, cookie: 1))
                .Raw(Request(NbdCommand.Read, 10, FuzzDisk.BadStart - 10, cookie: 2))
                .ToArray());
            yield return ($"{name}-errors", new Bytes().U8(variant)
                .Raw(Request(NbdCommand.Read, FuzzDisk.BadStart, 512))
                .Raw(Request(NbdCommand.Read, FuzzDisk.Bytes, 1))
                .Raw(Request(NbdCommand.Read, 0, uint.MaxValue))
                .Raw(Request((NbdCommand)9, 0, 1))
                .Raw(Request(NbdCommand.WriteZeroes, FuzzDisk.SlowStart, 100, NbdCommandFlags.FastZero))
                .ToArray());
            yield return ($"{name}-changes", new Bytes().U8(variant)
                .Raw(Request(NbdCommand.Write, 7, 5)).Text("seven")
                .Raw(Request(NbdCommand.Write, FuzzDisk.LateStart + 1, 4, NbdCommandFlags.Fua, cookie: 2)).Text("late")
                .Raw(Request(NbdCommand.WriteZeroes, 100, 1000, NbdCommandFlags.NoHole))
                .Raw(Request(NbdCommand.Trim, 8192, 4096))
                .Raw(Request(NbdCommand.Flush))
                .Raw(Request(NbdCommand.Cache, 0, 4096))
                .Raw(Request(NbdCommand.Read, 0, 2000))
                .Raw(Request(NbdCommand.Disconnect))
                .ToArray());
            yield return ($"{name}-durable", new Bytes().U8((byte)(variant | Tail))
                .Raw(Request(NbdCommand.Write, 7, 5, NbdCommandFlags.Fua)).Text("seven")
                .Raw(Request(NbdCommand.WriteZeroes, 100, 1000, NbdCommandFlags.Fua))
                .Raw(Request(NbdCommand.Trim, 8192, 4096, NbdCommandFlags.Fua))
                .Raw(Request(NbdCommand.Write, FuzzDisk.BadStart, 4, NbdCommandFlags.Fua)).Text("lost")
                .Raw(Request(NbdCommand.Write, 0, 0, NbdCommandFlags.Fua))
                .Raw(Request(NbdCommand.Read, 0, 512, NbdCommandFlags.Fua))
                .Raw(Request(NbdCommand.Flush, flags: NbdCommandFlags.Fua))
                .Raw(Request(NbdCommand.Write, 0, 90_000, NbdCommandFlags.Fua))
                .ToArray());
            yield return ($"{name}-large-write", new Bytes().U8((byte)(variant | Tail))
                .Raw(Request(NbdCommand.Write, 0, 90_000))
                .ToArray());
            yield return ($"{name}-refused-write", new Bytes().U8((byte)(variant | Tail | ReadOnly))
                .Raw(Request(NbdCommand.Write, 0, 90_000))
                .ToArray());
            yield return ($"{name}-same-cookie", new Bytes().U8(variant)
                .Raw(Request(NbdCommand.Read, FuzzDisk.LateStart, 700, cookie: 9))
                .Raw(Request(NbdCommand.Read, 0, 700, cookie: 9))
                .Raw(Request(NbdCommand.Read, FuzzDisk.LateStart, 300, cookie: 9))
                .ToArray());
        }

        yield return ("block-status", new Bytes().U8(Structured | Contexts)
            .Raw(Request(NbdCommand.BlockStatus, 0, 100_000))
            .Raw(Request(NbdCommand.BlockStatus, 5000, 20000, NbdCommandFlags.ReqOne, cookie: 2))
            .Raw(Request(NbdCommand.Read, 5000, 60000, NbdCommandFlags.Df))
            .ToArray());
        yield return ("no-request", new Bytes().U8(0).Raw(Request(NbdCommand.Flush)).U32(0).ToArray());
    }

    private static byte[] Request(
        NbdCommand command, long offset = 0, uint length = 0, NbdCommandFlags flags = 0, ulong cookie = 1)
        => HandshakeTarget.Request(command, (ulong)offset, length, flags, cookie);
}
