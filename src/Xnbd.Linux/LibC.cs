using System.Runtime.InteropServices;

namespace Xnbd.Linux;

/// <summary>The C library's functions that the BCL does not offer. Only this project's other files call them.</summary>
internal static unsafe partial class LibC
{
    private const string Name = "libc";

    [LibraryImport(Name, EntryPoint = "open", SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    internal static partial int Open(string path, int flags, uint mode);

    [LibraryImport(Name, EntryPoint = "pread64", SetLastError = true)]
    internal static partial nint PRead(SafeHandle file, byte* buffer, nuint length, long offset);

    [LibraryImport(Name, EntryPoint = "pwrite64", SetLastError = true)]
    internal static partial nint PWrite(SafeHandle file, byte* buffer, nuint length, long offset);

    [LibraryImport(Name, EntryPoint = "preadv64v2", SetLastError = true)]
    internal static partial nint PReadV2(SafeHandle file, IoVector* vectors, int count, long offset, int flags);

    [LibraryImport(Name, EntryPoint = "fallocate64", SetLastError = true)]
    internal static partial int FAllocate(SafeHandle file, int mode, long offset, long length);

    [LibraryImport(Name, EntryPoint = "lseek64", SetLastError = true)]
    internal static partial long LSeek(SafeHandle file, long offset, int whence);

    [LibraryImport(Name, EntryPoint = "fdatasync", SetLastError = true)]
    internal static partial int FDataSync(SafeHandle file);

    [LibraryImport(Name, EntryPoint = "fsync", SetLastError = true)]
    internal static partial int FSync(SafeHandle file);

    [LibraryImport(Name, EntryPoint = "futimens", SetLastError = true)]
    internal static partial int FUTimeNs(SafeHandle file, void* times);

    [LibraryImport(Name, EntryPoint = "ftruncate64", SetLastError = true)]
    internal static partial int FTruncate(SafeHandle file, long length);

    [LibraryImport(Name, EntryPoint = "posix_fadvise64")] // answers with the error number itself
    internal static partial int FAdvise(SafeHandle file, long offset, long length, int advice);

    [LibraryImport(Name, EntryPoint = "flock", SetLastError = true)]
    internal static partial int FLock(SafeHandle file, int operation);

    [LibraryImport(Name, EntryPoint = "fstatfs64", SetLastError = true)]
    internal static partial int FStatFs(SafeHandle file, byte* buffer);

    [LibraryImport(Name, EntryPoint = "statx", SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    internal static partial int StatX(SafeHandle directory, string path, int flags, uint mask, byte* buffer);

    [LibraryImport(Name, EntryPoint = "statx", SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    internal static partial int StatX(int directory, string path, int flags, uint mask, byte* buffer);

    [LibraryImport(Name, EntryPoint = "ioctl", SetLastError = true)]
    internal static partial int IoCtl(SafeHandle file, nuint request, nint argument);

    [LibraryImport(Name, EntryPoint = "tcgetattr", SetLastError = true)]
    internal static partial int TcGetAttr(SafeHandle terminal, byte* settings);

    [LibraryImport(Name, EntryPoint = "tcsetattr", SetLastError = true)]
    internal static partial int TcSetAttr(SafeHandle terminal, int when, byte* settings);

    [LibraryImport(Name, EntryPoint = "renameat2", SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    internal static partial int RenameAt2(
        int oldDirectory, string oldPath, int newDirectory, string newPath, uint flags);

    [LibraryImport(Name, EntryPoint = "rename", SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    internal static partial int Rename(string oldPath, string newPath);

    [LibraryImport(Name, EntryPoint = "link", SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    internal static partial int Link(string oldPath, string newPath);

    [LibraryImport(Name, EntryPoint = "fchmod", SetLastError = true)]
    internal static partial int FChMod(SafeHandle file, uint mode);

    [LibraryImport(Name, EntryPoint = "fchown", SetLastError = true)]
    internal static partial int FChOwn(SafeHandle file, uint user, uint group);

    [LibraryImport(Name, EntryPoint = "unlink", SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    internal static partial int Unlink(string path);

    [LibraryImport(Name, EntryPoint = "chmod", SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    internal static partial int ChMod(string path, uint mode);

    [LibraryImport(Name, EntryPoint = "socket", SetLastError = true)]
    internal static partial int Socket(int family, int type, int protocol);

    [LibraryImport(Name, EntryPoint = "bind", SetLastError = true)]
    internal static partial int Bind(SafeHandle socket, byte* address, uint length);

    [LibraryImport(Name, EntryPoint = "listen", SetLastError = true)]
    internal static partial int Listen(SafeHandle socket, int backlog);

    [LibraryImport(Name, EntryPoint = "recv", SetLastError = true)]
    internal static partial nint Recv(SafeHandle socket, byte* buffer, nuint length, int flags);

    [LibraryImport(Name, EntryPoint = "send", SetLastError = true)]
    internal static partial nint Send(SafeHandle socket, byte* buffer, nuint length, int flags);

    [LibraryImport(Name, EntryPoint = "sendto", SetLastError = true)]
    internal static partial nint SendTo(
        SafeHandle socket, byte* buffer, nuint length, int flags, byte* address, uint addressLength);

    [LibraryImport(Name, EntryPoint = "sendfile64", SetLastError = true)]
    internal static partial nint SendFile(SafeHandle socket, SafeHandle file, long* offset, nuint count);

    [LibraryImport(Name, EntryPoint = "poll", SetLastError = true)]
    internal static partial int Poll(PollEntry* entries, nuint count, int timeoutMilliseconds);

    [LibraryImport(Name, EntryPoint = "eventfd", SetLastError = true)]
    internal static partial int EventFd(uint initial, int flags);

    [LibraryImport(Name, EntryPoint = "read", SetLastError = true)]
    internal static partial nint Read(SafeHandle file, byte* buffer, nuint length);

    [LibraryImport(Name, EntryPoint = "write", SetLastError = true)]
    internal static partial nint Write(SafeHandle file, byte* buffer, nuint length);

    [LibraryImport(Name, EntryPoint = "fcntl", SetLastError = true)]
    internal static partial int FCntl(SafeHandle file, int command, nint argument);

    [LibraryImport(Name, EntryPoint = "fcntl", SetLastError = true)]
    internal static partial int FCntl(int descriptor, int command, nint argument);

    [LibraryImport(Name, EntryPoint = "execv", SetLastError = true)]
    internal static partial int ExecV(nint path, nint* arguments);

    [LibraryImport(Name, EntryPoint = "getauxval")]
    internal static partial nint GetAuxiliaryValue(nuint type);

    [LibraryImport(Name, EntryPoint = "fcntl", SetLastError = true)]
    internal static partial int FCntl(SafeHandle file, int command, RecordLock* argument);

    [LibraryImport(Name, EntryPoint = "getrlimit64", SetLastError = true)]
    internal static partial int GetRLimit(int resource, ResourceLimit* limit);

    [LibraryImport(Name, EntryPoint = "setrlimit64", SetLastError = true)]
    internal static partial int SetRLimit(int resource, ResourceLimit* limit);

    [LibraryImport(Name, EntryPoint = "sigaction", SetLastError = true)]
    internal static partial int SigAction(int signal, byte* action, byte* before);

    [LibraryImport(Name, EntryPoint = "raise", SetLastError = true)]
    internal static partial int Raise(int signal);

    [LibraryImport(Name, EntryPoint = "sigprocmask", SetLastError = true)]
    internal static partial int SigProcMask(int how, SignalSet* set, SignalSet* old);

    [LibraryImport(Name, EntryPoint = "sigwaitinfo", SetLastError = true)]
    internal static partial int SigWaitInfo(SignalSet* set, byte* info);

    [LibraryImport(Name, EntryPoint = "getppid")]
    internal static partial int GetParentId();

    [LibraryImport(Name, EntryPoint = "prctl", SetLastError = true)]
    internal static partial int PrCtl(int option, byte* argument, nuint third, nuint fourth, nuint fifth);

    // The functions of posix_spawn answer with the error number itself.

    [LibraryImport(Name, EntryPoint = "posix_spawn")]
    internal static partial int Spawn(
        int* id, nint path, byte* actions, byte* attributes, nint* arguments, nint* environment);

    [LibraryImport(Name, EntryPoint = "posix_spawnattr_init")]
    internal static partial int SpawnAttributesInit(byte* attributes);

    [LibraryImport(Name, EntryPoint = "posix_spawnattr_destroy")]
    internal static partial int SpawnAttributesDestroy(byte* attributes);

    [LibraryImport(Name, EntryPoint = "posix_spawnattr_setflags")]
    internal static partial int SpawnSetFlags(byte* attributes, short flags);

    [LibraryImport(Name, EntryPoint = "posix_spawnattr_setsigmask")]
    internal static partial int SpawnSetSignalMask(byte* attributes, SignalSet* set);

    [LibraryImport(Name, EntryPoint = "posix_spawnattr_setsigdefault")]
    internal static partial int SpawnSetSignalDefault(byte* attributes, SignalSet* set);

    [LibraryImport(Name, EntryPoint = "posix_spawn_file_actions_init")]
    internal static partial int SpawnActionsInit(byte* actions);

    [LibraryImport(Name, EntryPoint = "posix_spawn_file_actions_destroy")]
    internal static partial int SpawnActionsDestroy(byte* actions);

    [LibraryImport(Name, EntryPoint = "posix_spawn_file_actions_addopen")]
    internal static partial int SpawnAddOpen(byte* actions, int descriptor, nint path, int flags, uint mode);

    [LibraryImport(Name, EntryPoint = "access", SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    internal static partial int Access(string path, int mode);

    [LibraryImport(Name, EntryPoint = "waitpid", SetLastError = true)]
    internal static partial int WaitPid(int id, int* status, int options);

    [LibraryImport(Name, EntryPoint = "kill", SetLastError = true)]
    internal static partial int Kill(int id, int signal);

    [LibraryImport(Name, EntryPoint = "setsid", SetLastError = true)]
    internal static partial int SetSid();

    [LibraryImport(Name, EntryPoint = "dup2", SetLastError = true)]
    internal static partial int Dup2(int from, int to);

    [LibraryImport(Name, EntryPoint = "mmap64")]
    internal static partial byte* MMap(
        byte* address, nuint length, int protection, int flags, int descriptor, long offset);

    [LibraryImport(Name, EntryPoint = "munmap")]
    internal static partial int MUnmap(byte* address, nuint length);

    [LibraryImport(Name, EntryPoint = "openlog")]
    internal static partial void OpenLog(nint identity, int option, int facility);

    [LibraryImport(Name, EntryPoint = "syslog", StringMarshalling = StringMarshalling.Utf8)]
    internal static partial void SysLog(int priority, string format, string message);

    internal const int AddressFamilyUnix = 1;
    internal const int SocketStream = 1;
    internal const int SocketDatagram = 2;
    internal const int SocketCloseOnExec = 0x80000;

    /// <summary>The kernel reduces it to what the system allows.</summary>
    internal const int MaxBacklog = int.MaxValue;

    /// <summary>The result of a call that returns a count: the count, or the negated error number.</summary>
    internal static long Result(nint answer) => answer >= 0 ? answer : -Marshal.GetLastPInvokeError();

    /// <summary>The result of a call that returns 0 or -1.</summary>
    internal static Errno Outcome(int answer) => answer >= 0 ? Errno.None : (Errno)Marshal.GetLastPInvokeError();

    /// <summary><c>struct iovec</c>.</summary>
    [StructLayout(LayoutKind.Sequential)]
    internal struct IoVector
    {
        internal byte* Base;
        internal nuint Length;
    }

    /// <summary><c>struct flock</c>, of a 64-bit system.</summary>
    [StructLayout(LayoutKind.Sequential)]
    internal struct RecordLock
    {
        internal short Type;
        internal short Whence;
        internal long Start;
        internal long Length;
        internal int Process;
    }

    /// <summary><c>struct rlimit64</c>.</summary>
    [StructLayout(LayoutKind.Sequential)]
    internal struct ResourceLimit
    {
        internal ulong Soft;
        internal ulong Hard;
    }

    /// <summary><c>sigset_t</c>: bit N-1 is signal N.</summary>
    [StructLayout(LayoutKind.Sequential, Size = 128)]
    internal struct SignalSet
    {
        internal ulong First;
    }

    /// <summary><c>struct pollfd</c>.</summary>
    [StructLayout(LayoutKind.Sequential)]
    internal struct PollEntry
    {
        internal int Descriptor;
        internal short Events;
        internal short Returned;
    }
}
