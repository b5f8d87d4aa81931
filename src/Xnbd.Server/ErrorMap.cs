using Xnbd.Protocol;
using Xnbd.Storage;

namespace Xnbd.Server;

/// <summary>The one place where a disk's failure becomes an error of the protocol (section "Error values").</summary>
internal static class ErrorMap
{
    public static NbdError ToNbd(DiskError error) => error switch
    {
        DiskError.NoSpace => NbdError.NoSpace,
        DiskError.Permission => NbdError.Permission,
        DiskError.NoMemory => NbdError.NoMemory,
        DiskError.NotSupported => NbdError.NotSupported, // only fast zeroes fail in this way
        _ => NbdError.Io,
    };

    /// <summary>The message for the client. The cause, which may name files of this host, is only logged.</summary>
    public static string Describe(NbdError error) => error switch
    {
        NbdError.NoSpace => "the server's disk is full",
        NbdError.Permission => "the server may not do this to its disk",
        NbdError.NoMemory => "the server is short of memory",
        NbdError.NotSupported => "there is no fast way to do this",
        _ => "the server's disk failed; its log says how",
    };
}
