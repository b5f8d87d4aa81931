using System.Runtime.CompilerServices;
using Xnbd.Protocol;
using Xnbd.Storage;

namespace Xnbd.Server;

/// <summary>What became of a read.</summary>
internal enum FastReadResult
{
    /// <summary>It has been answered.</summary>
    Answered,

    /// <summary>The rest of it must wait for the disk.</summary>
    MustWait,

    /// <summary>
    /// A disk thread is to read it, although its data may be in memory: <see cref="FastReads.SpareBytes"/> have been
    /// taken from the budget for it.
    /// </summary>
    ReadElsewhere,

    /// <summary>The connection is broken.</summary>
    Broken,
}

/// <summary>
/// Answers reads that need not wait for the disk, on the session's thread: a large read of a file that nobody changes
/// goes from the file to the socket; data in memory is copied into the output. A long read may go to a disk thread
/// instead, if that costs nobody anything. It has no state of its own.
/// </summary>
/// <param name="disk">What is read.</param>
/// <param name="budget">For long reads that another thread makes.</param>
/// <param name="output">Where replies are gathered.</param>
/// <param name="structured">Reads are answered with structured replies.</param>
/// <param name="sendsFiles">As <see cref="Connection.SendsFiles"/>.</param>
internal sealed class FastReads(
    Disk disk, RequestBudget budget, ReplyOutput output, bool structured, bool sendsFiles)
{
    /// <summary>Answers a read as far as that is possible without waiting for the disk.</summary>
    /// <param name="request">A read of at least one byte; becomes the rest that must wait.</param>
    /// <exception cref="DiskException">The disk failed. Chunks of the reply may have been sent, but not the last
    /// one.</exception>
    public FastReadResult TryAnswer(ref NbdRequest request)
    {
        if (sendsFiles && request.Length > ServerLimits.ReadPiece)
        {
            FastReadResult result = TryLocated(request);
            if (result != FastReadResult.MustWait)
                return result;
        }

        return TryCopied(ref request);
    }

    private bool MayCut(in NbdRequest request) => structured && (request.Flags & NbdCommandFlags.Df) == 0;

    /// <summary>Bytes of the budget that a read takes when another thread makes it.</summary>
    public static int SpareBytes(int length) => ReadChunks.HeaderRoom(length) + length;

    /// <summary>
    /// A long read may be made by a disk thread, also if its data are in memory, so that this thread can send
    /// meanwhile. The read could also be answered here and now, so it must wait for nothing there: neither for a thread
    /// or a processor, nor for bytes, nor for its turn.
    /// </summary>
    private bool TryTakeElsewhere(ulong cookie, int length)
        => length <= ServerLimits.MaxOverlappedRead
            && output.InFlight < ServerLimits.MaxOverlappedReads
            && !output.IsOrdered(cookie)
            && AdaptivePoll.HasFreeProcessor
            && disk.HasIdleReader
            && budget.TryAcquireSpare(SpareBytes(length));

    /// <summary>
    /// Copies data that are in memory into the output, behind their header. A long read goes piece by piece, if it may
    /// be cut; otherwise all of its data must be in hand before its header goes out.
    /// </summary>
    private FastReadResult TryCopied(ref NbdRequest request)
    {
        int length = (int)request.Length;
        bool mayCut = MayCut(request) && length > ServerLimits.MaxUncutRead;
        if (length > ServerLimits.MaxCopiedRead)
        {
            if (!mayCut)
                return FastReadResult.MustWait;
            if (TryTakeElsewhere(request.Cookie, length))
                return FastReadResult.ReadElsewhere;
        }

        int maxPiece = mayCut ? ServerLimits.ReadPiece : length;
        for (int done = 0; done < length;)
        {
            int pieceLength = Math.Min(length - done, maxPiece);
            var piece = request with { Offset = request.Offset + (ulong)done, Length = (uint)pieceLength };
            if (!output.TryReserve(ReadChunks.HeaderRoom(pieceLength) + pieceLength, out Span<byte> room))
                return FastReadResult.Broken;
            if (!TryPiece(piece, room, mayCut, isLast: done + pieceLength == length))
            {
                // What is gathered goes out first: another thread sends the last chunk, which must not overtake it.
                if (done > 0 && !output.Flush())
                    return FastReadResult.Broken;
                request = request with { Offset = piece.Offset, Length = (uint)(length - done) };
                return FastReadResult.MustWait;
            }

            done += pieceLength;
        }

        return FastReadResult.Answered;
    }

    /// <summary>Reads a piece of a reply into the output.</summary>
    /// <returns>False when it would wait for the disk.</returns>
    private bool TryPiece(in NbdRequest piece, Span<byte> room, bool mayCut, bool isLast)
    {
        int length = (int)piece.Length, header = structured ? ReadChunks.DataHeader : NbdSize.SimpleReply;
        Span<byte> data = room.Slice(header, length);
        if (!disk.TryRead((long)piece.Offset, data))
            return false;
        if (!structured)
        {
            output.Advance(NbdReply.WriteSimple(room, NbdError.None, piece.Cookie) + length);
            return true;
        }

        NbdChunkFlags flags = isLast ? NbdChunkFlags.Done : NbdChunkFlags.None;
        if (ReadChunks.RunLength(data, piece.Offset, mayCut, out bool isHole) < length)
        {
            int headers = ReadChunks.HeaderRoom(length);
            data.CopyTo(room[headers..]);
            output.Advance(ReadChunks.Write(room, headers, length, piece.Offset, piece.Cookie, mayCut, isLast).Length);
        }
        else if (isHole)
        {
            output.Advance(NbdReply.WriteOffsetHole(room, flags, piece.Cookie, piece.Offset, piece.Length));
        }
        else
        {
            output.Advance(NbdReply.WriteOffsetData(room, flags, piece.Cookie, piece.Offset, length) + length);
        }

        return true;
    }

    /// <summary>
    /// Sends a large read from a file that nobody changes, without a copy through this process; holes as holes.
    /// </summary>
    [MethodImpl(MethodImplOptions.NoInlining)] // small reads need not clear the ranges on the stack
    private FastReadResult TryLocated(in NbdRequest request)
    {
        var places = new FileRanges();
        Span<FileRange> ranges = places;
        int count = Locate(request, ranges, findHoles: MayCut(request));
        if (count == 0)
            return FastReadResult.MustWait;
        return (structured ? SendChunks(request, ranges[..count]) : SendSimple(request, ranges[0]))
            ? FastReadResult.Answered : FastReadResult.Broken;
    }

    private bool SendSimple(in NbdRequest request, FileRange range)
    {
        if (!output.TryReserve(NbdSize.SimpleReply, out Span<byte> header))
            return false;
        output.Advance(NbdReply.WriteSimple(header, NbdError.None, request.Cookie));
        return output.FlushWithFile(range.File!, range.FileOffset, range.Length, out _);
    }

    private bool SendChunks(in NbdRequest request, ReadOnlySpan<FileRange> ranges)
    {
        ulong offset = request.Offset;
        foreach (FileRange range in ranges)
        {
            if (!output.TryReserve(ReadChunks.HoleChunk, out Span<byte> header))
                return false;
            if (range.IsHole)
            {
                output.Advance(NbdReply.WriteOffsetHole(
                    header, NbdChunkFlags.None, request.Cookie, offset, (uint)range.Length));
            }
            else
            {
                output.Advance(NbdReply.WriteOffsetData(
                    header, NbdChunkFlags.None, request.Cookie, offset, range.Length));
                if (!output.FlushWithFile(range.File!, range.FileOffset, range.Length, out int padded))
                    return false;
                if (padded > 0)
                {
                    return output.ReplyFailure(request, new DiskException(
                        DiskError.Io, $"reading {padded} bytes of {request.Length} at {request.Offset} failed"));
                }
            }

            offset += (uint)range.Length;
        }

        // DONE stands in a chunk of its own: until the data was out, it could still have failed.
        return output.ReplySuccess(request);
    }

    /// <summary>Finds where all bytes of a read stand.</summary>
    /// <returns>How many ranges hold the answer; 0 when the bytes are to be read.</returns>
    private int Locate(in NbdRequest request, Span<FileRange> ranges, bool findHoles)
    {
        long offset = (long)request.Offset;
        int count = 0;
        for (int left = (int)request.Length; left > 0;)
        {
            bool isLast = count == ranges.Length - 1;
            FileRange range = disk.TryLocate(offset, left, findHoles && !isLast);
            if (range.Length == 0 || (isLast && range.Length < left) || (!findHoles && range.Length < left))
                return 0;
            ranges[count++] = range;
            offset += range.Length;
            left -= range.Length;
        }

        return count;
    }

    [InlineArray(ServerLimits.MaxReadChunks)]
    private struct FileRanges
    {
        private FileRange _first;
    }
}
