using System.Runtime.InteropServices;
using System.Text;

namespace Xnbd.Linux;

/// <summary>
/// A program that this process has started, without a shell between. It has a session and a process group of its own,
/// no blocked signals, /dev/null as stdin and stdout, and this process's stderr.
/// <para>
/// States: running; ended, once <see cref="TryWait"/> has said so. Until then its process id cannot belong to
/// another process. One thread uses it.
/// </para>
/// </summary>
public sealed unsafe class LinuxChild
{
    private readonly int _id;

    private LinuxChild(int id) => _id = id;

    /// <summary>Whether a path names a file that this process may execute.</summary>
    public static bool CanStart(string path)
    {
        const int execute = 1; // X_OK
        return LinuxFile.Status(path, out FileStatus status) == Errno.None
            && status.Kind == FileKind.Regular
            && LibC.Access(path, execute) == 0;
    }

    /// <summary>Starts a program without arguments.</summary>
    /// <param name="path">Its path.</param>
    /// <param name="environment">Its whole environment, each as <c>NAME=VALUE</c> without NUL characters.</param>
    /// <param name="child">The program, if it was started.</param>
    /// <returns>Why it could not be started.</returns>
    public static Errno Start(string path, IReadOnlyList<string> environment, out LinuxChild? child)
    {
        const int roomForOpaque = 1024; // the attributes take 336 bytes and the actions 80
        const short setSignalDefaults = 4, setSignalMask = 8, setSession = 128; // POSIX_SPAWN_...
        const int writeOnly = 1;
        byte* attributes = stackalloc byte[roomForOpaque], actions = stackalloc byte[roomForOpaque];
        var noSignals = default(LibC.SignalSet);
        var allSignals = new LibC.SignalSet { First = ulong.MaxValue };
        var texts = new List<nint>();
        int id = 0, error;
        _ = LibC.SpawnAttributesInit(attributes);
        _ = LibC.SpawnActionsInit(actions);
        try
        {
            nint program = Text(path), nothing = Text("/dev/null");
            nint* arguments = stackalloc nint[] { program, 0 };
            nint[] variables = [.. environment.Select(Text), 0];
            _ = LibC.SpawnSetFlags(attributes, setSignalDefaults | setSignalMask | setSession);
            _ = LibC.SpawnSetSignalMask(attributes, &noSignals);
            _ = LibC.SpawnSetSignalDefault(attributes, &allSignals);
            error = LibC.SpawnAddOpen(actions, 0, nothing, 0, 0);
            if (error == 0)
                error = LibC.SpawnAddOpen(actions, 1, nothing, writeOnly, 0);
            fixed (nint* start = variables)
            {
                if (error == 0)
                    error = LibC.Spawn(&id, program, actions, attributes, arguments, start);
            }
        }
        finally
        {
            _ = LibC.SpawnActionsDestroy(actions);
            _ = LibC.SpawnAttributesDestroy(attributes);
            texts.ForEach(Marshal.FreeHGlobal);
        }

        child = error == 0 ? new LinuxChild(id) : null;
        return (Errno)error;

        nint Text(string text)
        {
            byte[] bytes = [.. Encoding.UTF8.GetBytes(text), 0];
            nint copy = Marshal.AllocHGlobal(bytes.Length);
            texts.Add(copy);
            Marshal.Copy(bytes, 0, copy, bytes.Length);
            return copy;
        }
    }

    /// <summary>Looks whether the program has ended, and releases it if so. Not to be called again then.</summary>
    /// <param name="exitCode">Its exit code; the negated number of the signal that has ended it.</param>
    /// <returns>False while it is running.</returns>
    public bool TryWait(out int exitCode)
    {
        const int noHang = 1; // WNOHANG
        int status = 0;
        int answer = LibC.WaitPid(_id, &status, noHang);
        int signal = status & 0x7f;
        exitCode = signal == 0 ? (status >> 8) & 0xff : -signal;
        return answer != 0; // an error: somebody else has released it
    }

    /// <summary>Ends the program, and all that it has started in its process group.</summary>
    public void Kill()
    {
        const int kill = 9; // SIGKILL
        _ = LibC.Kill(-_id, kill);
    }
}
