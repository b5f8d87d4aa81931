using System.Runtime.InteropServices;
using Microsoft.Win32.SafeHandles;

namespace Xnbd.Linux;

/// <summary>The process itself: session and standard descriptors.</summary>
public static class LinuxProcess
{
    /// <summary>Tells this run of the machine from all others.</summary>
    public static Guid BootId { get; } = Guid.Parse(File.ReadAllText("/proc/sys/kernel/random/boot_id").Trim());

    /// <summary>Leaves the session of the terminal that started this process.</summary>
    public static Errno StartSession() => LibC.Outcome(LibC.SetSid());

    /// <summary>
    /// Sets the process's name, by which <c>pidof</c> and <c>ps</c> find it; the kernel keeps 15 bytes. For the first
    /// thread.
    /// </summary>
    public static unsafe void SetName(string name)
    {
        const int setName = 15; // PR_SET_NAME
        byte[] text = [.. System.Text.Encoding.UTF8.GetBytes(name), 0];
        fixed (byte* start = text)
            _ = LibC.PrCtl(setName, start, 0, 0, 0);
    }

    /// <summary>Makes descriptor <paramref name="to"/> another name for what <paramref name="from"/> stands for.</summary>
    public static Errno Duplicate(SafeHandle from, int to)
        => LibC.Outcome(LibC.Dup2((int)from.DangerousGetHandle(), to));

    /// <summary>Makes standard descriptors read nothing and write nowhere.</summary>
    /// <param name="descriptors">Which of 0, 1 and 2.</param>
    public static void RedirectToNull(params ReadOnlySpan<int> descriptors)
    {
        if (LinuxFile.Open("/dev/null", OpenMode.ReadWrite, out SafeFileHandle? nothing) != Errno.None)
            return;
        using (nothing)
        {
            foreach (int descriptor in descriptors)
                _ = Duplicate(nothing!, descriptor);
        }
    }
}

/// <summary>Severities of <see cref="LinuxSyslog"/>, with the numbers of <c>syslog.h</c>.</summary>
public enum SyslogSeverity
{
    /// <summary>An error.</summary>
    Error = 3,

    /// <summary>A warning.</summary>
    Warning = 4,

    /// <summary>Informational.</summary>
    Information = 6,

    /// <summary>For those who look for a fault in the program.</summary>
    Debug = 7,
}

/// <summary>The system log, facility <c>daemon</c>.</summary>
public static class LinuxSyslog
{
    private const int LogWithProcessId = 1;
    private const int FacilityDaemon = 3 << 3;

    /// <summary>Names the program in all lines to come.</summary>
    public static void Open(string program)
        => LibC.OpenLog(Marshal.StringToCoTaskMemUTF8(program), LogWithProcessId, FacilityDaemon); // syslog keeps the pointer

    /// <summary>Logs one line.</summary>
    public static void Write(SyslogSeverity severity, string message)
        => LibC.SysLog(FacilityDaemon | (int)severity, "%s", message);
}
