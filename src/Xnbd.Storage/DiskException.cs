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

    /// <summary>
    /// Another program uses the file in a way that excludes this use; see <see cref="InUseException"/>.
    /// </summary>
    InUse,

    /// <summary>
    /// Two things do not belong together: a layer or a map was made for another disk, or the disk has another length or
    /// other contents than it had then.
    /// </summary>
    Mismatch,

    /// <summary>
    /// A file does not have the format that it should have: it is a file of another kind, a checksum is wrong, or it is
    /// too short.
    /// </summary>
    Damaged,

    /// <summary>A peer did not answer in time.</summary>
    TimedOut,

    /// <summary>There is no connection to a peer, and none can be made.</summary>
    Unreachable,
}

/// <summary>
/// What a person can do about a failure, where the kind does not say it. The programs name the command or the option
/// that does it; this project knows neither.
/// </summary>
public enum Remedy
{
    /// <summary>There is nothing in particular to do.</summary>
    None,

    /// <summary>Open the image for reading only.</summary>
    OpenReadOnly,

    /// <summary>Name a directory for the layer.</summary>
    NameLayerDirectory,

    /// <summary>Bind the layer to its base as the base is now.</summary>
    BindToChangedBase,

    /// <summary>Complete the commit of the layer <see cref="DiskException.RemedyPath"/>.</summary>
    CompleteCommit,

    /// <summary>Complete the emptying of the layer <see cref="DiskException.RemedyPath"/>.</summary>
    CompleteDiscard,

    /// <summary>Let the cache overwrite the data that its image holds.</summary>
    OverwriteImage,

    /// <summary>Give up all that is cached, and start with an empty map.</summary>
    ClearMap,

    /// <summary>Take over a bitmap of the original xNBD, or start with an empty map.</summary>
    ImportOrClearMap,

    /// <summary>Bind the map to the origin's new address, if it is the same disk.</summary>
    RebindMap,

    /// <summary>Fetch first all that is missing.</summary>
    CacheAll,

    /// <summary>Say that the origin does not change any more.</summary>
    BeginKeeping,
}

/// <summary>
/// A disk's operation failed, or a disk could not be opened. The message names operation, place and cause.
/// </summary>
public class DiskException : Exception
{
    /// <summary>A failure with a message of its own.</summary>
    /// <param name="error">The kind of failure.</param>
    /// <param name="message">What failed, on what, and why.</param>
    /// <param name="remedy">What can be done about it.</param>
    /// <param name="remedyPath">The file that this is to be done with, if the remedy needs one.</param>
    public DiskException(DiskError error, string message, Remedy remedy = Remedy.None, string? remedyPath = null)
        : base(message) => (Error, Remedy, RemedyPath) = (error, remedy, remedyPath);

    /// <summary>A failed system call on a range.</summary>
    /// <param name="operation">What was tried, such as "read".</param>
    /// <param name="path">The file it was tried on.</param>
    /// <param name="offset">Offset of the range in bytes.</param>
    /// <param name="length">Length of the range in bytes.</param>
    /// <param name="errno">The kernel's error number.</param>
    public DiskException(string operation, string path, long offset, long length, Errno errno)
        : this(Classify(errno), $"{operation} of {length} bytes at {offset} of '{path}': {errno.Describe()}")
    {
    }

    /// <summary>The kind of failure.</summary>
    public DiskError Error { get; }

    /// <summary>What a person can do about it.</summary>
    public Remedy Remedy { get; }

    /// <summary>The file that <see cref="Remedy"/> is for; null if it needs none.</summary>
    public string? RemedyPath { get; }

    /// <summary>The kind of failure that an error number stands for.</summary>
    public static DiskError Classify(Errno errno) => errno switch
    {
        Errno.ENOSPC or Errno.EDQUOT or Errno.EFBIG => DiskError.NoSpace,
        Errno.EPERM or Errno.EACCES or Errno.EROFS => DiskError.Permission,
        Errno.ENOMEM => DiskError.NoMemory,
        _ => DiskError.Io,
    };
}
