using Xnbd.Protocol;
using Xnbd.Server;

namespace Xnbd.Fuzz.Targets;

/// <summary>
/// All that a client can send after it has connected. The first byte of the input chooses the server: bit 0 the old
/// style, bit 1 a disk that is read-only. The rest is the client's stream.
/// </summary>
public sealed class HandshakeTarget : FuzzTarget
{
    private const byte Oldstyle = 1, ReadOnly = 2;

    private readonly Dictionary<int, ServedConnection> _servers = [];

    /// <inheritdoc/>
    public override void Run(byte[] input)
    {
        if (input.Length == 0)
            return;
        bool isOldstyle = (input[0] & Oldstyle) != 0, isReadOnly = (input[0] & ReadOnly) != 0;
        if (!_servers.TryGetValue(input[0] & (Oldstyle | ReadOnly), out ServedConnection? connection))
        {
            HandshakeStyle style = isOldstyle ? HandshakeStyle.Oldstyle : HandshakeStyle.FixedNewstyle;
            connection = new ServedConnection(isReadOnly, style);
            _servers[input[0] & (Oldstyle | ReadOnly)] = connection;
        }

        byte[] fromClient = input[1..];
        var client = new ByteReader(fromClient);
        var server = new ByteReader(connection.Run(fromClient));
        var handshake = new HandshakeCheck(client, server);
        if ((isOldstyle ? handshake.RunOldstyle() : handshake.Run()) is not { } agreement)
            return;
        var model = new RequestModel(client, agreement, isReadOnly);
        new ReplyCheck(agreement, model.Replies).Run(server);
        connection.CheckDisk(model);
    }

    /// <inheritdoc/>
    public override IEnumerable<(string Name, byte[] Input)> Seeds()
    {
        yield return ("export-name", New(flags: 1)
            .Raw(Option(NbdOption.ExportName, "disk"u8))
            .Raw(Request(NbdCommand.Flush))
            .ToArray());
        yield return ("export-name-unknown", New(flags: 3).Raw(Option(NbdOption.ExportName, "other"u8)).ToArray());
        yield return ("list-abort", New().Raw(Option(NbdOption.List)).Raw(Option(NbdOption.Abort)).ToArray());
        yield return ("info-all", New().Raw(Option(NbdOption.Info, Info("disk", 0, 1, 2, 3))).ToArray());
        yield return ("info-unknown", New()
            .Raw(Option(NbdOption.Go, Info("other")))
            .Raw(Option(NbdOption.Go, Info("")))
            .ToArray());
        yield return ("go", New()
            .Raw(Option(NbdOption.Go, Info("", 3)))
            .Raw(Request(NbdCommand.Read, 12200, 500))
            .ToArray());
        yield return ("structured", New()
            .Raw(Option(NbdOption.StructuredReply))
            .Raw(Option(NbdOption.ListMetaContext, Contexts("disk")))
            .Raw(Option(NbdOption.SetMetaContext, Contexts("disk", "base:allocation", "qemu:allocation-depth")))
            .Raw(Option(NbdOption.Go, Info("disk")))
            .Raw(Request(NbdCommand.BlockStatus, 0, 65536))
            .ToArray());
        yield return ("contexts-too-early", New()
            .Raw(Option(NbdOption.SetMetaContext, Contexts("", "base:")))
            .ToArray());
        yield return ("unknown-options", New()
            .Raw(Option(NbdOption.StartTls))
            .Raw(Option(NbdOption.ExtendedHeaders))
            .Raw(Option((NbdOption)77, "data"u8))
            .ToArray());
        yield return ("too-much-data", New().U64(NbdMagic.Option).U32((uint)NbdOption.List).U32(70000).ToArray());
        yield return ("oldstyle", new Bytes().U8(Oldstyle)
            .Raw(Request(NbdCommand.Read, 0, 512))
            .Raw(Request(NbdCommand.Write, 100_000, 4)).Text("data")
            .Raw(Request(NbdCommand.Read, 100_000, 4))
            .ToArray());
        yield return ("read-only", new Bytes().U8(Oldstyle | ReadOnly)
            .Raw(Request(NbdCommand.Write, 0, 4)).Text("data")
            .Raw(Request(NbdCommand.Disconnect))
            .ToArray());
    }

    /// <summary>The start of a client of the new style.</summary>
    private static Bytes New(uint flags = 3) => new Bytes().U8(0).U32(flags);

    /// <summary>An option with its data.</summary>
    internal static byte[] Option(NbdOption option, ReadOnlySpan<byte> data = default)
        => NbdClientHandshake.Option(option, data);

    /// <summary>The data of an option that asks for information.</summary>
    internal static byte[] Info(string exportName, params int[] kinds)
    {
        Bytes data = new Bytes().U32((uint)exportName.Length).Text(exportName).U16(kinds.Length);
        foreach (int kind in kinds)
            data.U16(kind);
        return data.ToArray();
    }

    /// <summary>The data of an option that selects or lists metadata contexts.</summary>
    internal static byte[] Contexts(string exportName, params string[] queries)
    {
        Bytes data = new Bytes().U32((uint)exportName.Length).Text(exportName).U32((uint)queries.Length);
        foreach (string query in queries)
            data.U32((uint)query.Length).Text(query);
        return data.ToArray();
    }

    /// <summary>The header of a request.</summary>
    internal static byte[] Request(
        NbdCommand command, ulong offset = 0, uint length = 0, NbdCommandFlags flags = 0, ulong cookie = 1)
    {
        byte[] bytes = new byte[NbdSize.Request];
        new NbdRequest(flags, command, cookie, offset, length).Write(bytes);
        return bytes;
    }
}
