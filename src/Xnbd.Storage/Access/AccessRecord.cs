using System.Globalization;
using System.Numerics;
using System.Runtime.InteropServices;
using System.Text;
using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;

namespace Xnbd.Storage.Access;

/// <summary>
/// A record of the blocks that clients touch, each block once, in order and with times: a text file
/// (docs/formats.md), by which the same blocks can be fetched before they are asked for.
/// <para>
/// States: recording; then stopped, for good, since the record is full, the file cannot be written, or the server
/// ends. <c>_lock</c> guards all of the fields, and is held for a moment; <c>_writing</c> is held while the file is
/// written, which a timer does: clients never wait for the file. It is taken before <c>_lock</c>.
/// </para>
/// What survives: what was recorded a second before a death of the process.
/// </summary>
public sealed class AccessRecord : IDisposable
{
    /// <summary>The record ends after so many ranges, which bounds file and memory; some 30 MB.</summary>
    internal const int MaxRanges = 1_000_000;

    /// <summary>Ranges that follow each other become one, up to so many blocks: 1 MiB.</summary>
    private const int MaxMergedBlocks = 256;

    /// <summary>How many blocks a word of the set of touched blocks has.</summary>
    private const int WordBlocks = 64;

    private static readonly TimeSpan s_writeInterval = TimeSpan.FromSeconds(1);

    private readonly Lock _lock = new();
    private readonly Lock _writing = new();
    private readonly Dictionary<long, ulong> _touched = []; // a bit for each block
    private readonly StringBuilder _text = new(); // that is to be written
    private readonly FileStream _file;
    private readonly TimeProvider _time;
    private readonly long _start;
    private readonly Timer _timer;
    private readonly Action<string> _stopped;
    private readonly int _maxRanges;
    private BlockRange _last; // not in the text yet; none if it is empty
    private TimeSpan _lastAt;
    private int _ranges;
    private long _written; // length of the file before a write; guarded by _writing, as is the next one
    private bool _isClosed;
    private bool _isStopped;

    /// <summary>Begins a record.</summary>
    /// <param name="path">Path of the file. A record that exists is continued.</param>
    /// <param name="diskLength">Length of the disk in bytes; a comment of the record names it.</param>
    /// <param name="stopped">Told why the record ends before the server does.</param>
    /// <param name="time">The clock; the system's unless given.</param>
    /// <param name="maxRanges">The record ends after so many ranges.</param>
    /// <exception cref="DiskException">The file cannot be written.</exception>
    public AccessRecord(
        string path,
        long diskLength,
        Action<string> stopped,
        TimeProvider? time = null,
        int maxRanges = MaxRanges)
    {
        (_stopped, _maxRanges, _time) = (stopped, maxRanges, time ?? TimeProvider.System);
        _start = _time.GetTimestamp();
        _file = Open(path);
        try
        {
            _file.Write(Encoding.UTF8.GetBytes(
                $"# what clients have read of a disk of {diskLength} bytes: seconds, offset, length\n"));
        }
        catch (IOException failure)
        {
            _file.Dispose();
            throw new DiskException(DiskError.Io, $"the record cannot be written: {failure.Message}");
        }

        _timer = new Timer(_ => Write(), null, s_writeInterval, s_writeInterval);
    }

    /// <summary>A client touches a range.</summary>
    /// <param name="offset">Offset in bytes.</param>
    /// <param name="length">Length in bytes.</param>
    public void Note(long offset, long length)
    {
        BlockRange range = BlockRange.Touching(offset, length);
        lock (_lock)
        {
            while (range.Count > 0 && !_isStopped)
            {
                long word = range.First / WordBlocks;
                int first = (int)(range.First % WordBlocks), count = (int)Math.Min(WordBlocks - first, range.Count);
                ulong bits = (ulong.MaxValue >> (WordBlocks - count)) << first;
                ref ulong touched = ref CollectionsMarshal.GetValueRefOrAddDefault(_touched, word, out _);
                ulong added = bits & ~touched;
                touched |= bits;
                AddAll(word * WordBlocks, added); // this may clear the set
                range = range.After(new BlockRange(range.First, count));
            }
        }
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        _timer.Dispose();
        Write();
        lock (_writing)
        {
            lock (_lock)
                _isStopped = true;
            _isClosed = true;
            _file.Dispose();
        }
    }

    /// <summary>Opens the file, and keeps other servers from it until it is closed.</summary>
    private static FileStream Open(string path)
    {
        if (LinuxFile.Status(path, out FileStatus status) == Errno.None && status.Kind != FileKind.Regular)
            throw new DiskException(DiskError.Damaged, $"the record '{path}' is not a regular file");
        Errno errno = LinuxFile.Open(path, OpenMode.Append, out SafeFileHandle? file);
        if (errno != Errno.None)
            throw new DiskException(DiskError.Io, $"the record '{path}' cannot be written: {errno.Describe()}");
        if (LinuxFile.TryLockByte(file!, 0, shared: false) == Errno.EAGAIN) // some file systems have no locks
        {
            file!.Dispose();
            throw new DiskException(DiskError.InUse, $"another server writes the record '{path}'");
        }

        return new FileStream(file!, FileAccess.Write, bufferSize: 0);
    }

    /// <summary>Adds the blocks of a word whose bits are set.</summary>
    private void AddAll(long start, ulong bits)
    {
        while (bits != 0)
        {
            int first = BitOperations.TrailingZeroCount(bits);
            int count = BitOperations.TrailingZeroCount(~(bits >> first));
            Add(new BlockRange(start + first, count));
            bits &= ~((ulong.MaxValue >> (WordBlocks - count)) << first);
        }
    }

    private void Add(BlockRange run)
    {
        while (run.Count > 0 && !_isStopped)
        {
            long room = _last.Count > 0 && run.First == _last.End ? MaxMergedBlocks - _last.Count : 0;
            if (room == 0)
            {
                EndLast();
                (_last, _lastAt, room) = (run with { Count = 0 }, _time.GetElapsedTime(_start), MaxMergedBlocks);
                if (_isStopped)
                    break;
            }

            long count = Math.Min(room, run.Count);
            _last = _last with { Count = _last.Count + count };
            run = run.After(run with { Count = count });
        }
    }

    private void EndLast()
    {
        if (_last.Count == 0)
            return;
        _text.Append(
            CultureInfo.InvariantCulture,
            $"{_lastAt.TotalSeconds:0.000} {_last.Offset} {_last.Count * BlockRange.BlockSize}\n");
        _last = default;
        if (++_ranges < _maxRanges)
            return;
        _isStopped = true;
        _touched.Clear();
    }

    private void Write()
    {
        string? why = null;
        lock (_writing)
        {
            if (_isClosed)
                return;
            string text;
            bool isFull;
            lock (_lock)
            {
                bool wasStopped = _isStopped;
                EndLast();
                text = _text.ToString();
                _text.Clear();
                isFull = _isStopped && (!wasStopped || text.Length > 0);
            }

            if (text.Length == 0)
                return;
            try
            {
                _written = _file.Length;
                _file.Write(Encoding.UTF8.GetBytes(text));
                if (isFull)
                    why = $"it has {_ranges} ranges";
            }
            catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
            {
                why = failure.Message;
                CutLine();
                lock (_lock)
                {
                    _isStopped = true;
                    _touched.Clear();
                }
            }
        }

        if (why is not null)
            _stopped(why);
    }

    /// <summary>Takes back what a full disk has cut in the middle of a line.</summary>
    private void CutLine()
    {
        try
        {
            _file.SetLength(_written);
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            // Then the line is wrong, and whoever reads the record is told which one it is.
        }
    }
}
