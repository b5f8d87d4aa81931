using System.Net.Sockets;
using Xnbd.Server;
using Xnbd.TestKit;

namespace Xnbd.Fuzz;

/// <summary>
/// A server in this process, which serves one connection after the other on the calling thread. The client has
/// sent all of its bytes, and the end of its stream, before. A thread of the pool receives what the server sends.
/// </summary>
internal sealed class ServedConnection
{
    /// <summary>The name of the only export; the empty name means it, too.</summary>
    public const string ExportName = "disk";

    /// <summary>Room for all that a client sends, in bytes: nobody receives while it is sent.</summary>
    private const int SendBuffer = 1 << 20;

    private readonly SocketPairs _sockets = new();
    private readonly NbdServer _server;
    private string? _crash; // what the server says of an exception that it did not expect

    public ServedConnection(bool isReadOnly, HandshakeStyle style)
    {
        Disk = new FuzzDisk(isReadOnly);
        var log = new TestLog((_, name, line) => _crash = name == nameof(Log.SessionCrashed) ? line : _crash);
        _server = new NbdServer(new ExportTable(new Export(ExportName, "a disk of many kinds", Disk)), style, log);
    }

    public FuzzDisk Disk { get; }

    /// <summary>After a connection: the disk was asked for what the model says.</summary>
    public void CheckDisk(RequestModel model)
    {
        Check.That(Disk.Content.SequenceEqual(model.Disk), "the disk holds what was written");
        Check.That(Disk.DurableChanges == model.DurableChanges, "a change with FUA is durable, and no other one");
        Check.That(Disk.Flushes == model.Flushes, "the disk is flushed when the client asks for it, and only then");
    }

    /// <summary>Serves a client that sends these bytes.</summary>
    /// <returns>What the server has sent.</returns>
    public byte[] Run(byte[] fromClient)
    {
        Disk.Reset();
        _crash = null;
        (Socket client, Socket server) = _sockets.Make();
        using (client)
        {
            client.SendBufferSize = SendBuffer;
            client.TrySendAll(fromClient);
            client.TryShutdownSend();
            Task<byte[]> received = Task.Run(() =>
            {
                byte[] all = client.ReceiveAll();
                client.Dispose(); // the server waits a moment for that
                return all;
            });
            _server.Serve(server);
            byte[] result = received.GetAwaiter().GetResult();
            Check.That(_crash is null, $"a session ends without an exception: {_crash}");
            return result;
        }
    }
}
