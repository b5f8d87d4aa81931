using Xnbd.Storage.Images;
using Xnbd.Storage.Layers;
using Xnbd.Storage.Maps;
using Xnbd.TestKit;

namespace Xnbd.Storage.Tests;

/// <summary>Files of layers: made, opened, locked, refused, cleaned away.</summary>
public sealed class LayerTests : IDisposable
{
    private readonly TempFolder _folder = new();
    private readonly string _base;

    public LayerTests() => _base = _folder.Random("base.img", 1 << 20);

    public void Dispose() => _folder.Dispose();

    private string Layer => _folder.File("layer");

    private Disk Open(bool force = false, bool readOnly = false, params string[] layers)
        => LayerStack.OpenKept(_base, layers.Length > 0 ? layers : [Layer], readOnly, force, _ => { });

    [Fact]
    public async Task A_kept_layer_is_used_again()
    {
        byte[] data = [.. Enumerable.Repeat((byte)9, 5000)];
        using (Disk disk = Open())
            await disk.WriteAsync(1000, data, durable: false);
        byte[] seen = new byte[5000];
        using (Disk disk = Open())
        {
            Assert.True(disk.TryRead(1000, seen));
            Assert.Equal(data, seen);
        }

        using Disk readOnly = Open(readOnly: true);
        Assert.True(readOnly.TryRead(1000, seen));
        Assert.Equal(DiskFeatures.ReadOnly | DiskFeatures.Layered, readOnly.Features);
    }

    [Theory]
    [InlineData("contents", "its contents differ")]
    [InlineData("time", "modified 2001-01-01")]
    [InlineData("length", "has 1052672 bytes")]
    public void A_base_that_has_changed_is_refused_with_what_differs(string change, string message)
    {
        Open().Dispose();
        byte[] before = File.ReadAllBytes(Layer);
        DateTime time = File.GetLastWriteTimeUtc(_base);
        switch (change)
        {
            case "contents":
                using (FileStream file = File.OpenWrite(_base))
                    file.WriteByte(77);
                File.SetLastWriteTimeUtc(_base, time);
                break;
            case "time":
                File.SetLastWriteTimeUtc(_base, new DateTime(2001, 1, 1, 0, 0, 0, DateTimeKind.Utc));
                break;
            default:
                using (FileStream file = File.OpenWrite(_base))
                    file.SetLength((1 << 20) + 4096);
                break;
        }

        var failure = Assert.Throws<DiskException>(() => Open());
        Assert.Contains(message, failure.Message, StringComparison.Ordinal);
        Assert.Equal(DiskError.Mismatch, failure.Error);
        Assert.Equal(change == "length" ? Remedy.None : Remedy.BindToChangedBase, failure.Remedy);
        Assert.Equal(before, File.ReadAllBytes(Layer));
        if (change == "length")
        {
            Assert.Throws<DiskException>(() => Open(force: true));
            return;
        }

        Open(force: true).Dispose();
        Open().Dispose(); // force has bound it to the base as it is now
    }

    [Fact]
    public void A_layer_in_use_is_refused_and_lower_ones_are_shared()
    {
        Open().Dispose();
        string top1 = _folder.File("top1"), top2 = _folder.File("top2");
        using (Open())
        {
            var refused = Assert.Throws<InUseException>(() => Open());
            Assert.Contains("in use", refused.Message, StringComparison.Ordinal);
            Assert.Equal(DiskError.InUse, refused.Error);
        }

        using Disk first = Open(layers: [Layer, top1]);
        using Disk second = Open(layers: [Layer, top2]);
        Assert.Throws<InUseException>(() => Open());
        Assert.Throws<InUseException>(() => Open(layers: [Layer, top2]));
        Assert.Throws<InUseException>(() => ImageFile.Open(_base, readOnly: false, ImageUse.Alone));
        // somebody relies on its staying as it is
        Assert.Throws<InUseException>(() => ImageFile.Open(_base, readOnly: false));
        using ImageFile reader = ImageFile.Open(_base, readOnly: true);
    }

    [Fact]
    public void A_lower_layer_that_was_written_later_is_a_base_that_has_changed()
    {
        string top = _folder.File("top");
        Open().Dispose();
        Open(layers: [Layer, top]).Dispose();
        using (Disk disk = Open())
            Assert.True(disk.TryWrite(0, new byte[4096]));
        Assert.Contains(
            "is not as it was",
            Assert.Throws<DiskException>(() => Open(layers: [Layer, top])).Message,
            StringComparison.Ordinal);
        string swapped = Assert.Throws<DiskException>(() => Open(layers: [top, Layer])).Message;
        Assert.Contains("it is an image, and was a layer", swapped, StringComparison.Ordinal);
    }

    [Fact]
    public void A_file_that_is_no_layer_is_refused_and_untouched()
    {
        foreach (byte[] content in (byte[][])[[], new byte[100], new byte[100_000], File.ReadAllBytes(_base)])
        {
            File.WriteAllBytes(Layer, content);
            Assert.Contains(
                "no xNBD layer", Assert.Throws<DiskException>(() => Open()).Message, StringComparison.Ordinal);
            Assert.Equal(content, File.ReadAllBytes(Layer));
        }
    }

    [Fact]
    public async Task A_damaged_layer_is_refused_and_untouched_and_one_torn_copy_is_no_damage()
    {
        using (Disk disk = Open())
            await disk.WriteAsync(0, new byte[] { 1, 2, 3 }, durable: true);
        byte[] whole = File.ReadAllBytes(Layer);

        // Two copies of the header, at 0 and 4096. The newer one is at 4096: its sequence is 1.
        byte[] damaged = [.. whole];
        damaged[4096 + 60] ^= 1;
        File.WriteAllBytes(Layer, damaged);
        Assert.Contains("no xNBD layer", Assert.Throws<DiskException>(() => Open()).Message, StringComparison.Ordinal);
        damaged[0] = (byte)'x';
        "xNBD-MAP"u8.CopyTo(damaged);
        File.WriteAllBytes(Layer, damaged);
        Assert.Contains("damaged", Assert.Throws<DiskException>(() => Open()).Message, StringComparison.Ordinal);
        Assert.Equal(damaged, File.ReadAllBytes(Layer));

        File.WriteAllBytes(Layer, whole[..^5000]);
        Assert.Contains("too short", Assert.Throws<DiskException>(() => Open()).Message, StringComparison.Ordinal);

        // The durable map's only page: copy 0 was never written, copy 1 is the newest.
        int slot = (int)(MapLayout.FileLength(1 << 20) - 4096);
        damaged = [.. whole];
        damaged[slot + 40] ^= 1;
        File.WriteAllBytes(Layer, damaged);
        Open().Dispose(); // its live part is right
        damaged[slot - 4096] ^= 1;
        damaged[slot] ^= 1;
        File.WriteAllBytes(Layer, damaged);
        var torn = Assert.Throws<DiskException>(() => Open());
        Assert.Contains("both copies of page 0", torn.Message, StringComparison.Ordinal);
        Assert.Equal(DiskError.Damaged, torn.Error);
        Assert.Equal(damaged, File.ReadAllBytes(Layer));
    }

    [Fact]
    public async Task Disposable_layers_stand_side_by_side_and_go()
    {
        string Name(int n) => $"{_base}.cow{n}.layer1";
        File.WriteAllBytes(Name(1), [1, 2, 3]); // somebody's file
        var removed = new List<string>();
        using (Disk first = LayerStack.OpenDisposable(_base, null, readOnly: false, removed.Add))
        using (Disk second = LayerStack.OpenDisposable(_base, null, readOnly: false, removed.Add))
        {
            Assert.True(File.Exists(Name(0)) && File.Exists(Name(2)));
            Assert.True(first.TryWrite(0, [.. Enumerable.Repeat((byte)1, 4096)]));
            byte[] seen = new byte[4096];
            Assert.True(second.TryRead(0, seen));
            Assert.Equal(File.ReadAllBytes(_base)[..4096], seen);
            await Tool.Succeed("cp", Name(0), Name(3)); // what a killed server leaves: nobody holds it
            await Tool.Succeed("cp", Name(0), Name(5) + "x");
            File.WriteAllBytes(Name(4), []); // and one that was killed before it had a header
            using Disk third = LayerStack.OpenDisposable(_base, null, readOnly: false, removed.Add);
            Assert.Equal([Name(3), Name(4)], removed.Order());
        }

        Assert.Equal([Name(1), Name(5) + "x"], Directory.GetFiles(_folder.Path, "*.layer1*").Order());

        string elsewhere = Directory.CreateDirectory(_folder.File("layers")).FullName;
        using Disk disk = LayerStack.OpenDisposable(_base, elsewhere, readOnly: false, removed.Add);
        Assert.Equal([Path.Combine(elsewhere, "base.img.cow0.layer1")], Directory.GetFiles(elsewhere));
    }

    [Fact]
    public async Task A_layer_that_a_killed_server_left_can_be_rescued_and_is_not_removed_by_looking_at_it()
    {
        string left = _folder.File("left"), output = _folder.File("out");
        using (Disk disk = LayerStack.OpenDisposable(_base, null, readOnly: false, _ => { }))
        {
            await disk.WriteAsync(5, new byte[] { 1, 2, 3 }, durable: false);
            await Tool.Succeed("cp", $"{_base}.cow0.layer1", left);
        }

        await LayerDiff.Run(left, null, (_, _, _) => { }, default);
        using (Disk merged = LayerStack.OpenMerged(left, null))
            await LayerExport.WriteRaw(merged, output, _ => { }, default);
        byte[] expected = File.ReadAllBytes(_base);
        new byte[] { 1, 2, 3 }.CopyTo(expected, 5);
        Assert.Equal(expected, File.ReadAllBytes(output));
        Assert.Throws<DiskException>(() => Open(layers: [left])); // it would not be durable
        await Assert.ThrowsAsync<DiskException>(() => LayerCommit.Run(left, null, _ => { }, default));
        Assert.True(File.Exists(left));
    }

    [Fact]
    public async Task A_layer_that_was_being_emptied_is_refused_until_that_is_complete()
    {
        using (Disk disk = Open())
            await disk.WriteAsync(0, new byte[100_000], durable: true);
        LayerFile file = LayerFile.Open(Layer, readOnly: false);
        file.Map.PrepareToWrite();
        file.Map.ChangeHeader(header => header with { Flags = MapFlags.Discarding }); // it died here
        file.Map.Set(new BlockRange(0, 10), BlockState.Absent);
        file.Dispose();
        foreach (Action open in (Action[])[() => Open(), () => LayerStack.OpenMerged(Layer, null)])
        {
            var refused = Assert.Throws<DiskException>(open);
            Assert.Equal((Remedy.CompleteDiscard, Layer), (refused.Remedy, refused.RemedyPath));
        }

        LayerDiscard.Run(Layer, null);
        using Disk empty = Open();
        byte[] seen = new byte[1 << 20];
        await empty.ReadAsync(0, seen);
        Assert.Equal(File.ReadAllBytes(_base), seen);
    }

    [Fact]
    public async Task A_lower_layer_whose_server_was_killed_is_settled_before_it_is_built_upon()
    {
        using (Disk disk = Open())
            await disk.WriteAsync(0, new byte[] { 9 }, durable: true);
        LayerFile killed = LayerFile.Open(Layer, readOnly: false); // it wrote, and died before a flush
        killed.Map.PrepareToWrite();
        await killed.Data.WriteAsync(8192, new byte[4096], durable: false);
        killed.Map.Set(new BlockRange(2, 1), BlockState.Written);
        killed.Dispose();
        using Disk top = Open(layers: [Layer, _folder.File("top")]);
        LayerFile lower = LayerFile.OpenUnlocked(Layer, out _);
        Assert.True(lower.Map.IsCommitted);
        Assert.Equal(BlockState.Written, lower.Map[2]);
        lower.Dispose();
    }

    [Fact]
    public void Force_binds_a_layer_to_a_base_of_another_kind()
    {
        string top = _folder.File("top");
        Open().Dispose();
        Open(layers: [Layer, top]).Dispose();
        Assert.Throws<DiskException>(() => Open(layers: [top]));
        Open(force: true, layers: [top]).Dispose();
        Open(layers: [top]).Dispose();
        using Disk merged = LayerStack.OpenMerged(top, null);
    }

    [Fact]
    public void A_map_of_a_very_long_disk_opens_after_a_reboot()
    {
        const long length = 33L << 40;
        var store = new LossyStore(new LossyFile(new Random(1)));
        var map = BlockMap.Create(store, new MapHeader
        {
            Id = Guid.NewGuid(),
            BootId = Guid.NewGuid(),
            Flags = MapFlags.Disposable,
            DataStart = 0,
            Source = new SourceIdentity("x", length, 5, 6),
        });
        map.Set(new BlockRange((length / 4096) - 1, 1), BlockState.Written);
        map.Commit();
        map = BlockMap.Open(store, Guid.NewGuid());
        map.PrepareToWrite();
        Assert.Equal(BlockState.Written, map[(length / 4096) - 1]);
        Assert.Equal(1, map.Count(BlockState.Written));
    }

    [Fact]
    public async Task A_commit_of_the_map_for_which_there_is_no_room_succeeds_later()
    {
        var file = new LossyFile(new Random(1));
        var store = new FullStore(new LossyStore(file));
        var map = BlockMap.Create(store, new MapHeader
        {
            Id = Guid.NewGuid(),
            BootId = Guid.NewGuid(),
            Flags = MapFlags.None,
            DataStart = 1 << 20,
            Source = new SourceIdentity("x", 1 << 20, 5, 6),
        });
        using var disk = new CowDisk(
            new MemoryDisk(1 << 20), new LossyDisk(file, 1 << 20, 1 << 20), map, readOnly: false);
        await disk.WriteAsync(0, new byte[4096], durable: false);
        store.IsFull = true;
        var failure = await Assert.ThrowsAsync<DiskException>(async () => await disk.FlushAsync());
        Assert.Equal(DiskError.NoSpace, failure.Error);
        Assert.False(map.IsCommitted);
        store.IsFull = false;
        await disk.FlushAsync();
        Assert.True(map.IsCommitted);
    }

    private sealed class FullStore(IMapStore inner) : IMapStore
    {
        public bool IsFull { get; set; }

        public void Read(long offset, Span<byte> buffer) => inner.Read(offset, buffer);

        public void Write(long offset, ReadOnlySpan<byte> data)
        {
            if (IsFull)
                throw new DiskException(DiskError.NoSpace, "no space");
            inner.Write(offset, data);
        }

        public void Sync() => inner.Sync();

        public void Allocate(long offset, long length) => inner.Allocate(offset, length);

        public (long Start, long End) FindData(long offset, long end) => inner.FindData(offset, end);
    }

    [Fact]
    public void A_disposable_layers_name_is_removed_once()
    {
        string name = $"{_base}.cow0.layer1";
        Disk disk = LayerStack.OpenDisposable(_base, null, readOnly: false, _ => { });
        LayerStack.Abandon(disk);
        Assert.False(File.Exists(name));
        Assert.True(disk.TryWrite(0, new byte[4096])); // the file lives until the disk is closed
        File.WriteAllBytes(name, [1]); // somebody takes the name
        disk.Dispose();
        disk.Dispose();
        Assert.Equal([1], File.ReadAllBytes(name));
    }

    [Fact]
    public void A_closed_layer_can_be_opened_at_once()
    {
        for (int i = 0; i < 20; i++)
        {
            using Disk disk = Open();
            Assert.True(disk.TryWrite(i * 4096, new byte[4096]));
        }
    }

    [Fact]
    public void A_kept_layer_of_a_disposable_ones_name_is_not_cleaned_away()
    {
        string name = $"{_base}.cow0.layer1";
        Open(layers: [name]).Dispose();
        using (Disk disk = LayerStack.OpenDisposable(_base, null, readOnly: false, _ => Assert.Fail("it was removed")))
            Assert.True(File.Exists($"{_base}.cow1.layer1"));
        Assert.True(File.Exists(name));
    }

    [Fact]
    public void A_layer_that_cannot_be_made_leaves_nothing()
    {
        Assert.Throws<DiskException>(() => Open(layers: [_folder.File("no/such/folder")]));
        Assert.Throws<DiskException>(() => Open(readOnly: true)); // absent, and not to be made
        Assert.Throws<DiskException>(
            () => LayerStack.OpenKept(_folder.File("nothing"), [Layer], false, false, _ => { }));
        Assert.Equal([_base], Directory.GetFiles(_folder.Path));
        File.WriteAllBytes(Layer + ".partial", [1]); // somebody's
        Open().Dispose();
        Assert.Equal([_base, Layer, Layer + ".partial"], Directory.GetFiles(_folder.Path).Order());
    }

    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    public void The_map_equals_an_array_and_finds_itself_again(int seed)
    {
        const long blocks = (3L * MapLayout.BlocksPerPage) + 77;
        var random = new Random(seed);
        var file = new LossyFile(random);
        Guid boot = Guid.NewGuid();
        var map = BlockMap.Create(new LossyStore(file), new MapHeader
        {
            Id = Guid.NewGuid(),
            BootId = boot,
            Flags = MapFlags.None,
            DataStart = 0,
            Source = new SourceIdentity("x", blocks * 4096, 5, 6),
        });
        var model = new BlockState[blocks];
        for (int i = 0; i < 3000; i++)
        {
            long first = random.NextInt64(blocks);
            var range = new BlockRange(first, 1 + random.NextInt64(Math.Min(blocks - first, 1L << random.Next(16))));
            BlockRange run = map.Run(range, out BlockState state);
            Span<BlockState> expected = model.AsSpan((int)range.First, (int)range.Count);
            int same = expected.IndexOfAnyExcept(state);
            Assert.Equal(range with { Count = same < 0 ? range.Count : same }, run);
            Assert.Equal(state, expected[0]);
            if (random.Next(2) == 0)
            {
                BlockState changed = (BlockState)random.Next(4);
                map.Set(range, changed);
                expected.Fill(changed);
            }

            if (i % 500 == 0)
                map.Commit();
        }

        foreach (BlockState state in Enum.GetValues<BlockState>())
            Assert.Equal(model.LongCount(s => s == state), map.Count(state));
        Assert.False(map.IsCommitted);
        Check(BlockMap.Open(new LossyStore(file), boot)); // the live part
        map = BlockMap.Open(new LossyStore(file), boot);
        map.PrepareToWrite();
        map.Commit();
        file.LoseUnsynced();
        Check(BlockMap.Open(new LossyStore(file), Guid.NewGuid())); // the durable part

        void Check(BlockMap opened)
        {
            for (long block = 0; block < blocks; block++)
                Assert.Equal(model[block], opened[block]);
            Assert.Equal(map.Header.Source, opened.Header.Source);
        }
    }
}
