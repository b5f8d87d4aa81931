using System.Globalization;
using System.Text;
using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;

namespace Xnbd.Programs;

/// <summary>
/// A file that names the server's process. Its first byte is locked as long as the process lives, so a file that a
/// killed server has left is told from one that is in use. (Not with <c>flock</c>: some runtimes refuse to read a file
/// that is locked so.) The file is empty until the server listens.
/// </summary>
internal sealed class PidFile : IDisposable
{
    /// <summary>A number and an end of line are shorter than this, in bytes.</summary>
    private const int MostText = 24;

    private readonly string _path;
    private readonly SafeFileHandle _file;

    private PidFile(string path, SafeFileHandle file)
    {
        _path = path;
        _file = file;
    }

    /// <summary>Makes the file, or takes over one that a dead process has left.</summary>
    /// <exception cref="FailureException">A living server holds it, or it cannot be made.</exception>
    public static PidFile Open(string path)
    {
        while (true)
        {
            // Opening a FIFO would wait for its reader.
            if (LinuxFile.Status(path, out FileStatus there) == Errno.None && there.Kind != FileKind.Regular)
                throw new FailureException($"the pid file '{path}' is no regular file");
            Errno errno = LinuxFile.Open(path, OpenMode.Append, out SafeFileHandle? file);
            if (errno == Errno.None)
                errno = LinuxFile.TryLockByte(file!, 0, shared: false);
            if (errno == Errno.EAGAIN)
            {
                file!.Dispose();
                throw new FailureException($"the pid file '{path}' is that of another server{Read(path)}");
            }

            if (errno != Errno.None)
            {
                file?.Dispose();
                throw new FailureException($"cannot make the pid file '{path}': {errno.Describe()}");
            }

            var opened = new PidFile(path, file!);
            if (opened.IsInPlace)
            {
                if (!HoldsNumber(path))
                {
                    file!.Dispose();
                    throw new FailureException($"'{path}' is no pid file: it holds something else than a number, and is left alone");
                }

                _ = LinuxFile.Truncate(file!, 0); // what is in it is a dead process's
                return opened;
            }

            file!.Dispose(); // its server has just ended, and removed it
        }
    }

    /// <summary>Writes the process's number.</summary>
    /// <exception cref="FailureException">It cannot be written.</exception>
    public void Write()
    {
        byte[] line = Encoding.ASCII.GetBytes(Environment.ProcessId.ToString(CultureInfo.InvariantCulture) + "\n");
        long count = LinuxFile.Append(_file, line);
        if (count == line.Length)
            return;
        string cause = count < 0 ? Errno.Of(count).Describe() : "no space";
        throw new FailureException($"cannot write the pid file '{_path}': {cause}");
    }

    /// <summary>Removes the file, if it is still this process's.</summary>
    public void Dispose()
    {
        if (IsInPlace)
            _ = LinuxFile.Unlink(_path);
        _file.Dispose();
    }

    private bool IsInPlace => LinuxFile.Status(_path, out FileStatus there) == Errno.None
        && LinuxFile.Status(_file, out FileStatus here) == Errno.None && there.IsSameFile(here);

    /// <summary>The file is empty, or names a process, as such files do. Any other one may be somebody's disk.</summary>
    private static bool HoldsNumber(string path)
        => ReadStart(path) is { Length: < MostText } text && text.Trim().All(char.IsAsciiDigit);

    private static string Read(string path) => ReadStart(path)?.Trim() switch
    {
        null => "",
        "" => ", which is starting",
        string number => $", process {number}",
    };

    /// <returns>Null when it cannot be read.</returns>
    private static string? ReadStart(string path)
    {
        if (LinuxFile.Open(path, OpenMode.ReadOnly, out SafeFileHandle? file) != Errno.None)
            return null;
        using (file)
        {
            Span<byte> text = stackalloc byte[MostText];
            long count = LinuxFile.Read(file!, text, 0);
            return count < 0 ? null : Encoding.Latin1.GetString(text[..(int)count]);
        }
    }
}
