using System.Buffers.Binary;
using Xnbd.Storage.Images;
using Xnbd.TestKit;

namespace Xnbd.Storage.Tests;

public sealed class SnapshotTests : IDisposable
{
    private const int BlockSize = 4096;

    private readonly TempFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [Fact]
    public async Task A_snapshot_holds_a_prefix_of_the_writes_by_copy()
        => await CheckPrefix(_folder.Path, isReflink: false);

    [Fact]
    public void A_snapshot_of_an_image_that_is_too_long_to_be_copied_is_refused()
    {
        string path = $"/dev/shm/xnbd-{Guid.NewGuid():N}"; // tmpfs has such files, and shares no blocks
        try
        {
            using (FileStream file = File.Create(path))
                file.SetLength(long.MaxValue);
            using ImageFile image = ImageFile.Open(path, readOnly: false);
            DiskException refused = Assert.Throws<DiskException>(() => image.TakeSnapshot(
                DateTimeOffset.UtcNow, () => { }, _ => { }, TestContext.Current.CancellationToken));
            Assert.Contains("can share blocks", refused.Message, StringComparison.Ordinal);
            Assert.Empty(Directory.GetFiles("/dev/shm", Path.GetFileName(path) + ".snapshot*"));
        }
        catch (Exception failure) when (failure is IOException or DirectoryNotFoundException)
        {
            Assert.Skip($"no file of that length: {failure.Message}");
        }
        finally
        {
            File.Delete(path);
        }
    }

    [Theory]
    [InlineData("xfs")]
    [InlineData("btrfs")]
    public async Task A_snapshot_holds_a_prefix_of_the_writes_by_reflink(string kind)
    {
        using var mount = await LoopMount.Create(_folder, kind, 512 << 20);
        await CheckPrefix(mount.Path, isReflink: true);
    }

    /// <summary>
    /// A writer overwrites random blocks with ever higher numbers, one after the other. Of each snapshot: let N be the
    /// highest number in it; then each block holds the last number up to N that was written there.
    /// </summary>
    private static async Task CheckPrefix(string folder, bool isReflink)
    {
        const int blocks = 6000;
        string path = Path.Combine(folder, "image");
        using (FileStream file = File.Create(path))
            file.SetLength((long)blocks * BlockSize);
        using ImageFile image = ImageFile.Open(path, readOnly: false);

        var history = new List<int>(); // history[n] is the block that number n + 1 was written to
        using var stop = new CancellationTokenSource();
        var random = new Random(11);
        Task writer = Task.Run(async () =>
        {
            byte[] data = new byte[BlockSize];
            while (!stop.IsCancellationRequested)
            {
                int block = random.Next(blocks);
                lock (history)
                    history.Add(block);
                data.AsSpan().Fill((byte)history.Count);
                BinaryPrimitives.WriteInt32LittleEndian(data, history.Count);
                if (!image.TryWrite((long)block * BlockSize, data))
                    await image.WriteAsync((long)block * BlockSize, data, durable: false);
            }
        });

        var snapshots = new List<(SnapshotResult Snapshot, int Before, int After)>();
        try
        {
            for (int i = 0; i < 6; i++)
            {
                await Task.Delay(30);
                int before = Count(history), after = 0;
                SnapshotResult snapshot = image.TakeSnapshot(
                    DateTimeOffset.UnixEpoch.AddSeconds(1000), () => after = Count(history),
                    _ => { }, CancellationToken.None);
                snapshots.Add((snapshot, before, after));
            }
        }
        finally
        {
            stop.Cancel();
            await writer;
        }

        Assert.Equal(6, snapshots.Select(s => s.Snapshot.Path).Distinct().Count()); // one second, six names
        Assert.Empty(Directory.GetFiles(folder, "*.partial"));
        foreach ((SnapshotResult snapshot, int before, int after) in snapshots)
        {
            Assert.Equal(isReflink, snapshot.IsReflink);
            byte[] bytes = File.ReadAllBytes(snapshot.Path);
            int[] found = new int[blocks];
            for (int b = 0; b < blocks; b++)
            {
                found[b] = BinaryPrimitives.ReadInt32LittleEndian(bytes.AsSpan(b * BlockSize));
                ReadOnlySpan<byte> rest = bytes.AsSpan((b * BlockSize) + 4, BlockSize - 4);
                Assert.False(rest.ContainsAnyExcept((byte)found[b]), "a torn block");
            }

            int last = found.Max();
            // what was replied to before is in it (the last one may be under way)
            Assert.InRange(last, before - 1, after);
            int[] expected = new int[blocks];
            for (int n = 1; n <= last; n++)
                expected[history[n - 1]] = n;
            Assert.Equal(expected, found);
        }
    }

    private static int Count(List<int> history)
    {
        lock (history)
            return history.Count;
    }

    [Fact]
    public async Task A_copy_is_sparse_and_survives_trim_and_zeroes_meanwhile()
    {
        string path = _folder.Sparse("image", 64 << 20);
        using ImageFile image = ImageFile.Open(path, readOnly: false);
        byte[] data = new byte[4 << 20];
        new Random(3).NextBytes(data);
        await image.WriteAsync(8 << 20, data, durable: false);
        byte[] before = File.ReadAllBytes(path);

        bool changed = false;
        SnapshotResult snapshot = image.TakeSnapshot(
            DateTimeOffset.UtcNow,
            () => { },
            position =>
            {
                if (changed)
                    return;
                changed = true; // amid the copy: discard, zero and overwrite what is not copied yet
                image.TrimAsync(8 << 20, 1 << 20, durable: false).AsTask().Wait();
                image.ZeroAsync((9 << 20) + 5, 1 << 20, ZeroMode.MayPunch, durable: false).AsTask().Wait();
                image.WriteAsync((10 << 20) + 5, new byte[1 << 20], durable: false).AsTask().Wait();
                image.WriteAsync(40 << 20, data, durable: false).AsTask().Wait();
            },
            CancellationToken.None);
        Assert.SkipWhen(snapshot.IsReflink, "this file system shares blocks");
        Assert.Equal(before, File.ReadAllBytes(snapshot.Path));
        Assert.InRange(snapshot.AllocatedBytes, 1, 5 << 20);
    }

    [Fact]
    public async Task A_snapshot_without_room_leaves_the_service_running_and_nothing_behind()
    {
        using TmpfsMount mount = await TmpfsMount.Create(_folder, "3m");
        string path = mount.File("image");
        byte[] data = new byte[2 << 20];
        new Random(4).NextBytes(data);
        File.WriteAllBytes(path, data);
        using ImageFile image = ImageFile.Open(path, readOnly: false);
        DiskException failure = Assert.Throws<DiskException>(
            () => image.TakeSnapshot(DateTimeOffset.UtcNow, () => { }, _ => { }, CancellationToken.None));
        Assert.Equal(DiskError.NoSpace, failure.Error);
        Assert.Equal([path], Directory.GetFiles(mount.Path));
        Assert.True(image.TryWrite(0, new byte[4096]));
    }

    [Fact]
    public void What_a_killed_server_left_is_removed_unless_it_is_in_use()
    {
        string path = _folder.Sparse("image", 4096);
        string abandoned = _folder.Sparse("image.snapshot.123.partial", 100);
        string other = _folder.Sparse("image.snapshot.abc.partial", 100);
        string finished = _folder.Sparse("image.snapshot.123", 100);
        string used = _folder.Sparse("image.snapshot.124.partial", 100);
        using ImageFile image = ImageFile.Open(path, readOnly: false);
        Xnbd.Linux.LinuxFile.Open(used, Xnbd.Linux.OpenMode.ReadOnly, out var holder);
        using (holder)
        {
            Assert.Equal(Xnbd.Linux.Errno.None, Xnbd.Linux.LinuxFile.TryLock(holder!));
            Assert.Equal([abandoned], image.RemoveAbandonedSnapshots());
        }

        Assert.False(File.Exists(abandoned));
        Assert.True(File.Exists(other) && File.Exists(finished) && File.Exists(used));
    }

    [Fact]
    public void A_snapshot_is_for_the_same_eyes_as_its_image()
    {
        string path = _folder.Sparse("image", 4096);
        File.SetUnixFileMode(path, UnixFileMode.UserRead | UnixFileMode.UserWrite);
        using ImageFile image = ImageFile.Open(path, readOnly: false);
        SnapshotResult snapshot = image.TakeSnapshot(
            DateTimeOffset.UtcNow, () => { }, _ => { }, CancellationToken.None);
        Assert.Equal(UnixFileMode.UserRead | UnixFileMode.UserWrite, File.GetUnixFileMode(snapshot.Path));
    }

    [Fact]
    public void An_image_that_has_grown_is_copied_as_far_as_it_is_served()
    {
        string path = _folder.Random("image", 1 << 20);
        byte[] before = File.ReadAllBytes(path);
        using ImageFile image = ImageFile.Open(path, readOnly: false);
        using (FileStream file = File.Open(path, FileMode.Open, FileAccess.Write, FileShare.ReadWrite))
        {
            file.Position = 100 << 20;
            file.Write([1]);
        }

        SnapshotResult snapshot = image.TakeSnapshot(
            DateTimeOffset.UtcNow, () => { }, _ => { }, CancellationToken.None);
        Assert.SkipWhen(snapshot.IsReflink, "this file system shares blocks");
        Assert.Equal(before, File.ReadAllBytes(snapshot.Path));
    }

    [Fact]
    public void A_cancelled_snapshot_leaves_nothing_behind()
    {
        string path = _folder.Random("image", 8 << 20);
        using ImageFile image = ImageFile.Open(path, readOnly: false);
        using var cancel = new CancellationTokenSource();
        try
        {
            image.TakeSnapshot(DateTimeOffset.UtcNow, () => { }, _ => cancel.Cancel(), cancel.Token);
            Assert.Skip("this file system shares blocks: there was nothing to cancel");
        }
        catch (OperationCanceledException)
        {
            Assert.Equal([path], Directory.GetFiles(_folder.Path));
        }
    }

    [Fact]
    public void A_write_during_a_copy_waits_for_its_own_block_only()
    {
        string path = _folder.Random("image", 64 << 20);
        using ImageFile image = ImageFile.Open(path, readOnly: false);
        bool isCopy = false;
        image.TakeSnapshot(
            DateTimeOffset.UtcNow,
            () => { },
            position =>
            {
                isCopy = true;
                if (position != 0)
                    return;
                // The copy stands still here, at its beginning: a writer elsewhere must not wait for it.
                Task write = image.WriteAsync(60 << 20, new byte[4096], durable: false).AsTask();
                Assert.True(Task.WaitAny([write], TimeSpan.FromSeconds(20)) == 0, "the write waits for the copy");
            },
            CancellationToken.None);
        Assert.SkipUnless(isCopy, "this file system shares blocks");
    }
}
