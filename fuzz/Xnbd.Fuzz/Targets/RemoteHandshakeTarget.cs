using Xnbd.Client;
using Xnbd.Protocol;

namespace Xnbd.Fuzz.Targets;

/// <summary>All that a server can send to our client during the handshake. The input is the server's stream.</summary>
public sealed class RemoteHandshakeTarget : FuzzTarget
{
    private static readonly TimeSpan s_timeout = TimeSpan.FromSeconds(30);

    private readonly LyingServer _server = new();

    /// <inheritdoc/>
    public override void Run(byte[] input)
    {
        Task served = _server.Serve(input);
        using var broken = new ManualResetEventSlim();
        try
        {
            RemoteConnection connection = RemoteConnection.Connect(
                _server.Address, s_timeout, () => { }, (_, _, left) => End(left, broken), TimeProvider.System);
            NbdExportInfo export = connection.Export;
            connection.Dispose();
            broken.Wait();
            Check.That(export.Length <= long.MaxValue, "an export has a possible length");
            Check.That((export.Flags & NbdTransmissionFlags.HasFlags) != 0, "an export has flags");
            bool arePossible = export.MinimumBlock > 0 && export.MaximumPayload >= export.MinimumBlock;
            Check.That(arePossible, "block sizes are possible ones");
        }
        catch (RemoteException failure)
        {
            string address = _server.Address.ToString();
            Check.That(failure.Message.StartsWith(address, StringComparison.Ordinal), "a message names the server");
        }

        served.GetAwaiter().GetResult();
    }

    private static void End(List<RemoteRequest> left, ManualResetEventSlim broken)
    {
        Check.That(left.Count == 0, "nothing is handed back that was never requested");
        broken.Set();
    }

    /// <inheritdoc/>
    public override IEnumerable<(string Name, byte[] Input)> Seeds()
    {
        yield return ("no-nbd", new Bytes().Text("SSH-2.0-OpenSSH_9.2p1\r\n").ToArray());
        yield return ("oldstyle", Oldstyle());
        yield return ("newstyle", [.. Greeting(0), .. ExportNameAnswer(noZeroes: false)]);
        yield return ("fixed-no-zeroes", FixedWithoutGo());
        yield return ("simple", SimpleHandshake());
        yield return ("structured", StructuredHandshake());
        yield return ("refused", new Bytes().Raw(Greeting(3))
            .Raw(Reply(NbdOption.StructuredReply, NbdOptionReplyType.ErrUnsupported))
            .Raw(Reply(NbdOption.Go, NbdOptionReplyType.ErrUnknown, "no such export"u8))
            .ToArray());
        yield return ("tls-required", new Bytes().Raw(Greeting(3))
            .Raw(Reply(NbdOption.StructuredReply, NbdOptionReplyType.ErrTlsRequired))
            .Raw(Reply(NbdOption.Go, NbdOptionReplyType.ErrTlsRequired))
            .ToArray());
    }

    /// <summary>A handshake without faults, without structured replies.</summary>
    internal static byte[] SimpleHandshake() => new Bytes().Raw(Greeting(3))
        .Raw(Reply(NbdOption.StructuredReply, NbdOptionReplyType.ErrUnsupported))
        .Raw(Reply(NbdOption.Go, NbdOptionReplyType.Info, InfoExport()))
        .Raw(Reply(NbdOption.Go, NbdOptionReplyType.Ack))
        .ToArray();

    /// <summary>A handshake without faults, with structured replies and <c>base:allocation</c> under the id
    /// 5.</summary>
    internal static byte[] StructuredHandshake() => new Bytes().Raw(Greeting(3))
        .Raw(Reply(NbdOption.StructuredReply, NbdOptionReplyType.Ack))
        .Raw(Reply(NbdOption.SetMetaContext, NbdOptionReplyType.MetaContext, Allocation()))
        .Raw(Reply(NbdOption.SetMetaContext, NbdOptionReplyType.Ack))
        .Raw(Reply(NbdOption.Go, NbdOptionReplyType.Info, InfoExport()))
        .Raw(Reply(NbdOption.Go, NbdOptionReplyType.Info, NbdHandshake.InfoBlockSize(1, 4096, 1 << 25)))
        .Raw(Reply(NbdOption.Go, NbdOptionReplyType.Ack))
        .ToArray();

    private static byte[] Oldstyle()
    {
        byte[] greeting = new byte[NbdSize.OldstyleGreeting];
        NbdHandshake.WriteOldstyleGreeting(greeting, 1 << 20, NbdTransmissionFlags.HasFlags);
        return greeting;
    }

    private static byte[] FixedWithoutGo() => new Bytes().Raw(Greeting(3))
        .Raw(Reply(NbdOption.StructuredReply, NbdOptionReplyType.ErrUnsupported))
        .Raw(Reply(NbdOption.Go, NbdOptionReplyType.ErrUnsupported))
        .Raw(ExportNameAnswer(noZeroes: true))
        .ToArray();

    private static byte[] Greeting(int flags)
        => new Bytes().U64(NbdMagic.Init).U64(NbdMagic.Option).U16(flags).ToArray();

    private static byte[] InfoExport() => NbdHandshake.InfoExport(1 << 20, NbdTransmissionFlags.HasFlags);

    private static byte[] Allocation() => NbdHandshake.MetaContext(5, "base:allocation");

    private static byte[] ExportNameAnswer(bool noZeroes)
    {
        byte[] answer = new byte[10 + NbdSize.ReservedZeroes];
        int length = NbdHandshake.WriteExportNameAnswer(answer, 1 << 20, NbdTransmissionFlags.HasFlags, noZeroes);
        return answer[..length];
    }

    private static byte[] Reply(NbdOption option, NbdOptionReplyType type, ReadOnlySpan<byte> data = default)
    {
        byte[] reply = new byte[NbdSize.OptionReplyHeader + data.Length];
        NbdHandshake.WriteOptionReply(reply, option, type, data);
        return reply;
    }
}
