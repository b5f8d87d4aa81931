namespace Xnbd.Linux;

/// <summary>The process itself: its session and its name.</summary>
public static class LinuxProcess
{
    /// <summary>Identifies the time since the machine was started last.</summary>
    public static Guid BootId { get; } = Guid.Parse(File.ReadAllText("/proc/sys/kernel/random/boot_id").Trim());

    /// <summary>Leaves the session of the terminal that started this process.</summary>
    public static Errno StartSession() => LibC.Outcome(LibC.SetSid());

    /// <summary>
    /// Sets the process's name, by which <c>pidof</c> and <c>ps</c> find it; the kernel keeps 15 bytes. It must be
    /// called on the first thread.
    /// </summary>
    public static unsafe void SetName(string name)
    {
        const int setName = 15; // PR_SET_NAME
        byte[] text = [.. System.Text.Encoding.UTF8.GetBytes(name), 0];
        fixed (byte* start = text)
            _ = LibC.PrCtl(setName, start, 0, 0, 0);
    }
}
