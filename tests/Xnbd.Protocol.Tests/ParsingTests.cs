using CsCheck;

namespace Xnbd.Protocol.Tests;

public class ParsingTests
{
    private static readonly Gen<byte[]> AnyBytes = Gen.Byte.Array[0, 200];

    [Fact]
    public void A_request_survives_being_written_and_read()
        => Gen.Select(Gen.UShort, Gen.UShort, Gen.ULong, Gen.ULong, Gen.UInt)
            .Sample((flags, command, cookie, offset, length) =>
        {
            var request = new NbdRequest((NbdCommandFlags)flags, (NbdCommand)command, cookie, offset, length);
            byte[] bytes = new byte[NbdSize.Request];
            request.Write(bytes);
            return NbdRequest.TryRead(bytes, out NbdRequest read) && read == request;
        });

    [Fact]
    public void A_request_has_the_layout_of_the_specification()
    {
        byte[] bytes =
        [
            0x25, 0x60, 0x95, 0x13, 0x00, 0x01, 0x00, 0x06, 1, 2, 3, 4, 5, 6, 7, 8,
            0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0x10, 0,
        ];
        Assert.True(NbdRequest.TryRead(bytes, out NbdRequest request));
        Assert.Equal(
            new NbdRequest(NbdCommandFlags.Fua, NbdCommand.WriteZeroes, 0x0102030405060708, 0x1_0000_0002, 4096),
            request);
    }

    [Fact]
    public void A_request_with_another_magic_is_none()
    {
        byte[] bytes = new byte[NbdSize.Request];
        default(NbdRequest).Write(bytes);
        bytes[3] ^= 1;
        Assert.False(NbdRequest.TryRead(bytes, out _));
    }

    [Fact]
    public void No_bytes_make_an_option_parser_throw()
        => AnyBytes.Sample(bytes =>
        {
            _ = NbdInfoRequest.TryRead(bytes, out _);
            _ = NbdMetaContextRequest.TryRead(bytes, out _);
            _ = NbdString.TryRead(bytes, out _);
        });

    [Fact]
    public void Information_requests_that_are_unknown_are_ignored()
    {
        byte[] data = [0, 0, 0, 2, (byte)'a', (byte)'b', 0, 3, 0, 3, 0x7f, 0xff, 0, 1];
        Assert.True(NbdInfoRequest.TryRead(data, out NbdInfoRequest? request));
        Assert.Equal(new NbdInfoRequest("ab", WantsName: true, WantsDescription: false, WantsBlockSize: true), request);
    }

    [Theory]
    [InlineData("00000000")] // no count
    [InlineData("000000050000")] // the name ends behind the data
    [InlineData("fffffffb0000")] // the same if lengths are added without care for overflow
    [InlineData("000000000001")] // a count without its list
    [InlineData("0000000000010003ff")] // a byte too many
    [InlineData("0000000100" + "0000")] // a NUL in the name
    [InlineData("00000001ff" + "0000")] // not UTF-8
    public void Malformed_information_requests_are_refused(string hex)
        => Assert.False(NbdInfoRequest.TryRead(Convert.FromHexString(hex), out _));

    [Theory]
    [InlineData("")]
    [InlineData("00000000")] // no count
    [InlineData("0000000000000001")] // a count without its query
    [InlineData("00000000ffffffff")]
    [InlineData("000000000000000100000009" + "61")] // a query beyond the data
    [InlineData("0000000000000000" + "00")] // a byte too many
    public void Malformed_metadata_queries_are_refused(string hex)
        => Assert.False(NbdMetaContextRequest.TryRead(Convert.FromHexString(hex), out _));

    [Fact]
    public void A_metadata_query_is_read_in_order()
    {
        byte[] data = Convert.FromHexString("00000001" + "78" + "00000002" + "00000005" + "626173653a" + "00000000");
        Assert.True(NbdMetaContextRequest.TryRead(data, out NbdMetaContextRequest? request));
        Assert.Equal("x", request.ExportName);
        Assert.Equal(["base:", ""], request.Queries);
    }

    [Fact]
    public void A_string_is_at_most_4096_bytes_long()
    {
        Assert.True(NbdString.TryRead(new byte[4096].Select(_ => (byte)'a').ToArray(), out _));
        Assert.False(NbdString.TryRead(new byte[4097].Select(_ => (byte)'a').ToArray(), out _));
        Assert.Throws<ArgumentException>(() => NbdString.GetBytes(new string('ä', 2049)));
        Assert.Throws<ArgumentException>(() => NbdString.GetBytes("a\0"));
        Assert.Throws<ArgumentException>(() => NbdString.GetBytes("\ud800"));
    }

    [Fact]
    public void An_error_chunk_cuts_its_message_at_a_whole_character()
    {
        byte[] chunk = new byte[NbdReply.MaxErrorChunk];
        int length = NbdReply.WriteErrorChunk(chunk, 7, NbdError.Io, new string('ä', 1000) + "x");
        int textLength = (chunk[24] << 8) | chunk[25];
        Assert.Equal(length, NbdSize.StructuredReply + 6 + textLength);
        Assert.True(NbdString.TryRead(chunk.AsSpan(26, textLength), out string? text));
        Assert.Equal(new string('ä', 128), text);
    }

    [Fact]
    public void Greetings_have_the_layout_of_the_specification()
    {
        byte[] old = new byte[NbdSize.OldstyleGreeting];
        Assert.Equal(152, NbdHandshake.WriteOldstyleGreeting(old, 0x0102, NbdTransmissionFlags.HasFlags));
        Assert.StartsWith(
            "4E42444D41474943" + "0000420281861253" + "0000000000000102" + "00000001",
            Convert.ToHexString(old),
            StringComparison.Ordinal);
        byte[] modern = new byte[NbdSize.NewstyleGreeting];
        NbdHandshake.WriteNewstyleGreeting(modern, NbdHandshakeFlags.FixedNewstyle | NbdHandshakeFlags.NoZeroes);
        Assert.Equal("4E42444D41474943" + "49484156454F5054" + "0003", Convert.ToHexString(modern));
    }

    [Fact]
    public void A_trail_is_found_at_the_end_of_a_description_and_nowhere_else()
    {
        ulong[] ids = [1, ulong.MaxValue];
        string text = NbdProxyTrail.Append("a [proxy] disk", ids);
        Assert.Equal("a [proxy] disk [proxy 0000000000000001 ffffffffffffffff]", text);
        Assert.Equal(ids, NbdProxyTrail.Find(text));
        ulong[] many = [.. Enumerable.Range(1, 100).Select(i => (ulong)i)];
        Assert.Equal(many[..NbdProxyTrail.MaxIds], NbdProxyTrail.Find(NbdProxyTrail.Append("", many)));
        string[] others =
        [
            "", "[proxy", "]", "[proxy]", text + ".", "[proxy 1]", "[proxy 000000000000000g]", "[proxy  ]",
            "[proxy " + string.Join(' ', Enumerable.Repeat("0000000000000001", NbdProxyTrail.MaxIds + 1)) + "]",
        ];
        foreach (string other in others)
            Assert.Empty(NbdProxyTrail.Find(other));
    }
}
