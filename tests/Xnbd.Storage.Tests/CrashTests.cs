using System.Globalization;
using System.Runtime.InteropServices;
using Xnbd.Storage.Cache;
using Xnbd.Storage.Layers;
using Xnbd.Storage.Maps;
using Xnbd.Storage.Overlay;
using Xnbd.Storage.Threads;

namespace Xnbd.Storage.Tests;

/// <summary>
/// A layer, or a cache with its map in a file of its own, on a file that loses what was not synced. Seeded schedules:
/// random operations, a death of the machine or of the process at a random system call (in the middle of a commit,
/// too), opening again, comparing, and so on. What may be found in a sector after the machine died: what the last flush
/// or durable write covered, or anything written since. After the process died: the last completed write, or what was
/// under way.
/// </summary>
public sealed class CrashTests
{
    private const int Sector = LossyFile.Sector;
    private const int SectorsPerBlock = BlockRange.BlockSize / Sector;
    private const long Blocks = (2L * MapLayout.BlocksPerPage) + 5;
    private const long Length = (Blocks * BlockRange.BlockSize) - (3 * Sector); // a short last block

    // Operations stay near the start, a border of the map's pages, and the end.
    private static readonly long[] s_places =
        [0, (MapLayout.BlocksPerPage - 3) * SectorsPerBlock, (Length / Sector) - 40];
    private const int PlaceSectors = 40;

    private static readonly MemoryDisk s_base = MakeBase();

    [Fact]
    public void No_schedule_of_deaths_loses_what_was_promised_or_shows_what_was_never_written()
    {
        int schedules = int.Parse(
            Environment.GetEnvironmentVariable("XNBD_CRASH_SCHEDULES") ?? "10000", CultureInfo.InvariantCulture);
        int seed = int.Parse(Environment.GetEnvironmentVariable("XNBD_SEED") ?? "20264", CultureInfo.InvariantCulture);
        int deaths = 0;
        Parallel.For(0, schedules, i =>
        {
            var schedule = new Schedule(seed + i);
            schedule.Run();
            Interlocked.Add(ref deaths, schedule.Deaths);
        });
        TestContext.Current.TestOutputHelper?.WriteLine($"{schedules} schedules from seed {seed} on, {deaths} deaths");
        Assert.True(deaths > schedules, "hardly any schedule died: the test tests nothing");
    }

    private static MemoryDisk MakeBase()
    {
        var disk = new MemoryDisk((int)Length);
        foreach (long place in s_places)
        {
            for (long sector = place; sector < place + PlaceSectors; sector++)
                disk.TryWrite(sector * Sector, Fill(BaseValue(sector)));
        }

        return disk;
    }

    private static ulong BaseValue(long sector) => 0xba5e_0000_0000_0000 | (ulong)sector;

    private static byte[] Fill(ulong value)
    {
        byte[] bytes = new byte[Sector];
        MemoryMarshal.Cast<byte, ulong>(bytes.AsSpan()).Fill(value);
        return bytes;
    }

    private sealed class Schedule
    {
        private readonly int _seed;
        private readonly Random _random;
        private readonly LossyFile _file;
        private readonly long _start = (MapLayout.FileLength(Length) + 0xfffff) & ~0xfffffL;
        // what a sector may hold; the last one is what it holds
        private readonly Dictionary<long, List<ulong>> _model = [];
        private Guid _boot = Guid.NewGuid();
        private OverlayDisk _disk;
        private readonly bool _isCache;
        private ulong _nextValue = 1;

        public Schedule(int seed)
        {
            _seed = seed;
            _random = new Random(seed);
            _isCache = seed % 2 == 0;
            _file = new LossyFile(_random);
            foreach (long place in s_places)
            {
                for (long sector = place; sector < place + PlaceSectors; sector++)
                    _model.Add(sector, [BaseValue(sector)]);
            }

            var header = new MapHeader
            {
                Id = Guid.NewGuid(),
                BootId = _boot,
                Flags = _isCache ? MapFlags.Cache : MapFlags.None,
                DataStart = _start,
                Source = new SourceIdentity("base", Length, 0, 0),
            };
            _disk = MakeDisk(BlockMap.Create(MakeStore(), header));
        }

        public int Deaths { get; private set; }

        public void Run()
        {
            for (int life = 0; life < 3; life++)
            {
                _file.OperationsLeft = _random.Next(60);
                try
                {
                    for (int i = 0; i < 40; i++)
                        Operate();
                    Check(isExact: true);
                }
                catch (CrashException)
                {
                    Deaths++;
                }
                catch (DiskException failure) when (
                    failure.Message.Contains(nameof(CrashException), StringComparison.Ordinal))
                {
                    Deaths++; // amid a commit
                }

                // it may die again as it opens
                _file.OperationsLeft = _random.Next(4) == 0 ? _random.Next(4) : int.MaxValue;
                bool isPowerLoss = Die();
                while (true)
                {
                    try
                    {
                        var map = BlockMap.Open(MakeStore(), _boot);
                        map.PrepareToWrite();
                        _disk = MakeDisk(map);
                        Wait(_disk.SettleAsync());
                        break;
                    }
                    catch (Exception failure) when (failure is CrashException or DiskException)
                    {
                        Deaths++;
                        _file.OperationsLeft = int.MaxValue;
                        isPowerLoss |= Die();
                    }
                }

                _file.OperationsLeft = int.MaxValue;
                Check(isExact: !isPowerLoss);
            }
        }

        private LossyStore MakeStore() => new(_file, _isCache ? _start : long.MaxValue);

        private OverlayDisk MakeDisk(BlockMap map)
        {
            var local = new LossyDisk(_file, _start, Length, isAlone: _isCache);
            local.Flushed = () =>
            {
                if (_flushing && _random.Next(2) == 0)
                    Write(isDurable: false); // comes too late for the commit that is under way
            };
            return _isCache
                ? new CachingDisk(
                    s_base, local, map, readOnly: false, new CacheLimits(16, Fetch.MaxBytes), _ => { }, _toStore.Add)
                : new CowDisk(s_base, local, map, readOnly: false);
        }

        /// <summary>What a cache has fetched is stored at some later time.</summary>
        private void StoreFetched()
        {
            IDiskWork[] work = [.. _toStore];
            _toStore.Clear();
            foreach (IDiskWork each in work)
                each.Run();
        }

        private readonly List<IDiskWork> _toStore = [];

        private bool Die()
        {
            bool isPowerLoss = _random.Next(3) > 0; // else only the process dies
            _file.Die();
            StoreFetched(); // too late: it fails
            (_disk as CachingDisk)?.StopStoring();
            if (isPowerLoss)
            {
                _file.LoseUnsynced();
                _boot = Guid.NewGuid();
            }

            return isPowerLoss;
        }

        private void Operate()
        {
            bool isDurable = _random.Next(8) == 0;
            if (_random.Next(4) == 0)
                StoreFetched();
            switch (_random.Next(12))
            {
                case 11 when _disk is CachingDisk cache && cache.Statistics.WrittenBlocks == 0
                    && (cache.Map.Header.Flags & MapFlags.MayHoldWrites) == 0:
                    Invalidate(cache);
                    break;
                case 10:
                    (long from, int sectors) = Range();
                    byte[] seen = new byte[sectors * Sector];
                    if (!_disk.TryRead(from * Sector, seen)) // a cache keeps what was read
                        Wait(_disk.ReadAsync(from * Sector, seen));
                    break;
                case < 5:
                    Write(isDurable);
                    break;
                case < 7:
                    ZeroMode mode = _random.Next(2) == 0 ? ZeroMode.None : ZeroMode.MayPunch;
                    (long start, int length) = Range();
                    Change(
                        start,
                        length,
                        _ => 0,
                        isDurable,
                        () => Wait(_disk.ZeroAsync(start * Sector, (long)length * Sector, mode, isDurable)));
                    break;
                case 7:
                    (long sector, int count) = Range();
                    (long first, long end) = (
                        (sector + SectorsPerBlock - 1) / SectorsPerBlock * SectorsPerBlock, sector + count);
                    if (end * Sector < Length)
                        end = end / SectorsPerBlock * SectorsPerBlock;
                    if (end > first)
                    {
                        Change(first, (int)(end - first), _ => 0, isDurable,
                            () => Wait(_disk.TrimAsync(first * Sector, (end - first) * Sector, isDurable)));
                    }

                    break;
                default:
                    Flush(_model.Values, () => Wait(_disk.FlushAsync()));
                    break;
            }
        }

        /// <summary>
        /// Afterwards all is as in the base, also what a death of the process has left of a write that was under way.
        /// </summary>
        private void Invalidate(CachingDisk cache)
        {
            foreach ((long sector, List<ulong> values) in _model)
            {
                values.Add(BaseValue(sector));
                _underWay[sector] = _underWay.GetValueOrDefault(sector) + 1;
            }

            Wait(new ValueTask(cache.Invalidate()));
            foreach ((long sector, List<ulong> values) in _model)
            {
                values.RemoveRange(0, values.Count - 1);
                _underWay[sector]--;
            }
        }

        private (long Sector, int Count) Range()
        {
            int at = _random.Next(PlaceSectors);
            return (s_places[_random.Next(s_places.Length)] + at, 1 + _random.Next(Math.Min(24, PlaceSectors - at)));
        }

        private void Write(bool isDurable)
        {
            (long sector, int count) = Range();
            ulong value = _nextValue++;
            byte[] data = new byte[count * Sector];
            for (int i = 0; i < count; i++)
                Fill(value << 8 | (uint)i).CopyTo(data, i * Sector);
            Change(sector, count, i => value << 8 | (uint)i, isDurable, () =>
            {
                if (isDurable || !_disk.TryWrite(sector * Sector, data))
                    Wait(_disk.WriteAsync(sector * Sector, data, isDurable));
            });
        }

        private void Change(long sector, int count, Func<int, ulong> value, bool isDurable, Action action)
        {
            for (int i = 0; i < count; i++)
            {
                _model[sector + i].Add(value(i));
                _underWay[sector + i] = _underWay.GetValueOrDefault(sector + i) + 1;
            }

            if (isDurable)
                Flush(Enumerable.Range(0, count).Select(i => _model[sector + i]), action);
            else
                action();
            for (int i = 0; i < count; i++)
                _underWay[sector + i]--;
        }

        /// <summary>After it nothing remains possible that is older than what stood there when it began.</summary>
        private void Flush(IEnumerable<List<ulong>> concerned, Action action)
        {
            var older = concerned.Select(values => (values, values.Count - 1)).ToList();
            _flushing = true;
            action();
            _flushing = false;
            foreach ((List<ulong> values, int count) in older)
                values.RemoveRange(0, count);
        }

        private readonly Dictionary<long, int> _underWay = []; // operations that have not ended, of each sector
        private bool _flushing;

        private void Wait(ValueTask operation)
        {
            Task task = operation.AsTask();
            while (!task.IsCompleted && _toStore.Count > 0)
                StoreFetched(); // it may wait for room
            task.GetAwaiter().GetResult();
        }

        /// <param name="isExact">Nothing that was completed may be missing.</param>
        private void Check(bool isExact)
        {
            byte[] bytes = new byte[Sector];
            foreach ((long sector, List<ulong> values) in _model)
            {
                if (!_disk.TryRead(sector * Sector, bytes))
                    Wait(_disk.ReadAsync(sector * Sector, bytes));
                ulong found = MemoryMarshal.Read<ulong>(bytes);
                bool isWhole = !MemoryMarshal.Cast<byte, ulong>(bytes.AsSpan()).ContainsAnyExcept(found);
                IEnumerable<ulong> allowed = isExact
                    ? values.TakeLast(1 + _underWay.GetValueOrDefault(sector))
                    : values;

                if (!isWhole || !allowed.Contains(found))
                {
                    string expected = string.Join(
                        ", ", allowed.Select(v => v.ToString("x", CultureInfo.InvariantCulture)));
                    Assert.Fail($"seed {_seed}: sector {sector} holds {found:x}, not one of {expected}");
                }

                if (!isExact)
                {
                    values.Clear();
                    values.Add(found);
                }
                else
                {
                    while (found != values[^1])
                        values.RemoveAt(values.Count - 1); // it was under way, and has not happened
                }
            }

            _underWay.Clear();
            _flushing = false;
        }
    }
}
