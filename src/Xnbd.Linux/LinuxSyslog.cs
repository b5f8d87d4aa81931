using System.Runtime.InteropServices;

namespace Xnbd.Linux;

/// <summary>Severities of <see cref="LinuxSyslog"/>, with the numbers of <c>syslog.h</c>.</summary>
public enum SyslogSeverity
{
    /// <summary>An error.</summary>
    Error = 3,

    /// <summary>A warning.</summary>
    Warning = 4,

    /// <summary>Informational.</summary>
    Information = 6,

    /// <summary>For debugging.</summary>
    Debug = 7,
}

/// <summary>The system log, facility <c>daemon</c>.</summary>
public static class LinuxSyslog
{
    private const int LogWithProcessId = 1;
    private const int FacilityDaemon = 3 << 3;

    /// <summary>Sets the program's name for all further lines.</summary>
    /// <remarks>The name is never freed, since the C library keeps the pointer.</remarks>
    public static void Open(string program)

        => LibC.OpenLog(Marshal.StringToCoTaskMemUTF8(program), LogWithProcessId, FacilityDaemon);

    /// <summary>Logs one line.</summary>
    public static void Write(SyslogSeverity severity, string message)
        => LibC.SysLog(FacilityDaemon | (int)severity, "%s", message);
}
