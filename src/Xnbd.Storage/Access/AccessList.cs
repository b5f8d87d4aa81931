using System.Globalization;
using Xnbd.Linux;

namespace Xnbd.Storage.Access;

/// <summary>Reads what an <see cref="AccessRecord"/> has written, or a person: ranges of a disk, in order.</summary>
public static class AccessList
{
    /// <summary>A file that is longer is refused: a full record has some 30 MB.</summary>
    private const long MaxFileBytes = 64L << 20;

    /// <summary>Reads a file.</summary>
    /// <param name="path">Path of the file.</param>
    /// <param name="diskLength">Length of the disk in bytes; a range that goes beyond it is refused.</param>
    /// <returns>The ranges, in the order of the file.</returns>
    /// <exception cref="DiskException">It cannot be read, or a line is wrong; the message names the line.</exception>
    public static IReadOnlyList<BlockRange> Read(string path, long diskLength)
    {
        try
        {
            if (LinuxFile.Status(path, out FileStatus status) == Errno.None
                && (status.Kind != FileKind.Regular || status.Length > MaxFileBytes))
            {
                throw new DiskException(DiskError.Damaged, $"'{path}' is not a record, or is too long");
            }

            using FileStream file = File.OpenRead(path);
            using var reader = new StreamReader(file);
            var ranges = new List<BlockRange>();
            for (int number = 1; reader.ReadLine() is { } line; number++)
            {
                string[] words = line.Split((char[]?)null, StringSplitOptions.RemoveEmptyEntries);
                if (words.Length == 0 || words[0].StartsWith('#'))
                    continue;
                if (words.Length != 3 || !IsNumber(words[1], out long offset) || !IsNumber(words[2], out long length)
                    || !double.TryParse(words[0], CultureInfo.InvariantCulture, out _))
                {
                    throw new DiskException(
                        DiskError.Damaged, $"'{path}', line {number}: not three numbers, SECONDS OFFSET LENGTH");
                }

                // The record counts in blocks: its last one may go beyond the end.
                long end = BlockRange.CountOf(diskLength) * BlockRange.BlockSize;
                if (offset >= diskLength || length > end - offset)
                {
                    throw new DiskException(
                        DiskError.Mismatch,
                        $"'{path}', line {number}: the range is outside of the disk, which has {diskLength} bytes");
                }

                if (ranges.Count == AccessRecord.MaxRanges)
                    throw new DiskException(DiskError.Damaged, $"'{path}' has more than {ranges.Count} ranges");
                if (length > 0)
                    ranges.Add(BlockRange.Touching(offset, length));
            }

            return ranges;
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException or ArgumentException)
        {
            throw new DiskException(DiskError.Io, $"the record cannot be read: {failure.Message}");
        }
    }

    private static bool IsNumber(string word, out long number)
        => long.TryParse(word, NumberStyles.None, CultureInfo.InvariantCulture, out number);
}
