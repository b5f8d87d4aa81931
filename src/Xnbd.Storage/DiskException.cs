using Xnbd.Linux;

namespace Xnbd.Storage;

/// <summary>
/// The kind of a failure: what the caller may decide on. Code never looks into a message. Of the kinds, a client of the
/// server is told those for which NBD has an error value.
/// </summary>
public enum DiskError
{
    /// <summary>The medium, a file system or a peer failed, and no other kind fits.</summary>
    Io,

    /// <summary>No space is left, or a quota or size limit is reached.</summary>
    NoSpace,

    /// <summary>The operation is not permitted.</summary>
    Permission,

    /// <summary>Memory is short.</summary>
    NoMemory,

    /// <summary>This disk cannot do it, or cannot do it as fast as was asked.</summary>
    NotSupported,

    /// <summary>
    /// The disk is being replaced. The disk that stands for both of them tries the operation again on the next disk.
    /// </summary>
    Replaced,

    /// <summary>Another program uses the file in a way that excludes this use; see <see cref="InUseException"/>.</summary>
    InUse,

    /// <summary>
    /// Two things do not belong together: a layer or a map was made for another disk, or the disk has another length or
    /// other contents than it had then.
    /// </summary>
    Mismatch,

    /// <summary>A file breaks its own format: a checksum is wrong, or the file is too short.</summary>
    Damaged,

    /// <summary>A peer did not answer in time.</summary>
    TimedOut,

    /// <summary>There is no connection to a peer, and none can be made.</summary>
    Unreachable,
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
