using System.Runtime.InteropServices;

namespace Xnbd.Linux;

/// <summary>
/// Linux error numbers that xNBD tells apart. The calls of this project return a count or a negated error
/// number, as the kernel does: on the data path an error is a value, not an exception.
/// </summary>
public enum Errno
{
    /// <summary>Success.</summary>
    None = 0,

    /// <summary>Operation not permitted.</summary>
    EPERM = 1,

    /// <summary>No such file or directory.</summary>
    ENOENT = 2,

    /// <summary>Interrupted system call.</summary>
    EINTR = 4,

    /// <summary>Input/output error.</summary>
    EIO = 5,

    /// <summary>Try again: it would block.</summary>
    EAGAIN = 11,

    /// <summary>Out of memory.</summary>
    ENOMEM = 12,

    /// <summary>Permission denied.</summary>
    EACCES = 13,

    /// <summary>File exists.</summary>
    EEXIST = 17,

    /// <summary>No such device.</summary>
    ENODEV = 19,

    /// <summary>Is a directory.</summary>
    EISDIR = 21,

    /// <summary>Invalid argument.</summary>
    EINVAL = 22,

    /// <summary>File too large.</summary>
    EFBIG = 27,

    /// <summary>No space left on device.</summary>
    ENOSPC = 28,

    /// <summary>Read-only file system.</summary>
    EROFS = 30,

    /// <summary>Broken pipe.</summary>
    EPIPE = 32,

    /// <summary>Function not implemented.</summary>
    ENOSYS = 38,

    /// <summary>Too many levels of symbolic links, or one where none is allowed.</summary>
    ELOOP = 40,

    /// <summary>No such device or address; for SEEK_DATA: no data beyond.</summary>
    ENXIO = 6,

    /// <summary>Address already in use.</summary>
    EADDRINUSE = 98,

    /// <summary>Operation not supported.</summary>
    EOPNOTSUPP = 95,

    /// <summary>Connection reset by peer.</summary>
    ECONNRESET = 104,

    /// <summary>Not connected.</summary>
    ENOTCONN = 107,

    /// <summary>Connection timed out.</summary>
    ETIMEDOUT = 110,

    /// <summary>Disk quota exceeded.</summary>
    EDQUOT = 122,
}

/// <summary>Reads error numbers.</summary>
public static class ErrnoExtensions
{
    extension(Errno)
    {
        /// <summary>The error that a call returned instead of a count; <see cref="Errno.None"/> for a count.</summary>
        /// <param name="result">A count, or a negated error number.</param>
        public static Errno Of(long result) => result < 0 ? (Errno)(-result) : Errno.None;
    }

    /// <summary>The system's text for an error number, such as "No space left on device".</summary>
    public static string Describe(this Errno errno) => Marshal.GetPInvokeErrorMessage((int)errno);
}
