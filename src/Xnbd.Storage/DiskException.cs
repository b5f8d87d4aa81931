using Xnbd.Linux;

namespace Xnbd.Storage;

/// <summary>Why an operation on a disk failed, as far as a client is told.</summary>
public enum DiskError
{
    /// <summary>The medium, a file system or a peer failed.</summary>
    Io,

    /// <summary>No space is left, or a quota or size limit is reached.</summary>
    NoSpace,

    /// <summary>The operation is not permitted.</summary>
    Permission,

    /// <summary>Memory is short.</summary>
    NoMemory,

    /// <summary>It cannot be done as fast as was asked.</summary>
    NotSupported,

    /// <summary>
    /// The disk is being replaced. The disk that stands for both of them tries the operation again on the next disk.
    /// </summary>
    Replaced,
}

/// <summary>A disk's operation failed, or a disk could not be opened. The message names operation, place and cause.</summary>
public class DiskException : Exception
{
    /// <summary>A failure with a message of its own.</summary>
    public DiskException(DiskError error, string message)
        : base(message) => Error = error;

    /// <summary>A failed system call on a range.</summary>
    /// <param name="operation">What was tried, such as "read".</param>
    /// <param name="path">The file it was tried on.</param>
    /// <param name="offset">Of the range, in bytes.</param>
    /// <param name="length">Of the range, in bytes.</param>
    /// <param name="errno">What the kernel said.</param>
    public DiskException(string operation, string path, long offset, long length, Errno errno)
        : this(Classify(errno), $"{operation} of {length} bytes at {offset} of '{path}': {errno.Describe()}")
    {
    }

    /// <summary>The kind of failure.</summary>
    public DiskError Error { get; }

    /// <summary>The kind of failure that an error number stands for.</summary>
    public static DiskError Classify(Errno errno) => errno switch
    {
        Errno.ENOSPC or Errno.EDQUOT or Errno.EFBIG => DiskError.NoSpace,
        Errno.EPERM or Errno.EACCES or Errno.EROFS => DiskError.Permission,
        Errno.ENOMEM => DiskError.NoMemory,
        _ => DiskError.Io,
    };
}
