using System.Runtime.InteropServices;
using System.Text;
using Microsoft.Win32.SafeHandles;
using Spectre.Console;
using Spectre.Console.Rendering;
using Xnbd.Linux;

namespace Xnbd.Programs.Watch;

/// <summary>
/// The terminal while it shows a screen: the alternate screen without a cursor, and keys that are read one by one.
/// <para>
/// States: shown; left, while the program is stopped by Ctrl-Z, and for good at the end. <c>_lock</c> guards the state
/// and all output, so that nothing is drawn after the screen was left. Signals come on threads of the runtime; what
/// they mean is told by <c>changed</c>, while no lock is held.
/// </para>
/// What survives: if the program is killed, the terminal stays as it is; <c>reset</c> helps.
/// </summary>
internal sealed class WatchTerminal : IDisposable
{
    // The alternate screen; no cursor; no line goes on in the next one, even if a character is wider than it should be.
    private const string EnterText = "\e[?1049h\e[?25l\e[?7l\e[2J";
    private const string LeaveText = "\e[?7h\e[?25h\e[?1049l";

    private readonly Stream _output = Console.OpenStandardOutput();
    private readonly SafeFileHandle _input = new(0, ownsHandle: false);
    private readonly SafeFileHandle _screen = new(1, ownsHandle: false);
    private readonly Lock _lock = new();
    private readonly Action _changed;
    private readonly List<PosixSignalRegistration> _signals = [];
    private byte[]? _settings; // of the input before; null while the screen is left, or if the input is no terminal
    private bool _isShown;
    private (int, int) _drawn; // the size of what was drawn last
    private volatile bool _isQuit;

    /// <summary>Shows an empty screen.</summary>
    /// <param name="changed">Called when the window's size has changed, or the user wants to leave.</param>
    public WatchTerminal(Action changed)
    {
        _changed = changed;
        Handle(PosixSignal.SIGINT, context =>
        {
            context.Cancel = true;
            Quit();
        });
        Handle(PosixSignal.SIGWINCH, _ => _changed());
        Handle(PosixSignal.SIGTSTP, context =>
        {
            context.Cancel = true;
            Leave();
            LinuxProcess.Stop();
            Enter();
            _changed();
        });
        Handle(PosixSignal.SIGCONT, context =>
        {
            context.Cancel = true; // otherwise the runtime sets the terminal as it was at the start
            DrawAnew();
            _changed();
        });
        foreach (PosixSignal ending in (PosixSignal[])[PosixSignal.SIGTERM, PosixSignal.SIGHUP, PosixSignal.SIGQUIT])
            Handle(ending, _ => Leave()); // and then the signal does what it always does
        Enter();
        if (_settings is not null)
            LinuxThread.TryStart("keys", ReadKeys);
    }

    /// <summary>Why there can be no screen; null if there can.</summary>
    public static string? Refusal
        => Console.IsOutputRedirected
            ? "--watch needs a terminal: for programs there is --query --json, and for logs --move --progress"
            : Environment.GetEnvironmentVariable("TERM") is null or "" or "dumb"
                ? "--watch needs a terminal that can move its cursor: see the environment variable TERM"
                : null;

    /// <summary>The user wants to leave.</summary>
    public bool IsQuit => _isQuit;

    /// <summary>Columns and rows of the window.</summary>
    public (int Columns, int Rows) Size => LinuxTerminal.SizeOf(_screen) ?? (80, 24);

    /// <summary>Draws a picture that has just as many lines as the window.</summary>
    /// <returns>False when the terminal has gone.</returns>
    public bool Draw(IRenderable picture, (int Columns, int Rows) size)
    {
        string text = Render(picture, size.Columns).Replace("\n", "\r\n", StringComparison.Ordinal);
        lock (_lock)
        {
            if (!_isShown)
                return true;
            string clear = _drawn == size ? "" : "\e[2J";
            _drawn = size;
            return Write($"{clear}\e[H{text}");
        }
    }

    /// <summary>Prints a picture where the screen was before; to be called when it was left for good.</summary>
    public void Print(IRenderable picture, int columns) => Write(Render(picture, columns) + "\n");

    /// <summary>Leaves the screen, and gives the terminal back as it was.</summary>
    public void Dispose()
    {
        _signals.ForEach(signal => signal.Dispose());
        Leave();
        _isQuit = true;
    }

    /// <summary>The text of a picture, with the colours that the terminal knows.</summary>
    private static string Render(IRenderable picture, int columns)
    {
        var text = new StringWriter();
        IAnsiConsole console = AnsiConsole.Create(new AnsiConsoleSettings
        {
            Ansi = AnsiSupport.Yes,
            Interactive = InteractionSupport.No,
            Out = new AnsiConsoleOutput(text),
        });
        console.Profile.Width = columns;
        console.Profile.Capabilities.Links = false;
        console.Write(picture);
        return text.ToString().ReplaceLineEndings("\n");
    }

    private void Handle(PosixSignal signal, Action<PosixSignalContext> handler)
        => _signals.Add(PosixSignalRegistration.Create(signal, handler));

    private void Enter()
    {
        lock (_lock)
        {
            if (_isShown || _isQuit)
                return;
            _isShown = true;
            _drawn = default;
            _settings = LinuxTerminal.TakeKeys(_input);
            Write(EnterText);
        }
    }

    /// <summary>The program was stopped by somebody who did not ask, and others have used the terminal.</summary>
    private void DrawAnew()
    {
        lock (_lock)
        {
            _drawn = default;
            if (_isShown)
                _ = LinuxTerminal.TakeKeys(_input);
        }
    }

    private void Leave()
    {
        lock (_lock)
        {
            if (!_isShown)
                return;
            _isShown = false;
            Write(LeaveText);
            if (_settings is not null)
                LinuxTerminal.Restore(_input, _settings);
            _settings = null;
        }
    }

    private void Quit()
    {
        _isQuit = true;
        _changed();
    }

    /// <summary>A thread: waits for <c>q</c>.</summary>
    private void ReadKeys()
    {
        // The console's own stream would wait for the end of a line.
        using var input = new FileStream(new SafeFileHandle(0, ownsHandle: false), FileAccess.Read, bufferSize: 0);
        byte[] keys = new byte[64];
        try
        {
            while (!_isQuit)
            {
                int count = input.Read(keys);
                if (count == 0)
                    return;
                if (keys.AsSpan(0, count).IndexOfAny((byte)'q', (byte)'Q') >= 0)
                    Quit();
            }
        }
        catch (IOException)
        {
            // The terminal has gone; SIGHUP tells.
        }
    }

    private bool Write(string text)
    {
        try
        {
            _output.Write(Encoding.UTF8.GetBytes(text));
            _output.Flush();
            return true;
        }
        catch (IOException)
        {
            return false;
        }
    }
}
