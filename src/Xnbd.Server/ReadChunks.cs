using Xnbd.Protocol;

namespace Xnbd.Server;

/// <summary>
/// The chunks of a structured reply to a read (section "Structured reply chunk"): data as data, and long runs of zeroes
/// as holes, which take no time on the line.
/// </summary>
internal static class ReadChunks
{
    /// <summary>Length of what precedes a chunk's data, in bytes.</summary>
    public const int DataHeader = NbdSize.StructuredReply + NbdSize.OffsetDataPrefix;

    /// <summary>Length of a chunk that is a hole, in bytes; longer than a data chunk of 3 bytes.</summary>
    public const int HoleChunk = NbdSize.StructuredReply + NbdSize.OffsetHolePayload;

    /// <summary>
    /// Data is looked at in aligned parts of this length in bytes; the first and the last may be shorter. A part that
    /// is all zeroes is sent as a hole.
    /// </summary>
    private const int HoleGrain = 64 * 1024;

    /// <summary>Room for the headers of all chunks that a read may be cut into.</summary>
    /// <param name="length">Length of the read in bytes.</param>
    public static int HeaderRoom(int length) => HoleChunk * ((length / HoleGrain) + 2);

    /// <summary>How long the data from here on is of one kind.</summary>
    /// <param name="data">At least one byte.</param>
    /// <param name="offset">Offset of the data on the disk in bytes.</param>
    /// <param name="mayCut">Data and zeroes may go into separate chunks; otherwise all is one run.</param>
    /// <param name="isHole">The run is all zeroes.</param>
    public static int RunLength(ReadOnlySpan<byte> data, ulong offset, bool mayCut, out bool isHole)
    {
        int run = mayCut ? NextPart(0, data.Length, offset) : data.Length;
        isHole = !data[..run].ContainsAnyExcept((byte)0);
        while (run < data.Length)
        {
            int part = NextPart(run, data.Length, offset);
            if (!data.Slice(run, part).ContainsAnyExcept((byte)0) != isHole)
                break;
            run += part;
        }

        return run;

        static int NextPart(int at, int length, ulong offset)
            => (int)Math.Min(length - at, HoleGrain - (long)((offset + (ulong)at) % HoleGrain));
    }

    /// <summary>
    /// Writes the chunks of data that stands behind room for their headers. They are written from the front. Their data
    /// moves forward; the room is large enough, so headers never overwrite data that is still to be moved.
    /// </summary>
    /// <param name="buffer">The room for headers, then the data.</param>
    /// <param name="headers">Length of that room in bytes, at least <see cref="HeaderRoom"/>.</param>
    /// <param name="length">Length of the data in bytes.</param>
    /// <param name="offset">Offset of the data on the disk in bytes.</param>
    /// <param name="cookie">The request's cookie.</param>
    /// <param name="mayCut">As for <see cref="RunLength"/>.</param>
    /// <param name="isLast">The reply ends with these chunks.</param>
    /// <returns>Where in the buffer the chunks stand.</returns>
    public static (int Start, int Length) Write(
        Span<byte> buffer, int headers, int length, ulong offset, ulong cookie, bool mayCut, bool isLast)
    {
        Span<byte> data = buffer.Slice(headers, length);
        int at = 0;
        for (int done = 0; done < length;)
        {
            ulong place = offset + (ulong)done;
            int run = RunLength(data[done..], place, mayCut, out bool isHole);
            NbdChunkFlags flags = isLast && done + run == length ? NbdChunkFlags.Done : NbdChunkFlags.None;
            if (isHole)
            {
                at += NbdReply.WriteOffsetHole(buffer[at..], flags, cookie, place, (uint)run);
            }
            else if (run == length)
            {
                at = headers - DataHeader; // the common case: nothing moves
                NbdReply.WriteOffsetData(buffer[at..], flags, cookie, place, run);
                return (at, DataHeader + run);
            }
            else
            {
                data.Slice(done, run).CopyTo(buffer[(at + DataHeader)..]);
                at += NbdReply.WriteOffsetData(buffer[at..], flags, cookie, place, run) + run;
            }

            done += run;
        }

        return (0, at);
    }
}
