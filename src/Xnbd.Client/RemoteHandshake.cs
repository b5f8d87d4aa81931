using System.Buffers.Binary;
using System.Net.Sockets;
using Xnbd.Linux;
using Xnbd.Protocol;

namespace Xnbd.Client;

/// <summary>What a client and a server have agreed on.</summary>
/// <param name="Export">The export.</param>
/// <param name="IsStructured">Whether reads are answered with structured replies.</param>
/// <param name="AllocationId">
/// The id of <c>base:allocation</c>; null if the server does not tell where zeroes are.
/// </param>
internal sealed record RemoteAgreement(NbdExportInfo Export, bool IsStructured, uint? AllocationId);

/// <summary>
/// The client's side of the handshake (section "Handshake"). It finds out the style, asks for structured replies, for
/// block status and for the export; with servers that do not know NBD_OPT_GO, it falls back to NBD_OPT_EXPORT_NAME.
/// <para>
/// One thread runs it, for one socket. Whatever a server says wrong is a <see cref="RemoteException"/>; all of it has
/// one deadline, and each reply has a bound.
/// </para>
/// </summary>
internal sealed class RemoteHandshake
{
    /// <summary>The bound of a reply to an option, in bytes: a description and a message are far shorter.</summary>
    private const int MaxReplyData = 64 * 1024;

    /// <summary>The bound of replies to one option: each piece of information is one; there are few kinds.</summary>
    private const int MaxReplies = 64;

    /// <summary>
    /// The metadata context that tells where zeroes are (section "base:allocation metadata context").
    /// </summary>
    private const string AllocationContext = "base:allocation";

    private readonly Socket _socket;
    private readonly RemoteAddress _address;
    private readonly long _deadline; // in milliseconds of the system's clock
    private uint? _allocationId;

    private RemoteHandshake(Socket socket, RemoteAddress address, TimeSpan timeout)
    {
        _socket = socket;
        _address = address;
        _deadline = Environment.TickCount64 + (long)timeout.TotalMilliseconds;
    }

    /// <summary>Runs the handshake.</summary>
    /// <returns>What was agreed on.</returns>
    /// <exception cref="RemoteException">The server refused, broke the protocol, or left.</exception>
    public static RemoteAgreement Run(Socket socket, RemoteAddress address, TimeSpan timeout)
    {
        socket.ReceiveTimeout = socket.SendTimeout = (int)timeout.TotalMilliseconds;
        var handshake = new RemoteHandshake(socket, address, timeout);
        (NbdExportInfo export, bool isStructured) = handshake.Run();
        socket.ReceiveTimeout = socket.SendTimeout = 0;
        if (export.Length > long.MaxValue || (export.Flags & NbdTransmissionFlags.HasFlags) == 0)
            throw Broken(address, "an impossible size, or no flags");
        return new RemoteAgreement(export, isStructured, isStructured ? handshake._allocationId : null);
    }

    /// <summary>The failure that says that a server has broken the protocol.</summary>
    public static RemoteException Broken(RemoteAddress address, string how)
        => new($"{address}: the server has sent {how}: this is a fault of that server");

    private (NbdExportInfo Export, bool IsStructured) Run()
    {
        if (!NbdGreeting.TryRead(Receive(NbdGreeting.Start), out bool isNewstyle))
            throw new RemoteException($"{_address}: there is no NBD server: it greets in another way");
        if (!isNewstyle)
        {
            byte[] rest = Receive(NbdSize.OldstyleGreeting - NbdGreeting.Start);
            if (_address.ExportName.Length > 0)
                throw new RemoteException($"{_address}: an oldstyle server has one export, without a name");
            var oldFlags = (NbdTransmissionFlags)BinaryPrimitives.ReadUInt16BigEndian(rest.AsSpan(10));
            ulong length = BinaryPrimitives.ReadUInt64BigEndian(rest);
            return (new NbdExportInfo(length, oldFlags | NbdTransmissionFlags.HasFlags), false);
        }

        var flags = (NbdHandshakeFlags)BinaryPrimitives.ReadUInt16BigEndian(Receive(2));
        NbdClientFlags answer = ((flags & NbdHandshakeFlags.FixedNewstyle) != 0 ? NbdClientFlags.FixedNewstyle : 0)
            | ((flags & NbdHandshakeFlags.NoZeroes) != 0 ? NbdClientFlags.NoZeroes : 0);
        byte[] bytes = new byte[NbdSize.ClientFlags];
        BinaryPrimitives.WriteUInt32BigEndian(bytes, (uint)answer);
        Send(bytes);

        bool isStructured = false;
        if ((flags & NbdHandshakeFlags.FixedNewstyle) != 0)
        {
            isStructured = Ask(NbdOption.StructuredReply, []) is { Last.Type: NbdOptionReplyType.Ack };
            if (isStructured) // if this is refused, nobody knows where zeroes are
                Ask(
                    NbdOption.SetMetaContext,
                    NbdClientHandshake.MetaContextRequest(_address.ExportName, AllocationContext));
            var known = new NbdExportInfo(0, NbdTransmissionFlags.None);
            (NbdOptionReplyHeader last, string message, NbdExportInfo info) = Ask(
                NbdOption.Go, NbdClientHandshake.InfoRequest(_address.ExportName), known);
            if (last.Type == NbdOptionReplyType.Ack)
                return (
                    info.Flags == NbdTransmissionFlags.None ? throw Broken(_address, "no size of the export") : info,
                    isStructured);
            if (last.Type != NbdOptionReplyType.ErrUnsupported)
                throw Refused(last.Type, message);
        }

        Send(NbdClientHandshake.Option(NbdOption.ExportName, NbdString.GetBytes(_address.ExportName)));
        byte[] export;
        try
        {
            export = Receive(10);
        }
        catch (RemoteException)
        {
            throw new RemoteException($"{_address}: the server has no such export, or refuses it");
        }

        if ((answer & NbdClientFlags.NoZeroes) == 0)
            Receive(NbdSize.ReservedZeroes);
        var exportFlags = (NbdTransmissionFlags)BinaryPrimitives.ReadUInt16BigEndian(export.AsSpan(8));
        return (new NbdExportInfo(BinaryPrimitives.ReadUInt64BigEndian(export), exportFlags), isStructured);
    }

    private RemoteException Refused(NbdOptionReplyType type, string message)
    {
        string reason = type switch
        {
            NbdOptionReplyType.ErrUnknown => "the server has no such export",
            NbdOptionReplyType.ErrTlsRequired => "the server wants TLS, which is not supported yet",
            NbdOptionReplyType.ErrPolicy => "the server refuses this client",
            NbdOptionReplyType.ErrShutdown => "the server is ending",
            _ => $"the server refuses the export (error {(uint)type & 0x7fff_ffff})",
        };
        return new RemoteException($"{_address}: {reason}{(message.Length > 0 ? $": {message}" : "")}");
    }

    /// <summary>Sends an option and reads its replies.</summary>
    private (NbdOptionReplyHeader Last, string Message, NbdExportInfo Info) Ask(
        NbdOption option, byte[] data, NbdExportInfo? known = null)
    {
        Send(NbdClientHandshake.Option(option, data));
        NbdExportInfo info = known ?? new NbdExportInfo(0, NbdTransmissionFlags.None);
        for (int count = 0; count < MaxReplies; count++)
        {
            if (!NbdOptionReplyHeader.TryRead(Receive(NbdSize.OptionReplyHeader), out NbdOptionReplyHeader header)
                || header.Option != option)
                throw Broken(_address, "something else than the reply to an option");
            if (header.Length > MaxReplyData)
                throw Broken(_address, $"{header.Length} bytes in reply to an option");
            byte[] reply = Receive((int)header.Length);
            if (header.IsError)
                return (header, NbdString.TryRead(reply, out string? message) ? message : "", info);
            if (header.Type == NbdOptionReplyType.Ack)
                return (header, "", info);
            if (header.Type == NbdOptionReplyType.MetaContext)
            {
                if (!NbdClientHandshake.TryReadMetaContext(reply, out uint id, out string? context)
                    || context != AllocationContext
                    || _allocationId is not null)
                    throw Broken(_address, "a metadata context that was not asked for");
                _allocationId = id;
            }

            if (header.Type == NbdOptionReplyType.Info)
                info = NbdExportInfo.TryRead(reply, info, out NbdExportInfo? more)
                    ? more
                    : throw Broken(_address, "malformed information on the export");
        }

        throw Broken(_address, "too many replies to an option");
    }

    private void Send(ReadOnlySpan<byte> data)
    {
        while (data.Length > 0)
        {
            long count = LinuxSocket.Send(_socket.SafeHandle, data, more: false);
            if (count <= 0)
                throw Gone(Errno.Of(count));
            data = data[(int)count..];
        }
    }

    private byte[] Receive(int length)
    {
        byte[] data = new byte[length];
        for (int done = 0; done < length;)
        {
            _socket.ReceiveTimeout = (int)Math.Max(1, _deadline - Environment.TickCount64);
            long count = LinuxSocket.Receive(_socket.SafeHandle, data.AsSpan(done));
            if (count <= 0)
                throw Gone(Errno.Of(count));
            done += (int)count;
        }

        return data;
    }

    private RemoteException Gone(Errno errno) => new(errno switch
    {
        Errno.None => $"{_address}: the server has closed the connection in the handshake",
        Errno.EAGAIN => $"{_address}: the server has not answered in time",
        _ => $"{_address}: {errno.Describe()}",
    });
}
