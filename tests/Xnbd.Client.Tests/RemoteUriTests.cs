namespace Xnbd.Client.Tests;

/// <summary>URIs of remotes.</summary>
public sealed class RemoteUriTests
{
    [Theory]
    [InlineData("nbd://host", "nbd://host:10809/")]
    [InlineData("NBD://host/", "nbd://host:10809/")]
    [InlineData("nbd://host:8520/disk", "nbd://host:8520/disk")]
    [InlineData("nbd://host/a%20b%2Fc", "nbd://host:10809/a%20b%2Fc")]
    [InlineData("nbd://host/a/b?unknown=1", "nbd://host:10809/a%2Fb")]
    [InlineData("nbd://host//x", "nbd://host:10809/%2Fx")]
    [InlineData("nbd://[::1]", "nbd://[::1]:10809/")]
    [InlineData("nbd://[fe80::1%25eth0]:1/x", "nbd://[fe80::1%25eth0]:1/x")]
    [InlineData("nbd+unix:///?socket=/run/s", "nbd+unix:///?socket=/run/s")]
    [InlineData("nbd+unix://?socket=/run/s", "nbd+unix:///?socket=/run/s")]
    [InlineData("nbd+unix:///disk?x=y&socket=/a%20b%25c%3f", "nbd+unix:///disk?socket=/a%20b%25c%3F")]
    [InlineData("nbd+unix:///%C3%A4?socket=/%c3%bc", "nbd+unix:///%C3%A4?socket=/ü")]
    public void A_URI_is_read_and_written(string uri, string written)
    {
        Assert.True(RemoteUri.IsUri(uri));
        RemoteAddress address = RemoteUri.Parse(uri, exportName: null);
        Assert.Equal(written, address.ToString());
        Assert.Equal(address, RemoteUri.Parse(written, exportName: null));
    }

    [Theory]
    [InlineData("nbds://host/", "TLS is not supported yet")]
    [InlineData("nbds+unix:///?socket=/s", "TLS is not supported yet")]
    [InlineData("nbd://user@host/", "TLS is not supported yet")]
    [InlineData("nbd://host/?tls-psk-file=/x", "TLS is not supported yet")]
    [InlineData("nbd+vsock://3", "begins with nbd:// or nbd+unix://")]
    [InlineData("nbd:///x", "the host is missing")]
    [InlineData("nbd://:10809/x", "the host is missing")]
    [InlineData("nbd://host:0/", "remote port '0'")]
    [InlineData("nbd://host:65536/", "remote port '65536'")]
    [InlineData("nbd://host:-1/", "remote port '-1'")]
    [InlineData("nbd://::1/", "an IPv6 address is written [ADDRESS]")]
    [InlineData("nbd://[::1/", "an IPv6 address is written [ADDRESS]")]
    [InlineData("nbd://[::1]8520/", "an IPv6 address is written [ADDRESS]")]
    [InlineData("nbd://host/?socket=/s", "a socket goes with nbd+unix://")]
    [InlineData("nbd+unix:///disk", "the socket's path is missing")]
    [InlineData("nbd+unix:///?socket=", "1 to 107 bytes")]
    [InlineData("nbd+unix:///?socket=/a%00b", "NUL")]
    [InlineData("nbd+unix://disk?socket=/s", "has no host")]
    [InlineData("nbd://host/%4", "two hexadecimal digits")]
    [InlineData("nbd://host/%zz", "two hexadecimal digits")]
    [InlineData("nbd://host/%ff", "not valid UTF-8")]
    [InlineData("nbd://host/#x", "a # in a name is written %23")]
    public void A_wrong_URI_is_refused_with_the_reason(string uri, string reason)
    {
        Assert.True(RemoteUri.IsUri(uri));
        Assert.Contains(
            reason,
            Assert.Throws<FormatException>(() => RemoteUri.Parse(uri, exportName: null)).Message,
            StringComparison.Ordinal);
    }

    [Fact]
    public void The_export_is_named_once()
    {
        Assert.Equal("x", RemoteUri.Parse("nbd://host", "x").ExportName);
        Assert.Equal("", RemoteUri.Parse("nbd://host", "").ExportName);
        Assert.Contains(
            "give one of them",
            Assert.Throws<FormatException>(() => RemoteUri.Parse("nbd://host/x", "x")).Message,
            StringComparison.Ordinal);
        Assert.Throws<FormatException>(() => RemoteUri.Parse("nbd://host/" + new string('x', 4097), null));
    }

    [Theory]
    [InlineData("disk.img")]
    [InlineData("nbd")]
    [InlineData("nbd/x://y")]
    [InlineData("http://nbd")]
    [InlineData("unix:/s")]
    public void Other_words_are_none(string word) => Assert.False(RemoteUri.IsUri(word));
}
