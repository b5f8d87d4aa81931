using System.Runtime.InteropServices;
using Microsoft.Win32.SafeHandles;

namespace Xnbd.Linux;

/// <summary>Stdin, stdout and stderr, by their descriptors.</summary>
public static class StandardStreams
{
    /// <summary>
    /// Makes sure that stdin, stdout and stderr are open. A program that was started with <c>2&gt;&amp;-</c> has no
    /// stderr: the files that are opened first would get its number, and messages would be written to a disk image. The
    /// runtime has opened files before the program begins, so the program is started again in the same process, with
    /// /dev/null in place of each missing stream. This must be called before anything else.
    /// </summary>
    public static unsafe void OpenMissing()
    {
        const int getFlags = 1, setFlags = 2, closeOnExec = 1; // F_GETFD, F_SETFD, FD_CLOEXEC
        const nuint pathOfProgram = 31; // AT_EXECFN

        // An inherited descriptor has no such flag; those that the runtime opens have it.
        int[] missing =
            [.. Enumerable.Range(0, 3).Where(number => LibC.FCntl(number, getFlags, 0) is < 0 or closeOnExec)];
        if (missing.Length == 0
            || LinuxFile.Open("/dev/null", OpenMode.ReadWrite, out SafeFileHandle? nothing) != Errno.None)
            return;
        foreach (int number in missing)
        {
            _ = Duplicate(nothing!, number);
            _ = LibC.FCntl(number, setFlags, 0); // /dev/null may have got that number itself
        }

        byte[] words = File.ReadAllBytes("/proc/self/cmdline"); // each word ends with a zero byte
        int count = words.Count(letter => letter == 0);
        fixed (byte* first = words)
        {
            nint* arguments = stackalloc nint[count + 1];
            byte* next = first;
            for (int i = 0; i < count; i++)
            {
                arguments[i] = (nint)next;
                while (*next++ != 0)
                {
                }
            }

            arguments[count] = 0;
            _ = LibC.ExecV(LibC.GetAuxiliaryValue(pathOfProgram), arguments);
        }

        Environment.FailFast(null); // the runtime has lost its files, so no message can be printed
    }

    /// <summary>Redirects standard streams to /dev/null.</summary>
    /// <param name="descriptors">Some of 0, 1 and 2.</param>
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

    /// <summary>Makes descriptor <paramref name="to"/> a duplicate of <paramref name="from"/>.</summary>
    private static Errno Duplicate(SafeHandle from, int to)
        => LibC.Outcome(LibC.Dup2((int)from.DangerousGetHandle(), to));
}
