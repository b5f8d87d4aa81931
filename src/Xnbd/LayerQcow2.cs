using System.ComponentModel;
using System.Diagnostics;
using Microsoft.Extensions.Logging.Abstractions;
using Xnbd.Server;
using Xnbd.Storage;
using Xnbd.Storage.Layers;

namespace Xnbd.Programs;

/// <summary>
/// Writes a disk as qcow2. The work is done by qemu-img, which reads the disk from a server in this process, on a
/// socket of its own.
/// </summary>
internal static class LayerQcow2
{
    /// <summary>Runs <c>qemu-img convert</c>, which draws its progress itself.</summary>
    /// <exception cref="FailureException">qemu-img is absent, or has failed; nothing is left behind.</exception>
    public static void Export(Disk disk, string output, CancellationToken cancel)
    {
        string folder = Directory.CreateTempSubdirectory("xnbd-layer-").FullName;
        string socket = Path.Combine(folder, "socket");
        var server = new NbdServer(
            new ExportTable(new Export("", "", disk)), HandshakeStyle.FixedNewstyle, NullLogger.Instance);
        try
        {
            server.Listen(socket);
            server.Start();
            NewFile.Write(output, (partial, _) =>
            {
                List<string> arguments =
                    ["convert", "-f", "raw", "-O", "qcow2", $"nbd+unix:///?socket={socket}", "file:" + partial];
                if (!Console.IsOutputRedirected)
                    arguments.Insert(1, "-p");
                using Process process = Process.Start(
                    new ProcessStartInfo("qemu-img", arguments) { UseShellExecute = false })!;
                using (cancel.Register(() => process.Kill()))
                    process.WaitForExit();
                cancel.ThrowIfCancellationRequested();
                return process.ExitCode == 0
                    ? Task.CompletedTask
                    : throw new FailureException($"qemu-img ended with exit code {process.ExitCode}");
            }).GetAwaiter().GetResult();
        }
        catch (Win32Exception failure)
        {
            throw new FailureException($"qcow2 is written by qemu-img, which cannot be run: {failure.Message}");
        }
        finally
        {
            server.Stop();
            Directory.Delete(folder, recursive: true);
        }
    }
}
