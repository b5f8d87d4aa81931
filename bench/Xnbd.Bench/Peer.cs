using System.Globalization;
using Xnbd.TestKit;

namespace Xnbd.Bench;

/// <summary>The mode in which servers are compared.</summary>
public enum Mode
{
    /// <summary>Serving an image.</summary>
    Target,

    /// <summary>Serving an image to many clients.</summary>
    Crowd,

    /// <summary>Copy-on-write: serving an image that does not change; changes are kept elsewhere.</summary>
    Cow,

    /// <summary>Serving and caching the disk of another server. That is xNBD's target mode for all of them.</summary>
    Proxy,
}

/// <summary>What a server is started with.</summary>
/// <param name="Image">The image's path.</param>
/// <param name="Endpoint">Where it listens.</param>
/// <param name="Folder">A folder for its own files.</param>
/// <param name="Origin">Where a proxy reads.</param>
public sealed record Setting(string Image, Endpoint Endpoint, string Folder, Endpoint? Origin)
{
    /// <summary>A file of the server.</summary>
    public string File(string name) => Path.Combine(Folder, name);

    public string Port => Endpoint.Port.ToString(CultureInfo.InvariantCulture);
}

/// <summary>A server under test: how it is started.</summary>
/// <param name="Name">Its name in the tables.</param>
/// <param name="Modes">The modes in which it is compared.</param>
/// <param name="Program">The program that must be installed.</param>
/// <param name="Arguments">Makes its arguments.</param>
public sealed record Peer(string Name, Mode[] Modes, string Program, Func<Setting, string[]> Arguments)
{
    private static readonly string s_xnbd = ServerProcess.Executable;
    private static readonly Mode[] s_serving = [Mode.Target, Mode.Crowd];

    /// <summary>xNBD, and every server that Debian packages.</summary>
    public static readonly IReadOnlyList<Peer> All =
    [
        new("xnbd", s_serving, s_xnbd, s => Xnbd(s, "--target", s.Image)),
        new("nbdkit", s_serving, "nbdkit", s => Nbdkit(s, "file", s.Image)),
        new("qemu-nbd threads", s_serving, "qemu-nbd", s => QemuNbd(s, "raw", "threads", s.Image)),
        new("qemu-nbd io_uring", s_serving, "qemu-nbd", s => QemuNbd(s, "raw", "io_uring", s.Image)),
        new("qemu-storage-daemon", [Mode.Crowd], "qemu-storage-daemon", StorageDaemon),
        new("nbd-server", [Mode.Target], "nbd-server", NbdServer),

        new("xnbd", [Mode.Cow], s_xnbd, s => Xnbd(s, "--cow-target", "--cow-layer", s.File("layer"), s.Image)),
        new("nbdkit cow", [Mode.Cow], "nbdkit", s => Nbdkit(s, "--filter=cow", "file", s.Image)),
        new("qemu-nbd qcow2", [Mode.Cow], "qemu-nbd", s => QemuNbd(s, "qcow2", "threads", Overlay(s, s.Image))),
        new(
            "qemu-nbd qcow2 io_uring", [Mode.Cow], "qemu-nbd",
            s => QemuNbd(s, "qcow2", "io_uring", Overlay(s, s.Image))),

        new(
            "xnbd", [Mode.Proxy], s_xnbd,
            s => Xnbd(s, "--proxy", OriginUri(s), s.File("cache"), s.File("map"), s.File(ControlSocket))),
        new(
            "nbdkit cow-on-read", [Mode.Proxy], "nbdkit",
            s => Nbdkit(s, "--filter=cow", "nbd", "uri=" + OriginUri(s), "cow-on-read=true")),
        new(
            "nbdkit cache", [Mode.Proxy], "nbdkit",
            s => Nbdkit(s, "--filter=cache", "nbd", "uri=" + OriginUri(s), "cache-on-read=true", "cache=unsafe")),
        new("qemu-nbd copy-on-read", [Mode.Proxy], "qemu-nbd", CopyOnRead),

        new("xnbd --target", [Mode.Cow, Mode.Proxy], s_xnbd, s => Xnbd(s, "--target", s.Image)),
    ];

    /// <summary>The names of all peers.</summary>
    public static string Names => string.Join(", ", All.Select(peer => peer.Name).Distinct());

    /// <summary>The name of the control socket of xNBD's proxy.</summary>
    public const string ControlSocket = "control";

    /// <summary>The name of the file with the process id of a server that goes into the background.</summary>
    public const string PidFile = "pid";

    /// <summary>xNBD itself, in the mode that is compared.</summary>
    public bool IsOwn => Name == "xnbd";

    /// <summary>Not a competitor: xNBD's target mode, with which another mode is compared.</summary>
    public bool IsReference => Name == "xnbd --target";

    public bool IsPresent => Program.StartsWith('/') || Tool.Find(Program) is not null;

    /// <summary>It goes into the background by itself, and leaves its process id in a file.</summary>
    public bool IsDaemon => Name == "nbd-server";

    /// <summary>
    /// The server from which a proxy reads. nbdkit's cache is writable only if its origin is, although it writes
    /// nothing there with these arguments.
    /// </summary>
    public Peer Origin
        => new("origin", [], s_xnbd, s => Xnbd(
            s, ["--target", .. Name == "nbdkit cache" ? (string[])[] : ["--readonly"], s.Image]));

    /// <summary>The name of the export to ask for.</summary>
    public string ExportName => Name is "nbd-server" or "qemu-storage-daemon" ? "bench" : "";

    private static string OriginUri(Setting s) => s.Origin!.Uri("");

    private static string[] Xnbd(Setting s, params string[] rest)
        =>
        [
            "--logpath", "/dev/null",
            .. s.Endpoint.IsUnix
                ? (string[])["--unix", s.Endpoint.Path]
                : ["--laddr", s.Endpoint.Address, "--lport", s.Port],
            .. rest,
        ];

    private static string[] Nbdkit(Setting s, params string[] rest)
        =>
        [
            "-f",
            .. s.Endpoint.IsUnix ? (string[])["-U", s.Endpoint.Path] : ["-i", s.Endpoint.Address, "-p", s.Port],
            .. rest,
        ];

    private static string[] QemuNbd(Setting s, string format, string aio, string file)
        =>
        [
            .. QemuNbdCommon(s), "-f", format, "--cache=writeback", $"--aio={aio}", "--discard=unmap", file,
        ];

    private static string[] QemuNbdCommon(Setting s)
        =>
        [
            .. s.Endpoint.IsUnix ? (string[])["-k", s.Endpoint.Path] : ["-b", s.Endpoint.Address, "-p", s.Port],
            "--shared=0", "-t",
        ];

    private static string[] CopyOnRead(Setting s)
        =>
        [
            .. QemuNbdCommon(s), "--image-opts",
            "driver=copy-on-read,file.driver=qcow2,file.discard=unmap,"
                + $"file.file.driver=file,file.file.filename={Overlay(s, OriginUri(s))}",
        ];

    private static string Overlay(Setting s, string @base)
    {
        string overlay = s.File("overlay.qcow2");
        Tool.Succeed("qemu-img", "create", "-q", "-f", "qcow2", "-b", @base, "-F", "raw", overlay)
            .GetAwaiter().GetResult();
        return overlay;
    }

    private static string[] StorageDaemon(Setting s)
        =>
        [
            "--blockdev", $"driver=file,node-name=bench,filename={s.Image}",
            "--nbd-server", (s.Endpoint.IsUnix
                ? $"addr.type=unix,addr.path={s.Endpoint.Path}"
                : $"addr.type=inet,addr.host={s.Endpoint.Address},addr.port={s.Port}") + ",max-connections=0",
            "--export", "type=nbd,id=bench,node-name=bench,writable=on",
        ];

    private static string[] NbdServer(Setting s)
    {
        string configuration = s.File("nbd-server.conf");
        File.WriteAllText(
            configuration,
            $"""
            [generic]
            {(s.Endpoint.IsUnix ? "unixsock = " + s.Endpoint.Path : "")}
            listenaddr = {s.Endpoint.Address}
            port = {s.Port}
            [bench]
            exportname = {s.Image}
            filesize = {new FileInfo(s.Image).Length}

            """);
        return ["-C", configuration, "-p", s.File(PidFile)]; // in the foreground it would serve a single client
    }
}
