using Microsoft.Win32.SafeHandles;

namespace Xnbd.Linux;

/// <summary>
/// A terminal: its size, and how it hands over what is typed. Any thread may call anything; the settings belong to the
/// terminal itself, and stay when the process ends.
/// </summary>
public static class LinuxTerminal
{
    // struct termios of Linux on x86, ARM and RISC-V: four words of flags come first, of which the fourth holds the
    // local ones.
    private const int TermiosBytes = 128; // more than any C library's
    private const int LocalFlags = 12;
    private const uint Canonical = 2, Echo = 8; // ICANON, ECHO
    private const int SetNow = 0; // TCSANOW

    /// <summary>Asks how large a terminal is.</summary>
    /// <param name="terminal">The terminal.</param>
    /// <returns>Columns and rows; null if it does not know, or is no terminal.</returns>
    public static unsafe (int Columns, int Rows)? SizeOf(SafeFileHandle terminal)
    {
        const nuint getSize = 0x5413; // TIOCGWINSZ
        ushort* size = stackalloc ushort[4]; // rows, columns, pixels
        bool isKnown = LibC.IoCtl(terminal, getSize, (nint)size) == 0 && size[0] > 0 && size[1] > 0;
        return isKnown ? (size[1], size[0]) : null;
    }

    /// <summary>
    /// Lets each key be read at once, and be shown by nobody. Ctrl-C and Ctrl-Z are signals as before.
    /// </summary>
    /// <param name="terminal">The terminal.</param>
    /// <returns>The settings before, for <see cref="Restore"/>; null if it is no terminal.</returns>
    public static unsafe byte[]? TakeKeys(SafeFileHandle terminal)
    {
        byte[] before = new byte[TermiosBytes];
        fixed (byte* settings = before)
        {
            if (LibC.TcGetAttr(terminal, settings) != 0)
                return null;
        }

        byte[] changed = [.. before];
        uint local = BitConverter.ToUInt32(changed, LocalFlags) & ~(Canonical | Echo);
        BitConverter.TryWriteBytes(changed.AsSpan(LocalFlags), local);
        Restore(terminal, changed);
        return before;
    }

    /// <summary>Gives a terminal its earlier settings back.</summary>
    /// <param name="terminal">The terminal.</param>
    /// <param name="settings">What <see cref="TakeKeys"/> has returned.</param>
    public static unsafe void Restore(SafeFileHandle terminal, byte[] settings)
    {
        fixed (byte* start = settings)
            _ = LibC.TcSetAttr(terminal, SetNow, start);
    }
}
