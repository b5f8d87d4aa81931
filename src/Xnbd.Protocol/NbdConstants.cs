namespace Xnbd.Protocol;

/// <summary>
/// Magic numbers of the NBD protocol. Source: the specification's sections "Handshake" and "Transmission".
/// </summary>
public static class NbdMagic
{
    /// <summary><c>NBDMAGIC</c>: the first 8 bytes of every greeting (<c>INIT_PASSWD</c>).</summary>
    public const ulong Init = 0x4e42444d41474943;

    /// <summary><c>cliserv_magic</c>: follows <see cref="Init"/> in an oldstyle greeting.</summary>
    public const ulong Oldstyle = 0x00420281861253;

    /// <summary><c>IHAVEOPT</c>: follows <see cref="Init"/> in a newstyle greeting, and begins each option.</summary>
    public const ulong Option = 0x49484156454F5054;

    /// <summary>Begins each reply to an option.</summary>
    public const ulong OptionReply = 0x3e889045565a9;

    /// <summary><c>NBD_REQUEST_MAGIC</c>.</summary>
    public const uint Request = 0x25609513;

    /// <summary><c>NBD_SIMPLE_REPLY_MAGIC</c>.</summary>
    public const uint SimpleReply = 0x67446698;

    /// <summary><c>NBD_STRUCTURED_REPLY_MAGIC</c>.</summary>
    public const uint StructuredReply = 0x668e33ef;
}

/// <summary>Sizes and limits that the specification fixes, in bytes.</summary>
public static class NbdSize
{
    /// <summary>An oldstyle greeting: two magics, the export's size, 32 bits of flags, 124 reserved zeroes.</summary>
    public const int OldstyleGreeting = 8 + 8 + 8 + 4 + ReservedZeroes;

    /// <summary>A newstyle greeting: two magics and 16 bits of handshake flags.</summary>
    public const int NewstyleGreeting = 8 + 8 + 2;

    /// <summary>The client's answer to a newstyle greeting: its flags.</summary>
    public const int ClientFlags = 4;

    /// <summary>An option's header: magic, option, length of its data.</summary>
    public const int OptionHeader = 8 + 4 + 4;

    /// <summary>The header of a reply to an option: magic, option, reply type, length of its data.</summary>
    public const int OptionReplyHeader = 8 + 4 + 4 + 4;

    /// <summary>
    /// The reserved zeroes at the end of an oldstyle greeting and of the answer to <c>NBD_OPT_EXPORT_NAME</c>.
    /// </summary>
    public const int ReservedZeroes = 124;

    /// <summary>A request's header: magic, flags, type, cookie, offset, length.</summary>
    public const int Request = 4 + 2 + 2 + 8 + 8 + 4;

    /// <summary>A simple reply's header: magic, error, cookie.</summary>
    public const int SimpleReply = 4 + 4 + 8;

    /// <summary>The header of a structured reply's chunk: magic, flags, type, cookie, length.</summary>
    public const int StructuredReply = 4 + 2 + 2 + 8 + 4;

    /// <summary>The offset that begins the payload of an offset-data chunk.</summary>
    public const int OffsetDataPrefix = 8;

    /// <summary>The whole payload of an offset-hole chunk: offset and hole size.</summary>
    public const int OffsetHolePayload = 8 + 4;

    /// <summary>A string is at most this long (section "Conventions").</summary>
    public const int MaxString = 4096;
}

/// <summary>Handshake flags, sent by the server (section "Handshake flags").</summary>
[Flags]
public enum NbdHandshakeFlags : ushort
{
    /// <summary>No flag.</summary>
    None = 0,

    /// <summary><c>NBD_FLAG_FIXED_NEWSTYLE</c>.</summary>
    FixedNewstyle = 1 << 0,

    /// <summary><c>NBD_FLAG_NO_ZEROES</c>.</summary>
    NoZeroes = 1 << 1,
}

/// <summary>Client flags, sent in answer to the handshake flags (section "Client flags").</summary>
[Flags]
public enum NbdClientFlags : uint
{
    /// <summary>No flag.</summary>
    None = 0,

    /// <summary><c>NBD_FLAG_C_FIXED_NEWSTYLE</c>.</summary>
    FixedNewstyle = 1 << 0,

    /// <summary><c>NBD_FLAG_C_NO_ZEROES</c>: no 124 zeroes after <c>NBD_OPT_EXPORT_NAME</c>.</summary>
    NoZeroes = 1 << 1,

    /// <summary>All flags that are defined; any other one ends the connection.</summary>
    Known = FixedNewstyle | NoZeroes,
}

/// <summary>Transmission flags: what an export can do (section "Transmission flags").</summary>
[Flags]
public enum NbdTransmissionFlags : ushort
{
    /// <summary>No flag.</summary>
    None = 0,

    /// <summary><c>NBD_FLAG_HAS_FLAGS</c>: always set.</summary>
    HasFlags = 1 << 0,

    /// <summary><c>NBD_FLAG_READ_ONLY</c>.</summary>
    ReadOnly = 1 << 1,

    /// <summary><c>NBD_FLAG_SEND_FLUSH</c>.</summary>
    SendFlush = 1 << 2,

    /// <summary><c>NBD_FLAG_SEND_FUA</c>.</summary>
    SendFua = 1 << 3,

    /// <summary><c>NBD_FLAG_ROTATIONAL</c>.</summary>
    Rotational = 1 << 4,

    /// <summary><c>NBD_FLAG_SEND_TRIM</c>.</summary>
    SendTrim = 1 << 5,

    /// <summary><c>NBD_FLAG_SEND_WRITE_ZEROES</c>.</summary>
    SendWriteZeroes = 1 << 6,

    /// <summary><c>NBD_FLAG_SEND_DF</c>: only after structured replies were negotiated.</summary>
    SendDf = 1 << 7,

    /// <summary><c>NBD_FLAG_CAN_MULTI_CONN</c>.</summary>
    CanMultiConn = 1 << 8,

    /// <summary><c>NBD_FLAG_SEND_CACHE</c>.</summary>
    SendCache = 1 << 10,

    /// <summary><c>NBD_FLAG_SEND_FAST_ZERO</c>.</summary>
    SendFastZero = 1 << 11,
}

/// <summary>Options of the handshake (section "Option types").</summary>
public enum NbdOption : uint
{
    /// <summary><c>NBD_OPT_EXPORT_NAME</c>.</summary>
    ExportName = 1,

    /// <summary><c>NBD_OPT_ABORT</c>.</summary>
    Abort = 2,

    /// <summary><c>NBD_OPT_LIST</c>.</summary>
    List = 3,

    /// <summary><c>NBD_OPT_STARTTLS</c>.</summary>
    StartTls = 5,

    /// <summary><c>NBD_OPT_INFO</c>.</summary>
    Info = 6,

    /// <summary><c>NBD_OPT_GO</c>.</summary>
    Go = 7,

    /// <summary><c>NBD_OPT_STRUCTURED_REPLY</c>.</summary>
    StructuredReply = 8,

    /// <summary><c>NBD_OPT_LIST_META_CONTEXT</c>.</summary>
    ListMetaContext = 9,

    /// <summary><c>NBD_OPT_SET_META_CONTEXT</c>.</summary>
    SetMetaContext = 10,

    /// <summary><c>NBD_OPT_EXTENDED_HEADERS</c> (the extension of that name).</summary>
    ExtendedHeaders = 11,
}

/// <summary>Types of a reply to an option (section "Option reply types"); errors have bit 31 set.</summary>
public enum NbdOptionReplyType : uint
{
    /// <summary><c>NBD_REP_ACK</c>.</summary>
    Ack = 1,

    /// <summary><c>NBD_REP_SERVER</c>.</summary>
    Server = 2,

    /// <summary><c>NBD_REP_INFO</c>.</summary>
    Info = 3,

    /// <summary><c>NBD_REP_META_CONTEXT</c>.</summary>
    MetaContext = 4,

    /// <summary><c>NBD_REP_ERR_UNSUP</c>: the option is unknown.</summary>
    ErrUnsupported = (1u << 31) + 1,

    /// <summary><c>NBD_REP_ERR_POLICY</c>: forbidden by the server's settings.</summary>
    ErrPolicy = (1u << 31) + 2,

    /// <summary><c>NBD_REP_ERR_INVALID</c>: syntactically or semantically invalid.</summary>
    ErrInvalid = (1u << 31) + 3,

    /// <summary><c>NBD_REP_ERR_TLS_REQD</c>.</summary>
    ErrTlsRequired = (1u << 31) + 5,

    /// <summary><c>NBD_REP_ERR_UNKNOWN</c>: no such export.</summary>
    ErrUnknown = (1u << 31) + 6,

    /// <summary><c>NBD_REP_ERR_SHUTDOWN</c>: the server is ending.</summary>
    ErrShutdown = (1u << 31) + 7,

    /// <summary><c>NBD_REP_ERR_TOO_BIG</c>: the request is too large to process.</summary>
    ErrTooBig = (1u << 31) + 9,
}

/// <summary>
/// Information types of <c>NBD_OPT_INFO</c> and <c>NBD_OPT_GO</c> (section "Option reply types", <c>NBD_REP_INFO</c>).
/// </summary>
public enum NbdInfo : ushort
{
    /// <summary><c>NBD_INFO_EXPORT</c>: size and transmission flags.</summary>
    Export = 0,

    /// <summary><c>NBD_INFO_NAME</c>: the export's canonical name.</summary>
    Name = 1,

    /// <summary><c>NBD_INFO_DESCRIPTION</c>: a text for people.</summary>
    Description = 2,

    /// <summary><c>NBD_INFO_BLOCK_SIZE</c>: minimum, preferred block size, maximum payload.</summary>
    BlockSize = 3,
}

/// <summary>Request types (section "Request types").</summary>
public enum NbdCommand : ushort
{
    /// <summary><c>NBD_CMD_READ</c>.</summary>
    Read = 0,

    /// <summary><c>NBD_CMD_WRITE</c>.</summary>
    Write = 1,

    /// <summary><c>NBD_CMD_DISC</c>.</summary>
    Disconnect = 2,

    /// <summary><c>NBD_CMD_FLUSH</c>.</summary>
    Flush = 3,

    /// <summary><c>NBD_CMD_TRIM</c>.</summary>
    Trim = 4,

    /// <summary><c>NBD_CMD_CACHE</c>.</summary>
    Cache = 5,

    /// <summary><c>NBD_CMD_WRITE_ZEROES</c>.</summary>
    WriteZeroes = 6,

    /// <summary><c>NBD_CMD_BLOCK_STATUS</c>.</summary>
    BlockStatus = 7,
}

/// <summary>Command flags of a request (section "Command flags").</summary>
[Flags]
public enum NbdCommandFlags : ushort
{
    /// <summary>No flag.</summary>
    None = 0,

    /// <summary><c>NBD_CMD_FLAG_FUA</c>: reply only when the data is on stable storage.</summary>
    Fua = 1 << 0,

    /// <summary><c>NBD_CMD_FLAG_NO_HOLE</c>: zeroes are to be allocated.</summary>
    NoHole = 1 << 1,

    /// <summary><c>NBD_CMD_FLAG_DF</c>: at most one content chunk.</summary>
    Df = 1 << 2,

    /// <summary><c>NBD_CMD_FLAG_REQ_ONE</c>: one extent for each context.</summary>
    ReqOne = 1 << 3,

    /// <summary><c>NBD_CMD_FLAG_FAST_ZERO</c>: fail rather than be slow.</summary>
    FastZero = 1 << 4,
}

/// <summary>Error values of replies (section "Error values").</summary>
public enum NbdError : uint
{
    /// <summary>Success.</summary>
    None = 0,

    /// <summary><c>NBD_EPERM</c>.</summary>
    Permission = 1,

    /// <summary><c>NBD_EIO</c>.</summary>
    Io = 5,

    /// <summary><c>NBD_ENOMEM</c>.</summary>
    NoMemory = 12,

    /// <summary><c>NBD_EINVAL</c>.</summary>
    Invalid = 22,

    /// <summary><c>NBD_ENOSPC</c>.</summary>
    NoSpace = 28,

    /// <summary><c>NBD_EOVERFLOW</c>.</summary>
    Overflow = 75,

    /// <summary><c>NBD_ENOTSUP</c>: only for fast zeroes.</summary>
    NotSupported = 95,

    /// <summary><c>NBD_ESHUTDOWN</c>.</summary>
    Shutdown = 108,
}

/// <summary>Types of a structured reply's chunk (section "Structured reply types"); errors have bit 15 set.</summary>
public enum NbdChunkType : ushort
{
    /// <summary><c>NBD_REPLY_TYPE_NONE</c>.</summary>
    None = 0,

    /// <summary><c>NBD_REPLY_TYPE_OFFSET_DATA</c>.</summary>
    OffsetData = 1,

    /// <summary><c>NBD_REPLY_TYPE_OFFSET_HOLE</c>.</summary>
    OffsetHole = 2,

    /// <summary><c>NBD_REPLY_TYPE_BLOCK_STATUS</c>.</summary>
    BlockStatus = 5,

    /// <summary><c>NBD_REPLY_TYPE_ERROR</c>.</summary>
    Error = (1 << 15) + 1,

    /// <summary><c>NBD_REPLY_TYPE_ERROR_OFFSET</c>.</summary>
    ErrorOffset = (1 << 15) + 2,
}

/// <summary>Flags of a structured reply's chunk (section "Structured reply flags").</summary>
[Flags]
public enum NbdChunkFlags : ushort
{
    /// <summary>More chunks follow.</summary>
    None = 0,

    /// <summary><c>NBD_REPLY_FLAG_DONE</c>: the last chunk of this reply.</summary>
    Done = 1 << 0,
}

/// <summary>Status flags of the context <c>base:allocation</c> (section "base:allocation metadata context").</summary>
[Flags]
public enum NbdAllocation : uint
{
    /// <summary>Allocated, contents unknown.</summary>
    Data = 0,

    /// <summary><c>NBD_STATE_HOLE</c>: not allocated.</summary>
    Hole = 1 << 0,

    /// <summary><c>NBD_STATE_ZERO</c>: reads as zeroes.</summary>
    Zero = 1 << 1,
}
