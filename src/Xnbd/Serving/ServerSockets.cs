using System.Net;
using System.Net.Sockets;
using System.Text.Json.Nodes;
using Microsoft.Win32.SafeHandles;
using Xnbd.Control;
using Xnbd.Linux;
using Xnbd.Server;

namespace Xnbd.Programs.Serving;

/// <summary>The sockets of a server: the one that was handed over, or those on which it listens.</summary>
/// <param name="options">Say where it listens.</param>
/// <param name="supervision">The service manager, which may have handed over the latter.</param>
internal sealed class ServerSockets(ListenOptions options, Supervision supervision)
{
    /// <summary>
    /// Redirects stdout and stderr to nowhere if they are the connection that stdin is, as an Internet super-server
    /// makes them: a message there would corrupt the stream.
    /// </summary>
    public static void KeepStdinClean()
    {
        using var stdin = new SafeFileHandle(0, ownsHandle: false);
        _ = LinuxFile.Status(stdin, out FileStatus connection);
        foreach (int descriptor in (ReadOnlySpan<int>)[1, 2])
        {
            using var other = new SafeFileHandle(descriptor, ownsHandle: false);
            if (LinuxFile.Status(other, out FileStatus status) != Errno.None || status.IsSameFile(connection))
                StandardStreams.RedirectToNull(descriptor);
        }
    }

    /// <summary>Opens a control channel.</summary>
    /// <param name="path">Its socket.</param>
    /// <param name="call">Carries out a method, on any thread.</param>
    /// <exception cref="FailureException">It cannot be opened.</exception>
    public static ControlServer OpenControl(string path, Func<string, JsonObject, JsonNode?> call)
    {
        try
        {
            return ControlServer.Start(path, call);
        }
        catch (Exception failure) when (failure is IOException or ArgumentException)
        {
            throw new FailureException($"cannot listen on the control socket '{path}': {failure.Message}");
        }
    }

    /// <summary>The connection that was handed over; null when the server is to listen.</summary>
    /// <exception cref="FailureException">It cannot be used.</exception>
    public Socket? OpenConnection()
    {
        if (!options.Inetd && options.ConnectedDescriptor is null)
            return null;
        int number = options.ConnectedDescriptor ?? 0;
        string name = options.Inetd ? "stdin" : $"descriptor {number}";
        var handle = new SafeSocketHandle(number, ownsHandle: true);
        if (LinuxFile.Status(handle, out FileStatus status) != Errno.None)
            throw new FailureException($"{name} is not open");
        if (status.Kind != FileKind.Socket)
            throw new FailureException($"{name} is not a socket");
        _ = LinuxSocket.SetBlocking(handle);
        try
        {
            return new Socket(handle);
        }
        catch (SocketException failure)
        {
            throw new FailureException($"{name} cannot be used: {failure.Message}");
        }
    }

    /// <summary>Opens the sockets on which the server is to listen, or takes those of the service manager.</summary>
    /// <exception cref="FailureException">One cannot be opened.</exception>
    public void OpenListeners(NbdServer server)
    {
        if (supervision.DescriptorCount > 0)
        {
            foreach (Socket listener in supervision.TakeListeners())
                server.Listen(listener);
            return;
        }

        if (options.UnixPath is { } path)
        {
            try
            {
                server.Listen(path);
            }
            catch (Exception failure) when (failure is IOException or ArgumentException)
            {
                throw new FailureException($"cannot listen on '{path}': {failure.Message}");
            }
        }

        if (options.UnixPath is not null && options.Port is null && options.Address is null)
            return;
        int port = options.Port ?? ListenOptions.DefaultPort;
        string place = options.Address is null ? $"port {port}" : $"address {options.Address}, port {port}";
        try
        {
            server.Listen(new IPEndPoint(Resolve(options.Address), port));
        }
        catch (Exception failure) when (failure is SocketException or ArgumentException)
        {
            throw new FailureException($"cannot listen on {place}: {failure.Message}");
        }
    }

    private static IPAddress Resolve(string? address)
    {
        if (address is null)
            return IPAddress.IPv6Any;
        if (IPAddress.TryParse(address, out IPAddress? parsed))
            return parsed;
        IPAddress[] found = Dns.GetHostAddresses(address);
        return found.Length > 0 ? found[0] : throw new ArgumentException("the name has no address");
    }
}
