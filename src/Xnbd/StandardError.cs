using System.Text;
using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;

namespace Xnbd.Programs;

/// <summary>
/// Lines on stderr, written at once. <c>Console.Error</c> would start a thread for signals first, and end the process
/// where the system has none to give.
/// </summary>
internal static class StandardError
{
    /// <summary>The descriptor, for questions about it.</summary>
    public static SafeFileHandle Handle { get; } = new(2, ownsHandle: false);

    /// <summary>Writes a line. If that fails, nobody can be told.</summary>
    public static void WriteLine(string line) => _ = LinuxFile.Append(Handle, Encoding.UTF8.GetBytes(line + "\n"));
}
