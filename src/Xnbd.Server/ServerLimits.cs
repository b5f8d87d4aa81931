namespace Xnbd.Server;

/// <summary>All bounds of the server, with their reasons. Sizes are in bytes.</summary>
public static class ServerLimits
{
    /// <summary>
    /// The largest payload of a request: the size that every server should accept (section "Size constraints").
    /// </summary>
    public const int MaxPayload = 32 * 1024 * 1024;

    /// <summary>The preferred block size told to clients: the page cache's and most file systems' unit.</summary>
    public const int PreferredBlockSize = 4096;

    /// <summary>A handshake takes a few round trips; a peer that needs longer than this is not a client.</summary>
    public static readonly TimeSpan HandshakeTime = TimeSpan.FromSeconds(10);

    /// <summary>Connections that may be in their handshake at once; a further one replaces the oldest.</summary>
    public const int MaxHandshakes = 100;

    /// <summary>Options a client may send; one that wants an export sends fewer than ten.</summary>
    public const int MaxOptions = 256;

    /// <summary>
    /// Further ones for each export: <c>nbdinfo --list</c> asks about all of them, with several options each.
    /// </summary>
    public const int MaxOptionsPerExport = 16;

    /// <summary>
    /// The longest option data that is read: an export's name, and a dozen queries of the greatest length.
    /// </summary>
    public const int MaxOptionData = 64 * 1024;

    /// <summary>
    /// The longest option data that is drained to answer with an error; beyond it the connection is dropped.
    /// </summary>
    public const int MaxDrainedOptionData = 1024 * 1024;

    /// <summary>
    /// Requests of one connection that may wait for the disk at once: enough to keep a fast disk busy.
    /// </summary>
    public const int MaxInFlight = 128;

    /// <summary>
    /// Bytes that the requests of all connections may hold while they wait for payload, disk or socket: four requests
    /// of the greatest size. A connection that needs more waits. (An export of many may hold half of it, or less.)
    /// </summary>
    public const long MaxBytesInFlight = 4L * MaxPayload;

    /// <summary>
    /// A request up to this length passes even if other exports hold all bytes, as long as its own export holds none:
    /// what file systems and guests send at a time. A thousand such exports hold a gibibyte at most.
    /// </summary>
    public const int SurePassBytes = 1024 * 1024;

    /// <summary>
    /// A client that holds bytes in flight for which others wait may take this time to move its data, and in addition
    /// the time that the data takes at <see cref="MinStallRate"/>. Then it is disconnected. As long as nobody waits, a
    /// slow or suspended client harms nobody, and stays.
    /// </summary>
    public static readonly TimeSpan StallTime = TimeSpan.FromSeconds(10);

    /// <summary>Bytes a second of the slowest client for which others wait.</summary>
    public const long MinStallRate = 256 * 1024;

    /// <summary>
    /// Connections at once, each with a thread: enough for any class room, and far below what a system allows.
    /// </summary>
    public const int MaxConnections = 10_000;

    /// <summary>The time that a client has to receive its last replies after its session has ended.</summary>
    public static readonly TimeSpan LingerTime = TimeSpan.FromSeconds(1);

    /// <summary>
    /// Requests are received into a buffer of this size: a batch of 60 small writes and their payload.
    /// </summary>
    public const int InputBuffer = 256 * 1024;

    /// <summary>
    /// Replies are gathered in a buffer of this size, and sent with one call: eight reads of 64 KiB, or two of 256 KiB.
    /// Fewer in a call would let server and client wait for each other more often. A client that receives nothing keeps
    /// one such buffer, whatever other clients need.
    /// </summary>
    public const int OutputBuffer = 528 * 1024;

    /// <summary>
    /// Replies of finished pending requests are gathered up to this length, to be sent with one call: fifteen reads of
    /// 4 KiB and their headers.
    /// </summary>
    public const int GatheredFinished = 64 * 1024;

    /// <summary>
    /// Objects of pending requests that all sessions together keep for reuse; each takes about half a KiB.
    /// </summary>
    public const int MaxSparePendingRequests = 256;

    /// <summary>
    /// How often a session looks for replies that others could not send, if they have no way to wake it.
    /// </summary>
    public const int LookAgainMilliseconds = 20;

    /// <summary>
    /// How often a send or receive that waits for its client comes back, to see whether it may go on waiting.
    /// </summary>
    public const int StallCheckMilliseconds = 1000;

    /// <summary>
    /// How often a session that waits for something else looks whether its client is still there.
    /// </summary>
    public static readonly TimeSpan ClientCheckTime = TimeSpan.FromSeconds(1);

    /// <summary>
    /// How often a TCP client that has closed its sending side, and waits for replies, is asked whether its socket is
    /// still there.
    /// </summary>
    public const int ProbeSeconds = 15;

    /// <summary>A write up to this length is received in the input buffer; a longer one gets its own buffer.</summary>
    public const int MaxBatchedWrite = 64 * 1024;

    /// <summary>
    /// A read up to this length that is answered at once has one chunk. Longer and pending reads are cut into data and
    /// holes.
    /// </summary>
    public const int MaxUncutRead = 32 * 1024;

    /// <summary>
    /// A longer read whose data is in memory is copied piece by piece, in pieces of this length: each piece is still in
    /// the processor's cache when it is sent. A read of a single piece is copied, also if it could be sent from the
    /// file.
    /// </summary>
    public const int ReadPiece = 64 * 1024;

    /// <summary>
    /// The longest read that is gathered in the output as a whole, if it may not be cut. For longer ones it pays off to
    /// let a disk thread read while the session's thread sends.
    /// </summary>
    public const int MaxCopiedRead = 256 * 1024;

    /// <summary>The longest read in memory that a disk thread makes while the session's thread sends.</summary>
    public const int MaxOverlappedRead = 2 * 1024 * 1024;

    /// <summary>
    /// A session with this many requests in flight makes further reads in memory by itself. With these, enough is ready
    /// to be sent at any time.
    /// </summary>
    public const int MaxOverlappedReads = 4;

    /// <summary>
    /// Such reads, of all sessions together, take at most this part of the bytes in flight: a fourth. The rest belongs
    /// to requests that cannot do without.
    /// </summary>
    public const int SparePartOfBudget = 4;

    /// <summary>
    /// Data and hole chunks of a large read that is sent from the file: bounds the work for a fragmented range.
    /// </summary>
    public const int MaxReadChunks = 64;

    /// <summary>
    /// Extents in the answer to one block-status request: bounds its work; the client asks again from where the answer
    /// ends.
    /// </summary>
    public const int MaxExtents = 1024;

    /// <summary>Memory in unused buffers that is kept for reuse.</summary>
    public const long MaxSpareBuffers = 16 * 1024 * 1024;

    /// <summary>How long a thread polls its socket before it blocks, while polling has been paying off.</summary>
    public static readonly TimeSpan PollTime = TimeSpan.FromMicroseconds(50);

    /// <summary>
    /// A Unix socket's send buffer: room for two large reads. The kernel reduces it to what the system allows. The
    /// buffer of a TCP socket grows by itself.
    /// </summary>
    public const int UnixSendBuffer = 1024 * 1024;

    /// <summary>Failed requests that are logged in a second; further ones are counted.</summary>
    public const int MaxLoggedFailures = 10;

    /// <summary>Refused connections are logged once in this time; those in between are counted.</summary>
    public static readonly TimeSpan RefusalLogPause = TimeSpan.FromSeconds(5);

    /// <summary>
    /// How long the end of the server waits for requests in flight; the sync of the image comes after.
    /// </summary>
    public static readonly TimeSpan StopTime = TimeSpan.FromSeconds(5);
}
