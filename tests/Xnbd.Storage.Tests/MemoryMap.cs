using Xnbd.Storage.Maps;

namespace Xnbd.Storage.Tests;

/// <summary>Maps that no file keeps, for tests of what uses a map.</summary>
internal static class MemoryMap
{
    /// <summary>A map in which all blocks are absent.</summary>
    /// <param name="length">The disk's length in bytes.</param>
    /// <param name="store">Where it is written; nowhere by default.</param>
    public static BlockMap Create(long length, IMapStore? store = null)
    {
        var header = new MapHeader
        {
            Id = Guid.NewGuid(),
            BootId = Guid.NewGuid(),
            Flags = MapFlags.Cache,
            DataStart = 0,
            Source = new SourceIdentity("origin", length, 0, 0),
        };
        return BlockMap.Create(store ?? new NoStore(), header);
    }

    /// <summary>Keeps nothing, and notes how often it was written.</summary>
    public sealed class NoStore : IMapStore
    {
        private int _writes;

        public int Writes => Volatile.Read(ref _writes);

        public Exception? Failure { get; set; }

        public void Read(long offset, Span<byte> buffer) => buffer.Clear();

        public void Write(long offset, ReadOnlySpan<byte> data)
        {
            if (Failure is not null)
                throw Failure;
            Interlocked.Increment(ref _writes);
        }

        public void Sync()
        {
        }

        public void Allocate(long offset, long length)
        {
        }

        public (long Start, long End) FindData(long offset, long end) => (offset, end);
    }
}
