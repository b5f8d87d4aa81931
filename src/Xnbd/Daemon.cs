using System.Diagnostics;
using System.Globalization;
using Xnbd.Linux;

namespace Xnbd.Programs;

/// <summary>
/// Going into the background. A .NET process cannot fork, so the parent starts the same program again. It waits on a
/// pipe (the child's stdout) until the child says that it serves. If the child fails, its messages on stderr say why.
/// If the parent is killed before that, the child ends, too: whoever has killed it counts on a start that has failed,
/// and will use the image.
/// </summary>
internal static class Daemon
{
    private const string ChildVariable = "XNBD_DAEMON";
    private const string Ready = "ready";

    /// <summary>
    /// Whether this process was started by <see cref="Start"/>. It can be asked only once, since children must not
    /// inherit the answer.
    /// </summary>
    /// <param name="program">The program's name.</param>
    public static bool IsChild(string program)
    {
        string? parent = Environment.GetEnvironmentVariable(ChildVariable);
        if (parent is not null)
        {
            LinuxProcess.EndWithParent(true);
            if (LinuxProcess.ParentId.ToString(CultureInfo.InvariantCulture) != parent)
                Environment.Exit(ExitCode.Failure); // it was killed before this
            Environment.SetEnvironmentVariable(ChildVariable, null);
            _ = LinuxProcess.StartSession();
            LinuxProcess.SetName(program); // in case there was no link of that name
        }

        return parent is not null;
    }

    /// <summary>Starts a program of this executable in the background.</summary>
    /// <returns>Its exit code, or success once it serves.</returns>
    /// <exception cref="FailureException">The program cannot be started.</exception>
    public static int Start(string program, IEnumerable<string> args)
    {
        string? link = FindLink(program);
        var start = new ProcessStartInfo(link ?? Environment.ProcessPath!, link is null ? [program, .. args] : args)
        {
            RedirectStandardOutput = true,
            UseShellExecute = false,
        };
        start.Environment[ChildVariable] = Environment.ProcessId.ToString(CultureInfo.InvariantCulture);
        using Process child = StartChild(start);
        if (child.StandardOutput.ReadLine() == Ready)
            return ExitCode.Success;
        child.WaitForExit();
        return child.ExitCode == ExitCode.Success ? ExitCode.Failure : child.ExitCode;
    }

    private static Process StartChild(ProcessStartInfo start)
    {
        try
        {
            return Process.Start(start)!;
        }
        catch (Exception failure) when (failure is System.ComponentModel.Win32Exception or OutOfMemoryException)
        {
            throw new FailureException($"cannot go into the background: {failure.Message}");
        }
    }

    /// <summary>
    /// Finds the link with the program's name by which this executable was called, or which is in the same folder.
    /// </summary>
    /// <returns>The link; null if there is none.</returns>
    /// <remarks>A process that is started through the link has its name, so <c>pidof</c> finds it.</remarks>
    private static string? FindLink(string program)
    {
        string called = Environment.GetCommandLineArgs()[0];
        if (LinuxFile.Status(Environment.ProcessPath!, out FileStatus own) != Errno.None)
            return null;
        IEnumerable<string> folders = called.Contains('/', StringComparison.Ordinal)
            ? [Path.GetDirectoryName(Path.GetFullPath(called))!]
            : Environment.GetEnvironmentVariable("PATH")?.Split(':', StringSplitOptions.RemoveEmptyEntries) ?? [];
        return folders.Append(Path.GetDirectoryName(Environment.ProcessPath)!)
            .Select(folder => Path.GetFullPath(Path.Combine(folder, program)))
            .FirstOrDefault(
                path => LinuxFile.Status(path, out FileStatus there) == Errno.None && there.IsSameFile(own));
    }

    /// <summary>In the child: tells the parent that this process serves, and releases terminal and directory.</summary>
    public static void SayReady()
    {
        LinuxProcess.EndWithParent(false); // it ends as soon as it knows
        Console.Out.WriteLine(Ready);
        Console.Out.Flush();
        StandardStreams.RedirectToNull(0, 1, 2);
        Environment.CurrentDirectory = "/";
    }
}
