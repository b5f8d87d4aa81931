namespace Xnbd.Server;

/// <summary>Every bound of the server, with its reason. Sizes are bytes.</summary>
public static class ServerLimits
{
    /// <summary>The largest payload of a request: what the specification asks every server to take (section "Size constraints").</summary>
    public const int MaxPayload = 32 * 1024 * 1024;

    /// <summary>The preferred block size told to clients: the page cache's and most file systems' unit.</summary>
    public const int PreferredBlockSize = 4096;

    /// <summary>A handshake takes a few round trips; who has not finished after this long is not a client.</summary>
    public static readonly TimeSpan HandshakeTime = TimeSpan.FromSeconds(10);

    /// <summary>Connections that may be in their handshake at once; a further one pushes out the oldest.</summary>
    public const int MaxHandshakes = 100;

    /// <summary>Options a client may send; real ones send fewer than ten.</summary>
    public const int MaxOptions = 256;

    /// <summary>The most option data that is looked at: an export's name, and a dozen queries of the greatest length.</summary>
    public const int MaxOptionData = 64 * 1024;

    /// <summary>The most option data that is drained to answer with an error; beyond it the connection is dropped.</summary>
    public const int MaxDrainedOptionData = 1024 * 1024;

    /// <summary>Requests of one connection that may wait for the disk at once: enough to keep a fast disk busy.</summary>
    public const int MaxInFlight = 128;

    /// <summary>
    /// Bytes that the requests of all connections may hold while they wait for payload, disk or socket: four requests
    /// of the greatest size. A connection that needs more waits, and its client with it.
    /// </summary>
    public const long MaxBytesInFlight = 4L * MaxPayload;

    /// <summary>
    /// A client that holds bytes in flight while others wait for them is disconnected when it has been receiving or
    /// sending for longer than this, and than its data would take at <see cref="MinStallRate"/>. As long as nobody waits,
    /// a slow or suspended client harms nobody, and stays.
    /// </summary>
    public static readonly TimeSpan StallTime = TimeSpan.FromSeconds(10);

    /// <summary>In bytes a second: the slowest client for which others wait.</summary>
    public const long MinStallRate = 256 * 1024;

    /// <summary>Connections at once: each has a thread. More than class rooms have machines; far below what a system allows.</summary>
    public const int MaxConnections = 10_000;

    /// <summary>How long an ended connection may take to receive its last replies.</summary>
    public static readonly TimeSpan LingerTime = TimeSpan.FromSeconds(1);

    /// <summary>Requests are received into a buffer of this size: a batch of 32 small writes and their payload.</summary>
    public const int InputBuffer = 256 * 1024;

    /// <summary>Replies are gathered up to this length: a batch of 64 small reads and their data, or four of 64 KiB.</summary>
    public const int GatheredReplies = 264 * 1024;

    /// <summary>
    /// They are gathered in a buffer of this size, of which a single reply of the longest read that is copied takes a
    /// little more than half. A client that receives nothing keeps that much, whatever the others need.
    /// </summary>
    public const int OutputBuffer = 512 * 1024;

    /// <summary>
    /// Replies of finished pending requests are gathered up to this length, to be sent with one call: fifteen reads of
    /// 4 KiB and their headers.
    /// </summary>
    public const int GatheredFinished = 64 * 1024;

    /// <summary>Objects of pending requests that all sessions together keep for reuse; each takes about half a KiB.</summary>
    public const int MaxSparePendingRequests = 256;

    /// <summary>How often a session looks for replies that others could not send, if they have no way to wake it.</summary>
    public const int LookAgainMilliseconds = 20;

    /// <summary>
    /// How often a send or receive that waits for its client comes back, to see whether it may go on waiting.
    /// </summary>
    public const int StallCheckMilliseconds = 1000;

    /// <summary>Up to this length a write is received in the input buffer; a longer one gets a buffer of its own.</summary>
    public const int MaxBatchedWrite = 64 * 1024;

    /// <summary>Up to this length a read is answered with one chunk; a longer one with data and holes apart.</summary>
    public const int MaxUncutRead = 32 * 1024;

    /// <summary>
    /// A longer read whose data are in memory is copied to its client piece by piece: the piece that was read is still in
    /// the processor's cache when it is sent.
    /// </summary>
    public const int ReadPiece = 64 * 1024;

    /// <summary>The longest read that may not be cut, and whose data are gathered in the output all the same.</summary>
    public const int MaxCopiedRead = 256 * 1024;

    /// <summary>The pieces, data or hole, of one read: bounds the work for a badly fragmented range.</summary>
    public const int MaxReadChunks = 64;

    /// <summary>Extents in the answer to one block-status request: bounds its work; the client asks on from where it ends.</summary>
    public const int MaxExtents = 1024;

    /// <summary>Memory kept for reuse in buffers that nobody uses.</summary>
    public const long MaxSpareBuffers = 16 * 1024 * 1024;

    /// <summary>How long a thread polls its socket before it blocks, while that has been paying off.</summary>
    public static readonly TimeSpan PollTime = TimeSpan.FromMicroseconds(50);

    /// <summary>
    /// A Unix socket's send buffer: room for two large reads. The kernel takes it down to what the system allows. That of
    /// TCP grows by itself.
    /// </summary>
    public const int UnixSendBuffer = 1024 * 1024;

    /// <summary>Failed requests that are logged in a second; further ones are counted.</summary>
    public const int MaxLoggedFailures = 10;

    /// <summary>Refused connections are logged once in this time; those in between are counted.</summary>
    public static readonly TimeSpan RefusalLogPause = TimeSpan.FromSeconds(5);

    /// <summary>How long the end of the server waits for requests in flight; the sync of the image comes after.</summary>
    public static readonly TimeSpan StopTime = TimeSpan.FromSeconds(5);
}
