using System.Globalization;
using System.Text;
using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;

namespace Xnbd.Programs;

/// <summary>
/// A file with the number of the server's process. Its first byte is locked as long as the process lives: a file
/// without the lock was left by a killed server. (<c>flock</c> is not used, since some runtimes refuse to read a file
/// that is locked by it.) The file is empty until the server listens.
/// </summary>
internal sealed class PidFile : IDisposable
{
    /// <summary>A number and an end of line are shorter than this, in bytes.</summary>
    private const int MaxText = 24;

    private readonly string _path;
    private readonly SafeFileHandle _file;

    private PidFile(string path, SafeFileHandle file)
    {
        _path = path;
        _file = file;
    }

    /// <summary>Creates the file, or takes over one that a dead process has left.</summary>
    /// <exception cref="FailureException">A running server holds it, or it cannot be created.</exception>
    public static PidFile Open(string path)
    {
        while (true)
        {
            // Opening a FIFO would wait for its reader.
            if (LinuxFile.Status(path, out FileStatus there) == Errno.None && there.Kind != FileKind.Regular)
                throw new FailureException($"the pid file '{path}' is not a regular file");
            Errno errno = LinuxFile.Open(path, OpenMode.Append, out SafeFileHandle? file);
            if (errno == Errno.None)
                errno = LinuxFile.TryLockByte(file!, 0, shared: false);
            if (errno == Errno.EAGAIN)
            {
                file!.Dispose();
                throw new FailureException($"the pid file '{path}' belongs to another server{Read(path)}");
            }

            if (errno != Errno.None)
            {
                file?.Dispose();
                throw new FailureException($"cannot create the pid file '{path}': {errno.Describe()}");
            }

            var opened = new PidFile(path, file!);
            if (opened.IsInPlace)
            {
                if (!HoldsNumber(path))
                {
                    file!.Dispose();
                    throw new FailureException(
                        $"'{path}' is not a pid file: it holds something other than a number, and is left alone");
                }

                _ = LinuxFile.Truncate(file!, 0); // it names a dead process
                return opened;
            }

            file!.Dispose(); // its server has just ended and removed it
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

    /// <summary>Removes the file if it still belongs to this process.</summary>
    public void Dispose()
    {
        if (IsInPlace)
            _ = LinuxFile.Unlink(_path);
        _file.Dispose();
    }

    private bool IsInPlace => LinuxFile.Status(_path, out FileStatus there) == Errno.None
        && LinuxFile.Status(_file, out FileStatus here) == Errno.None && there.IsSameFile(here);

    /// <summary>Whether the file is empty or holds a number. Any other file may be a disk image.</summary>
    private static bool HoldsNumber(string path)
        => ReadStart(path) is { Length: < MaxText } text && text.Trim().All(char.IsAsciiDigit);

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
            Span<byte> text = stackalloc byte[MaxText];
            long count = LinuxFile.Read(file!, text, 0);
            return count < 0 ? null : Encoding.Latin1.GetString(text[..(int)count]);
        }
    }
}
