using Xnbd.Storage;
using Xnbd.TestKit;

namespace Xnbd.Server.Tests;

/// <summary>A server in this process, on a Unix socket of its own.</summary>
internal sealed class ServerFixture : IDisposable
{
    private readonly TempFolder _folder = new();

    public ServerFixture(
        Disk? disk = null,
        HandshakeStyle style = HandshakeStyle.FixedNewstyle,
        string name = "disk",
        TimeProvider? time = null,
        RequestLimits? limits = null)
    {
        Disk = disk ?? new MemoryDisk(1 << 20);
        Export = new Export(name, "a test's disk", Disk) { Limits = limits ?? RequestLimits.Default };
        Server = new NbdServer(
            new ExportTable(Export), style, LogToTest(), time: time);
        Server.Listen(SocketPath);
        Server.Start();
    }

    public Disk Disk { get; }

    public Export Export { get; }

    public ServerTraffic Traffic => Server.TrafficOf(Export);

    public NbdServer Server { get; }

    public string SocketPath => _folder.File("s");

    public NbdTestClient Connect() => NbdTestClient.Connect(SocketPath);

    public NbdTestClient Open(bool structured = true, string name = "", params string[] contexts)
        => NbdTestClient.Open(SocketPath, structured, name, contexts);

    public void Dispose()
    {
        Server.Dispose();
        Disk.Dispose();
        _folder.Dispose();
    }

    /// <summary>Passes what the server logs on to the test's output.</summary>
    private static TestLog LogToTest()
    {
        ITestOutputHelper? output = TestContext.Current.TestOutputHelper;
        return new TestLog((_, _, line) =>
        {
            try
            {
                output?.WriteLine(line);
            }
            catch (InvalidOperationException)
            {
                // The test has ended.
            }
        });
    }
}
