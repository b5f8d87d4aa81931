using Xnbd.Protocol;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>Layers on block devices: they notice what others have written to the device.</summary>
public sealed class DeviceLayerTests : IDisposable
{
    private const int Size = 32 << 20; // so many blocks that the 64 that are sampled tell nothing
    private const int Place = 8193 * 1000; // none of them

    private readonly TempFolder _folder = new();
    private readonly string _file;

    public DeviceLayerTests() => _file = _folder.Random("disk.img", Size);

    public void Dispose() => _folder.Dispose();

    private string First => _folder.File("first.layer");

    private string Second => _folder.File("second.layer");

    /// <summary>Serves a layer for a moment.</summary>
    /// <returns>Why it was refused; null if it was served.</returns>
    private string? Serve(string device, string layer, byte[]? data = null, params string[] options)
    {
        try
        {
            using ServerProcess server = ServerProcess.StartMode(
                "--cow-target", _folder, device, ["--cow-layer", layer, .. options]);
            if (data is not null)
            {
                using NbdTestClient client = server.Open();
                Assert.Equal(NbdError.None, client.Write(Place, data));
            }

            Assert.Equal(0, server.Stop());
            return null;
        }
        catch (InvalidOperationException refused)
        {
            return refused.Message;
        }
    }

    /// <summary>
    /// How the device's changes are known: by its file's time, or by the kernel's counters, and how it is attached.
    /// </summary>
    public static TheoryData<bool, string> Devices => new()
    {
        { true, "--direct-io=off" }, { true, "--direct-io=on" }, { false, "--direct-io=off" },
        { false, "--direct-io=on" },
    };

    private async Task<LoopDevice> Attach(bool hasFile, string option)
    {
        LoopDevice device = await LoopDevice.Attach(_file, option);
        if (!hasFile)
            File.Delete(_file); // then it is a device like any other
        return device;
    }

    [Theory]
    [MemberData(nameof(Devices))]
    public async Task A_commit_is_noticed_by_the_other_layers(bool hasFile, string option)
    {
        using LoopDevice device = await Attach(hasFile, option);
        string reason = hasFile ? "modified" : "it has been written since";
        byte[] data = [.. Enumerable.Repeat((byte)7, 100)];
        Assert.Null(Serve(device.Path, First, data));
        Assert.Null(Serve(device.Path, Second));
        Assert.Null(Serve(device.Path, First)); // to be served changes nothing
        await Tool.Run("blkid", "-p", device.Path);
        await Tool.Succeed("dd", $"if={device.Path}", "of=/dev/null", "bs=1M");
        Assert.Null(Serve(device.Path, Second)); // nor does reading

        await Tool.Succeed(Layers.Program, "commit", First);
        Assert.Null(Serve(device.Path, First)); // it knows its own commit
        Assert.Contains(reason, Serve(device.Path, Second), StringComparison.Ordinal);
        string[][] works = [["commit", Second], ["export", Second, _folder.File("out")], ["diff", Second]];
        foreach (string[] work in works)
        {
            ToolResult refused = await Tool.Run(Layers.Program, work);
            Assert.Equal(1, refused.ExitCode);
            Assert.Contains(reason, refused.Errors, StringComparison.Ordinal);
        }

        Assert.Null(Serve(device.Path, Second, data, "--force"));
        Assert.Null(Serve(device.Path, Second)); // it is bound to the device as it is now
        await Tool.Succeed(Layers.Program, "commit", Second);
        Assert.Contains(reason, Serve(device.Path, First), StringComparison.Ordinal);
        await Tool.Succeed(Layers.Program, "discard", First);
        Assert.Null(Serve(device.Path, First));
    }

    [Theory]
    [MemberData(nameof(Devices))]
    public async Task Writes_and_discards_of_others_are_noticed(bool hasFile, string option)
    {
        using LoopDevice device = await Attach(hasFile, option);
        Assert.Null(Serve(device.Path, First));
        foreach (string[] change in (string[][])[
            // in the page cache
            ["dd", "if=/dev/urandom", $"of={device.Path}", "bs=1", "count=3", $"seek={Place}", "conv=notrunc"],
            ["blkdiscard", "--offset", "8192000", "--length", "4096", device.Path],
            ["blkdiscard", "--zeroout", "--offset", "8192000", "--length", "4096", device.Path]])
        {
            await Tool.Succeed(change[0], change[1..]);
            Assert.Contains("is not as it was", Serve(device.Path, First), StringComparison.Ordinal);
            Assert.Null(Serve(device.Path, First, null, "--force"));
            Assert.Null(Serve(device.Path, First));
        }
    }

    [Fact]
    public async Task A_layer_on_a_loop_device_is_known_after_the_device_was_attached_anew()
    {
        string device;
        using (LoopDevice first = await LoopDevice.Attach(_file))
        {
            device = first.Path;
            Assert.Null(Serve(device, First));
        }

        using LoopDevice second = await LoopDevice.Attach(_file);
        Assert.Null(Serve(second.Path, First));
    }

    [Fact]
    public async Task Another_disk_of_the_same_number_is_another_disk()
    {
        string copy = _folder.File("copy.img"), device;
        File.Copy(_file, copy);
        using (LoopDevice first = await Attach(hasFile: false, "--direct-io=off"))
        {
            device = first.Path;
            Assert.Null(Serve(device, First));
        }

        using LoopDevice second = await LoopDevice.Attach(copy);
        Assert.SkipUnless(second.Path == device, "somebody else took the number");
        File.Delete(copy);
        Assert.Contains("taken away and attached again", Serve(device, First), StringComparison.Ordinal);
    }

    [Fact]
    public async Task Where_nothing_is_counted_a_layer_is_refused_unless_forced()
    {
        using LoopDevice device = await Attach(hasFile: false, "--direct-io=off");
        Assert.Null(Serve(device.Path, First));
        string switching = $"/sys/block/{device.Name}/queue/iostats";
        File.WriteAllText(switching, "0");
        try
        {
            for (int i = 0; i < 2; i++)
            {
                Assert.Contains("the kernel does not count", Serve(device.Path, First), StringComparison.Ordinal);
                Assert.Null(Serve(device.Path, First, null, "--force"));
            }
        }
        finally
        {
            File.WriteAllText(switching, "1");
        }
    }

    [Fact]
    public async Task A_partition_has_counters_of_its_own()
    {
        Assert.SkipWhen(Tool.Find("addpart") is null, "addpart is absent");
        using LoopDevice device = await LoopDevice.Attach(_file);
        await Tool.Succeed("addpart", device.Path, "1", "2048", "16384");
        string partition = device.Path + "p1";
        try
        {
            Wait.Until(() => File.Exists(partition), "the partition is there");
            Assert.Null(Serve(partition, First));
            Assert.Null(Serve(partition, Second));
            await Tool.Succeed(
                "dd", "if=/dev/zero", $"of={device.Path}", "bs=4096", "count=1", "seek=7000", "conv=notrunc,fsync");
            Assert.Null(Serve(partition, Second)); // that was behind it
            await Tool.Succeed(
                "dd", "if=/dev/zero", $"of={partition}", "bs=1", "count=1", "seek=999999", "conv=notrunc");
            Assert.Contains("it has been written since", Serve(partition, Second), StringComparison.Ordinal);
        }
        finally
        {
            await Tool.Succeed("delpart", device.Path, "1");
        }
    }

    [Fact]
    public async Task After_the_machine_was_started_anew_nobody_can_know()
    {
        using LoopDevice device = await Attach(hasFile: false, "--direct-io=off");
        Assert.Null(Serve(device.Path, First));
        // a bit of the run of the machine, in the recorded version
        LayerHeader.Change(First, header => header[72 + 6] ^= 1);
        Assert.Contains("the machine has been started anew", Serve(device.Path, First), StringComparison.Ordinal);
        LayerHeader.Change(First, header => header[72..80].Clear()); // as version 0.1.0 has recorded it
        Assert.Contains("the layer does not say", Serve(device.Path, First), StringComparison.Ordinal);
        Assert.Null(Serve(device.Path, First, null, "--force"));
        Assert.Null(Serve(device.Path, First));
    }
}

/// <summary>Changes the header of a layer, as docs/formats.md describes it.</summary>
internal static class LayerHeader
{
    public delegate void HeaderChange(Span<byte> header);

    public static void Change(string layer, HeaderChange change)
    {
        using FileStream file = File.Open(layer, FileMode.Open, FileAccess.ReadWrite);
        byte[] copies = new byte[2 * 4096];
        file.ReadExactly(copies);
        foreach (int at in (int[])[0, 4096])
        {
            Span<byte> header = copies.AsSpan(at, 4096);
            change(header);
            System.Buffers.Binary.BinaryPrimitives.WriteUInt64LittleEndian(
                header[4088..], System.IO.Hashing.XxHash3.HashToUInt64(header[..4088]));
        }

        file.Position = 0;
        file.Write(copies);
    }
}
