using System.Text;
using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;

namespace Xnbd.Programs;

/// <summary>
/// Lines on stderr, written at once. <c>Console.Error</c> would first start a thread for signals, and end the process
/// if the system refuses one.
/// </summary>
internal static class StandardError
{
    /// <summary>The descriptor of stderr.</summary>
    public static SafeFileHandle Handle { get; } = new(2, ownsHandle: false);

    /// <summary>Writes a line. A failure cannot be reported, and is ignored.</summary>
    public static void WriteLine(string line) => _ = LinuxFile.Append(Handle, Encoding.UTF8.GetBytes(line + "\n"));
}
