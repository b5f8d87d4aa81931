using System.Net;
using System.Net.Sockets;
using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;

namespace Xnbd.Server;

/// <summary>
/// A listening socket, and the thread that accepts its connections.
/// <para>
/// The thread waits for a connection or for <c>_wake</c>, and accepts without waiting. So it can be asked whether it
/// responds, and it ends before the socket is closed. The socket is never shut down: another process may share it, as
/// the service manager does, and goes on listening.
/// </para>
/// </summary>
internal sealed class Listener : IDisposable
{
    /// <summary>How long the end waits for the thread, which may be starting another thread.</summary>
    private static readonly TimeSpan s_maxEnd = TimeSpan.FromSeconds(1);

    private readonly Socket _socket;
    private readonly UnixSocket? _file; // the socket's file, if this process has made it
    private readonly LinuxEvent _wake;
    private readonly ManualResetEventSlim _responded = new();
    private Action<Socket>? _take;
    private RefusalLog? _refusals;
    private Thread? _thread;
    private volatile bool _isStopping;

    /// <summary>Connections queue up until <see cref="TryStart"/>.</summary>
    /// <param name="socket">The listening socket, which belongs to this object from now on, also if this fails.</param>
    /// <param name="file">Its file, which is removed at the end; null for none.</param>
    /// <exception cref="IOException">There are no more descriptors.</exception>
    public Listener(Socket socket, UnixSocket? file = null)
    {
        (_socket, _file) = (socket, file);
        try
        {
            socket.Blocking = false;
            Address = socket.LocalEndPoint!;
            _wake = new LinuxEvent();
        }
        catch (Exception failure)
        {
            file?.Dispose();
            socket.Dispose();
            throw failure is SocketException ? new IOException(failure.Message) : failure;
        }
    }

    /// <summary>The address; a Unix socket's is its path, with "@" in front if it is abstract.</summary>
    public EndPoint Address { get; }

    /// <summary>Starts the thread.</summary>
    /// <param name="take">Takes a connection; it must not wait.</param>
    /// <param name="refusals">Told when a connection cannot be accepted.</param>
    /// <returns>False when the system refuses a thread.</returns>
    public bool TryStart(Action<Socket> take, RefusalLog refusals)
    {
        (_take, _refusals) = (take, refusals);
        return (_thread = LinuxThread.TryStart("listener", Run)) is not null;
    }

    /// <summary>Asks the thread for a sign of life. One thread at a time may ask.</summary>
    /// <returns>False when it has not responded in time.</returns>
    public bool Responds(TimeSpan maxTime)
    {
        try
        {
            _responded.Reset();
            _wake.Signal();
            return _responded.Wait(maxTime) || _isStopping;
        }
        catch (ObjectDisposedException)
        {
            return true; // it has just ended, as it was told to
        }
    }

    /// <summary>Ends the thread, closes the socket, and removes the file that belongs to it.</summary>
    public void Dispose()
    {
        if (_isStopping)
            return;
        _isStopping = true;
        _wake.Signal();
        bool hasEnded = _thread is null || _thread.Join(s_maxEnd);
        _file?.Dispose();
        _socket.Dispose();
        if (hasEnded)
            _wake.Dispose(); // otherwise the thread may still wait for it
    }

    private void Run()
    {
        SafeFileHandle? spare = OpenSpare();
        while (!_isStopping)
        {
            try
            {
                Readiness ready = LinuxSocket.Wait(
                    _socket.SafeHandle, forReading: true, forWriting: false, Timeout.Infinite, _wake);
                if ((ready & Readiness.Woken) != 0)
                {
                    _wake.Reset();
                    _responded.Set();
                }

                if (!_isStopping && (ready & (Readiness.Readable | Readiness.Broken)) != 0)
                    _take!(Accept());
            }
            catch (SocketException failure) when (failure.SocketErrorCode == SocketError.WouldBlock)
            {
                // The client has left, or another process that shares the socket has accepted it.
            }
            catch (Exception failure) when (failure is SocketException or ObjectDisposedException)
            {
                if (_isStopping)
                    break;
                if (failure is SocketException { SocketErrorCode: SocketError.TooManyOpenSockets } && spare is not null)
                {
                    // Not even the reserve has a descriptor. The client is disconnected rather than left to wait.
                    spare.Dispose();
                    Refuse();
                    spare = OpenSpare();
                    continue;
                }

                _refusals!.Log(failure.Message);
                Thread.Sleep(100); // most causes pass
            }
        }

        spare?.Dispose();
    }

    private Socket Accept()
    {
        Socket connection = _socket.Accept();
        connection.Blocking = true; // the BCL hands on what the listener has
        return connection;
    }

    private void Refuse()
    {
        try
        {
            _socket.Accept().Dispose();
        }
        catch (SocketException)
        {
            Thread.Sleep(100); // another thread has accepted it, or has taken the descriptor
        }

        _refusals!.Log("no descriptor is left");
    }

    private static SafeFileHandle? OpenSpare()
    {
        _ = LinuxFile.Open("/dev/null", OpenMode.ReadOnly, out SafeFileHandle? spare);
        return spare;
    }
}
