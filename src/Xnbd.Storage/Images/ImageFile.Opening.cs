using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;

namespace Xnbd.Storage.Images;

/// <content>The ways to open an image.</content>
public sealed partial class ImageFile
{
    /// <summary>Opens an image.</summary>
    /// <param name="path">A regular file or a block device.</param>
    /// <param name="readOnly">Open it for reading only.</param>
    /// <param name="use">What it is opened for: who else may use it at the same time.</param>
    /// <exception cref="DiskException">
    /// It is absent, in use, may not be opened, or is neither a file nor a block device.
    /// </exception>
    public static ImageFile Open(string path, bool readOnly, ImageUse use = ImageUse.Shared)
    {
        Errno errno = LinuxFile.Open(
            path, readOnly ? OpenMode.ReadOnly : OpenMode.ReadWrite, out SafeFileHandle? file);
        FileStatus status = default;
        if (errno == Errno.None)
            errno = LinuxFile.Status(file!, out status);
        long length = status.Length;
        if (errno == Errno.None && status.Kind == FileKind.Directory)
            errno = Errno.EISDIR;
        if (errno == Errno.None && status.Kind == FileKind.BlockDevice)
            errno = LinuxFile.BlockDeviceLength(file!, out length);
        if (errno == Errno.ENXIO && LinuxFile.Status(path, out status) == Errno.None
            && status.Kind is not (FileKind.Regular or FileKind.BlockDevice))
            throw NoImage(path); // a socket

        if (errno != Errno.None)
        {
            file?.Dispose();
            bool mayBeReadable = !readOnly && errno is Errno.EACCES or Errno.EROFS or Errno.EPERM;
            throw new DiskException(
                DiskException.Classify(errno),
                $"cannot open '{path}': {errno.Describe()}",
                mayBeReadable ? Remedy.OpenReadOnly : Remedy.None);
        }

        if (status.Kind is not (FileKind.Regular or FileKind.BlockDevice))
        {
            LockedFile.Close(file);
            throw NoImage(path);
        }

        try
        {
            ImageLock.Take(path, file!, readOnly, use);
            return new ImageFile(
                path, file!, status.Kind, start: 0, length, readOnly, cannotChange: use == ImageUse.Base);
        }
        catch
        {
            LockedFile.Close(file);
            throw;
        }
    }

    /// <summary>Opens the image of a cache that was switched, as the target mode opens its image.</summary>
    /// <param name="path">A regular file or a block device.</param>
    /// <param name="length">Length of the disk in bytes; what the file has beyond is not served.</param>
    /// <param name="readOnly">Open it for reading only.</param>
    /// <param name="excess">How many bytes a regular file has beyond; 0 for a block device, which may be larger than
    /// the disk from the start.</param>
    /// <exception cref="DiskException">It cannot be opened, is in use, or too short.</exception>
    internal static ImageFile OpenSwitched(string path, long length, bool readOnly, out long excess)
    {
        ImageFile whole = Open(path, readOnly, ImageUse.OnlyWriter);
        excess = whole._kind == FileKind.Regular ? whole.Length - length : 0;
        if (whole.Length == length)
            return whole;
        if (whole.Length > length)
            return new ImageFile(path, whole._file, whole._kind, start: 0, length, readOnly);
        whole.Dispose();
        throw new DiskException(
            DiskError.NoSpace,
            $"the cache image '{path}' has {whole.Length} bytes; the disk that was switched to it has {length}");
    }

    /// <summary>
    /// Makes a disk of a part of a regular file, such as the data of a layer. The disk owns the file from now on.
    /// </summary>
    /// <param name="path">The file's path, for messages.</param>
    /// <param name="file">The open file.</param>
    /// <param name="start">Where the part begins, in bytes; a multiple of 4096.</param>
    /// <param name="length">Length of the part in bytes; the file is long enough.</param>
    /// <param name="readOnly">The file is open for reading only, and nobody writes it as long as it is.</param>
    internal static ImageFile OfPart(string path, SafeFileHandle file, long start, long length, bool readOnly)
        => new(path, file, FileKind.Regular, start, length, readOnly, cannotChange: readOnly);

    /// <summary>
    /// Opens the image of a cache, for this process alone. A regular file is made if it is absent, and grown if it is
    /// too short.
    /// </summary>
    /// <param name="path">A file, or a block device that is long enough.</param>
    /// <param name="length">Length of the disk in bytes; what is beyond stays as it is.</param>
    /// <param name="mayGrow">A file that is absent or too short is expected; otherwise it is an error.</param>
    /// <param name="mayHoldData">
    /// A regular file may hold data already: there is a map that describes them, or they are given up.
    /// </param>
    /// <exception cref="DiskException">It cannot be opened, is in use, or too short.</exception>
    internal static ImageFile OpenCache(string path, long length, bool mayGrow, bool mayHoldData)
    {
        OpenMode mode = OpenMode.ReadWrite | (mayGrow ? OpenMode.Create : 0);
        Errno errno = LinuxFile.Open(path, mode, out SafeFileHandle? file);
        if (errno != Errno.None)
            throw LockedFile.Failure(errno, "open the cache image", path);
        try
        {
            ImageLock.Take(path, file!, readOnly: false, ImageUse.Alone);
            FileKind kind = PrepareCache(path, file!, length, mayGrow, mayHoldData);
            return new ImageFile(path, file!, kind, start: 0, length, readOnly: false);
        }
        catch
        {
            LockedFile.Close(file);
            throw;
        }
    }

    private static FileKind PrepareCache(string path, SafeFileHandle file, long length, bool mayGrow, bool mayHoldData)
    {
        Errno errno = LinuxFile.Status(file, out FileStatus status);
        bool isRegular = status.Kind == FileKind.Regular;
        long present = status.Length;
        if (errno == Errno.None && status.Kind == FileKind.BlockDevice)
            errno = LinuxFile.BlockDeviceLength(file, out present);
        else if (errno == Errno.None && !isRegular)
            throw new DiskException(DiskError.Damaged, $"'{path}' is neither a regular file nor a block device");
        if (errno == Errno.None && isRegular && !mayHoldData && LinuxFile.NextData(file, 0) >= 0)
        {
            throw new DiskException(
                DiskError.Mismatch,
                $"'{path}' holds data, and there is no map that says which blocks are right",
                Remedy.OverwriteImage);
        }

        if (errno == Errno.None && present < length)
        {
            if (!isRegular || !mayGrow)
            {
                throw new DiskException(
                    DiskError.NoSpace, $"the cache image '{path}' has {present} bytes; {length} are needed");
            }

            errno = LinuxFile.Truncate(file, length);
        }

        return errno == Errno.None ? status.Kind : throw LockedFile.Failure(errno, "use the cache image", path);
    }

    private static DiskException NoImage(string path)
        => new(DiskError.Damaged, $"cannot serve '{path}': neither a regular file nor a block device");
}
