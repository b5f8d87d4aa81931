using System.Buffers.Binary;
using System.Text;
using Xnbd.Protocol;
using Xnbd.Storage;
using Xnbd.TestKit;

namespace Xnbd.Server.Tests;

/// <summary>
/// The rules of the handshake; most have a test for each way in which servers are known to break them.
/// </summary>
public sealed class HandshakeTests : IDisposable
{
    private readonly ServerFixture _server = new();

    public void Dispose() => _server.Dispose();

    private NbdTestClient Started(NbdClientFlags flags = NbdClientFlags.FixedNewstyle | NbdClientFlags.NoZeroes)
    {
        NbdTestClient client = _server.Connect();
        Assert.Equal(NbdHandshakeFlags.FixedNewstyle | NbdHandshakeFlags.NoZeroes, client.Start(flags));
        return client;
    }

    [Fact]
    public void Unknown_client_flags_end_the_connection()
    {
        using NbdTestClient client = Started((NbdClientFlags)4);
        Assert.True(client.IsClosed());
    }

    [Theory]
    [InlineData(0)]
    [InlineData(5000)]
    [InlineData(64 * 1024)]
    public void An_unknown_option_is_refused_after_its_data_and_the_next_one_parses(int dataLength)
    {
        using NbdTestClient client = Started();
        Assert.Equal(NbdOptionReplyType.ErrUnsupported, client.Ask((NbdOption)77, new byte[dataLength])[^1].Type);
        client.Enter();
        Assert.Equal(1u << 20, client.Size);
    }

    [Fact]
    public void Too_much_option_data_is_drained_and_refused()
    {
        using NbdTestClient client = Started();
        Assert.Equal(NbdOptionReplyType.ErrTooBig, client.Ask(NbdOption.Go, new byte[500_000])[^1].Type);
        client.Enter();
    }

    [Theory]
    [InlineData(NbdOption.Go, 0x7fffffffu)]
    [InlineData(NbdOption.List, uint.MaxValue)]
    [InlineData(NbdOption.ExportName, 70_000u)]
    public void Absurd_option_data_ends_the_connection(NbdOption option, uint length)
    {
        using NbdTestClient client = Started();
        client.Send(NbdTestClient.Bytes(b => b.U64(NbdMagic.Option).U32((uint)option).U32(length)));
        Assert.True(client.IsClosed());
    }

    [Fact]
    public void A_wrong_option_magic_ends_the_connection()
    {
        using NbdTestClient client = Started();
        client.Send(NbdTestClient.Bytes(b => b.U64(1).U32(3).U32(0)));
        Assert.True(client.IsClosed());
    }

    [Theory]
    [InlineData(NbdOption.List)]
    [InlineData(NbdOption.StartTls)]
    [InlineData(NbdOption.StructuredReply)]
    [InlineData(NbdOption.ExtendedHeaders)]
    public void An_option_that_takes_no_data_is_refused_with_data(NbdOption option)
    {
        using NbdTestClient client = Started();
        Assert.Equal(NbdOptionReplyType.ErrInvalid, client.Ask(option, [1])[^1].Type);
        client.Enter();
    }

    [Theory]
    [InlineData(NbdOption.StartTls)]
    [InlineData(NbdOption.ExtendedHeaders)]
    public void An_option_that_is_not_supported_is_answered_so(NbdOption option)
    {
        using NbdTestClient client = Started();
        Assert.Equal(NbdOptionReplyType.ErrUnsupported, client.Ask(option)[^1].Type);
    }

    [Theory]
    [InlineData(0)]
    [InlineData(100)]
    public void Abort_is_acknowledged_whatever_its_data(int dataLength)
    {
        using NbdTestClient client = Started();
        Assert.Equal(NbdOptionReplyType.Ack, client.Ask(NbdOption.Abort, new byte[dataLength]).Single().Type);
        Assert.True(client.IsClosed());
    }

    [Fact]
    public void List_names_the_export_with_its_description()
    {
        using NbdTestClient client = Started();
        List<OptionReply> replies = client.Ask(NbdOption.List);
        Assert.Equal([NbdOptionReplyType.Server, NbdOptionReplyType.Ack], replies.Select(r => r.Type));
        Assert.Equal("disk", Encoding.UTF8.GetString(replies[0].Data, 4, 4));
        Assert.Equal("a test's disk", Encoding.UTF8.GetString(replies[0].Data[8..]));
    }

    [Theory]
    [InlineData(NbdClientFlags.FixedNewstyle, 134)]
    [InlineData(NbdClientFlags.FixedNewstyle | NbdClientFlags.NoZeroes, 10)]
    [InlineData(NbdClientFlags.None, 134)]
    public void Export_name_is_followed_by_zeroes_unless_the_client_wants_none(NbdClientFlags flags, int length)
    {
        using NbdTestClient client = Started(flags);
        client.SendOption(NbdOption.ExportName, "disk"u8);
        byte[] answer = client.Receive(length);
        Assert.Equal(1ul << 20, BinaryPrimitives.ReadUInt64BigEndian(answer));
        Assert.Equal(1, answer[9] & 1);
        Assert.All(answer[10..], b => Assert.Equal(0, b));
        Assert.Equal(new byte[100], client.Read(0, 100));
    }

    [Theory]
    [InlineData("nope")]
    [InlineData("\0")]
    public void An_unknown_export_name_ends_the_connection(string name)
    {
        using NbdTestClient client = Started();
        client.SendOption(NbdOption.ExportName, Encoding.UTF8.GetBytes(name));
        Assert.True(client.IsClosed());
    }

    [Theory]
    [InlineData(NbdOption.Info)]
    [InlineData(NbdOption.Go)]
    public void An_unknown_export_is_an_error_and_the_session_goes_on(NbdOption option)
    {
        using NbdTestClient client = Started();
        Assert.Equal(NbdOptionReplyType.ErrUnknown, client.Ask(option, NbdTestClient.InfoQuery("nope"))[^1].Type);
        Assert.Equal(NbdOptionReplyType.ErrInvalid, client.Ask(option, [0, 0, 0, 9, 0, 0])[^1].Type);
        client.Enter(name: "disk");
    }

    [Theory]
    [InlineData("")]
    [InlineData("disk")]
    public void Info_answers_what_was_asked_and_go_says_the_same(string name)
    {
        using NbdTestClient client = Started();
        byte[] query = NbdTestClient.InfoQuery(name, NbdInfo.BlockSize, NbdInfo.Name, (NbdInfo)99, NbdInfo.Description);
        List<OptionReply> info = client.Ask(NbdOption.Info, query);
        List<OptionReply> go = client.Ask(NbdOption.Go, query);
        Assert.Equal(info.Select(r => Convert.ToHexString(r.Data)), go.Select(r => Convert.ToHexString(r.Data)));

        Assert.Equal(NbdOptionReplyType.Ack, info[^1].Type);
        Dictionary<NbdInfo, byte[]> infos = info.SkipLast(1).ToDictionary(r => (NbdInfo)r.Data[1], r => r.Data[2..]);
        Assert.Equal(4, infos.Count);
        Assert.Equal("disk", Encoding.UTF8.GetString(infos[NbdInfo.Name]));
        Assert.Equal("a test's disk", Encoding.UTF8.GetString(infos[NbdInfo.Description]));
        Assert.Equal(NbdTestClient.Bytes(b => b.U32(1).U32(4096).U32(32 << 20)), infos[NbdInfo.BlockSize]);
        Assert.Equal(new byte[10], client.Read(0, 10)); // and no 124 zeroes came before it
    }

    [Fact]
    public void Only_the_information_asked_for_is_sent()
    {
        using NbdTestClient client = Started();
        Assert.Equal(2, client.Ask(NbdOption.Info, NbdTestClient.InfoQuery("")).Count);
    }

    [Theory]
    [InlineData(true)]
    [InlineData(false)]
    public void Df_is_offered_only_with_structured_replies(bool structured)
    {
        using NbdTestClient client = Started();
        client.Enter(structured);
        Assert.Equal(structured, client.Flags.HasFlag(NbdTransmissionFlags.SendDf));
        const NbdTransmissionFlags always = NbdTransmissionFlags.HasFlags | NbdTransmissionFlags.SendFlush
            | NbdTransmissionFlags.SendFua | NbdTransmissionFlags.SendTrim | NbdTransmissionFlags.SendWriteZeroes
            | NbdTransmissionFlags.CanMultiConn | NbdTransmissionFlags.SendCache | NbdTransmissionFlags.SendFastZero;
        Assert.Equal(always, client.Flags & ~NbdTransmissionFlags.SendDf);
    }

    [Fact]
    public void A_read_only_export_offers_no_changes()
    {
        using var server = new ServerFixture(new FaultDisk(new MemoryDisk(4096)) { ReadOnly = true });
        using NbdTestClient client = server.Open();
        Assert.Equal(
            NbdTransmissionFlags.ReadOnly,
            client.Flags & (NbdTransmissionFlags.ReadOnly | NbdTransmissionFlags.SendTrim
                | NbdTransmissionFlags.SendWriteZeroes | NbdTransmissionFlags.SendFastZero));
    }

    [Fact]
    public void Metadata_contexts_need_structured_replies()
    {
        using NbdTestClient client = Started();
        Assert.Equal(
            NbdOptionReplyType.ErrInvalid,
            client.Ask(NbdOption.SetMetaContext, NbdTestClient.MetaQuery("", "base:allocation"))[^1].Type);
        Assert.Equal(
            NbdOptionReplyType.ErrInvalid, client.Ask(NbdOption.ListMetaContext, NbdTestClient.MetaQuery(""))[^1].Type);
    }

    [Theory]
    [InlineData(NbdOption.SetMetaContext, 1, "base:allocation")]
    [InlineData(NbdOption.SetMetaContext, 0)] // no query selects nothing
    [InlineData(NbdOption.SetMetaContext, 0, "base:")] // nor does the wildcard
    [InlineData(NbdOption.SetMetaContext, 1, "qemu:dirty-bitmap:x", "nonsense", "base:allocation")]
    [InlineData(NbdOption.ListMetaContext, 1)] // no query lists all
    [InlineData(NbdOption.ListMetaContext, 1, "base:")]
    [InlineData(NbdOption.ListMetaContext, 0, "base:nope", "x-unknown:")]
    public void Metadata_queries_find_the_contexts_they_name(NbdOption option, int found, params string[] queries)
    {
        using NbdTestClient client = Started();
        client.Ask(NbdOption.StructuredReply);
        List<OptionReply> replies = client.Ask(option, NbdTestClient.MetaQuery("disk", queries));
        Assert.Equal(NbdOptionReplyType.Ack, replies[^1].Type);
        Assert.Equal(found, replies.Count - 1);
        if (found == 1)
        {
            uint id = option == NbdOption.SetMetaContext ? 1u : 0u;
            Assert.Equal(NbdTestClient.Bytes(b => b.U32(id).Raw("base:allocation"u8)), replies[0].Data);
        }
    }

    [Fact]
    public void A_failed_selection_replaces_the_former_one()
    {
        using NbdTestClient client = Started();
        client.Ask(NbdOption.StructuredReply);
        client.Ask(NbdOption.SetMetaContext, NbdTestClient.MetaQuery("", "base:allocation"));
        Assert.Equal(
            NbdOptionReplyType.ErrUnknown,
            client.Ask(NbdOption.SetMetaContext, NbdTestClient.MetaQuery("nope", "base:allocation"))[^1].Type);
        client.Enter();
        Assert.Equal(NbdError.Invalid, client.Try(NbdCommand.BlockStatus, 0, 4096));
    }

    [Fact]
    public void A_selection_of_contexts_is_valid_for_its_export_only()
    {
        using NbdTestClient client = Started();
        client.Ask(NbdOption.StructuredReply);
        client.Ask(NbdOption.SetMetaContext, NbdTestClient.MetaQuery("disk", "base:allocation"));
        client.Enter(name: "");
        Assert.Equal(NbdError.Invalid, client.Try(NbdCommand.BlockStatus, 0, 4096));
    }

    [Fact]
    public void Options_are_understood_byte_by_byte()
    {
        using NbdTestClient client = Started();
        byte[] data = NbdTestClient.InfoQuery("disk");
        byte[] option = NbdTestClient.Bytes(
            b => b.U64(NbdMagic.Option).U32((uint)NbdOption.Go).U32((uint)data.Length).Raw(data));
        foreach (byte one in option)
        {
            client.Send([one]);
            Thread.Yield();
        }

        Assert.Equal(NbdOptionReplyType.Info, client.ReceiveOptionReply().Type);
        Assert.Equal(NbdOptionReplyType.Ack, client.ReceiveOptionReply().Type);
    }

    [Fact]
    public void Too_many_options_end_the_connection()
    {
        using NbdTestClient client = Started();
        for (int i = 0; i < ServerLimits.MaxOptions + ServerLimits.MaxOptionsPerExport; i++)
            client.Ask(NbdOption.List);
        Assert.True(client.IsClosed());
    }

    [Fact]
    public void The_oldest_connection_in_its_handshake_makes_room()
    {
        var clients = new List<NbdTestClient>();
        try
        {
            for (int i = 0; i <= ServerLimits.MaxHandshakes; i++)
            {
                clients.Add(_server.Connect());
                clients[^1].Start();
            }

            Assert.True(clients[0].IsClosed());
            clients[1].Enter();
            clients[^1].Enter();
        }
        finally
        {
            clients.ForEach(c => c.Dispose());
        }
    }

    [Fact]
    public void A_handshake_has_a_deadline()
    {
        var clock = new TestClock();
        using var server = new ServerFixture(time: clock);
        using NbdTestClient silent = server.Connect();
        using NbdTestClient dripping = server.Connect();
        using NbdTestClient honest = server.Connect();
        silent.Start();
        dripping.Start();
        honest.Start();
        TimeSpan step = ServerLimits.HandshakeTime / 10;
        for (int i = 0; i < 9; i++)
        {
            dripping.Send([0x49]); // fewer than the sixteen bytes of an option
            clock.Turn(step);
        }

        honest.Enter(); // there is time left
        clock.Turn(2 * step);
        Assert.True(dripping.IsClosed());
        Assert.True(silent.IsClosed());
        Assert.Equal(16, honest.Read(0, 16).Length);
    }

    [Fact]
    public void Oldstyle_greets_once()
    {
        using var server = new ServerFixture(new MemoryDisk(12345), HandshakeStyle.Oldstyle);
        using NbdTestClient client = server.Connect();
        byte[] greeting = client.Receive(152);
        Assert.Equal(NbdMagic.Oldstyle, BinaryPrimitives.ReadUInt64BigEndian(greeting.AsSpan(8)));
        Assert.Equal(12345ul, BinaryPrimitives.ReadUInt64BigEndian(greeting.AsSpan(16)));
        Assert.Equal(NbdError.None, client.Write(5, [1, 2, 3]));
        Assert.Equal([0, 1, 2, 3, 0], client.Read(4, 5));
    }

    [Fact]
    public void A_context_is_listed_once_however_often_it_is_asked_for()
    {
        using NbdTestClient client = Started();
        client.Ask(NbdOption.StructuredReply);
        byte[] data = NbdTestClient.MetaQuery("", [.. Enumerable.Repeat("base:allocation", 2000)]);
        Assert.Equal(2, client.Ask(NbdOption.ListMetaContext, data).Count);
    }
}
