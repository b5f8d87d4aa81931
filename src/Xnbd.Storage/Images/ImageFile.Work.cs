using Xnbd.Linux;
using Xnbd.Storage.Threads;

namespace Xnbd.Storage.Images;

/// <content>The async operations: each is one piece of work for the disk threads.</content>
public sealed partial class ImageFile
{
    /// <summary>
    /// The most that one prefetch reads, in bytes, so that it does not push other data out of memory.
    /// </summary>
    private const long MaxPrefetchBytes = 64 << 20;

    private enum Operation
    {
        Read,
        Write,
        Zero,
        Trim,
        Flush,
        Prefetch,
        Extents,
    }

    /// <inheritdoc/>
    public override bool IsFar(long offset, long length, bool isWrite) => false;

    /// <inheritdoc/>
    public override ValueTask ReadAsync(long offset, Memory<byte> buffer, CancellationToken cancel = default)
        => Work.Rent(this, Operation.Read, offset, buffer.Length).Start(buffer: buffer);

    /// <inheritdoc/>
    public override bool HasIdleReader => Readers.IsMostlyIdle;

    /// <inheritdoc/>
    public override ValueTask WriteAsync(
        long offset, ReadOnlyMemory<byte> data, bool durable, CancellationToken cancel = default)
        => Work.Rent(this, Operation.Write, offset, data.Length, durable).Start(data: data);

    /// <inheritdoc/>
    public override ValueTask ZeroAsync(
        long offset, long length, ZeroMode mode, bool durable, CancellationToken cancel = default)
        => Work.Rent(this, Operation.Zero, offset, length, durable).Start(mode: mode);

    /// <inheritdoc/>
    public override ValueTask TrimAsync(long offset, long length, bool durable, CancellationToken cancel = default)
        => Work.Rent(this, Operation.Trim, offset, length, durable).Start();

    /// <inheritdoc/>
    public override ValueTask FlushAsync() => Work.Rent(this, Operation.Flush, 0, Length).Start();

    /// <inheritdoc/>
    public override ValueTask PrefetchAsync(long offset, long length, CancellationToken cancel = default)
        => Work.Rent(this, Operation.Prefetch, offset, Math.Min(length, MaxPrefetchBytes)).Start();

    /// <inheritdoc/>
    public override ValueTask GetExtentsAsync(long offset, long length, ExtentList extents)
        => Work.Rent(this, Operation.Extents, offset, length).Start(extents: extents);

    /// <summary>The threads that wait for reads.</summary>
    internal DiskThreads Readers { get; } = DiskThreads.NewReaders();

    /// <summary>One operation, for a disk thread.</summary>
    private sealed class Work : PooledOperation, IDiskWork
    {
        /// <summary>
        /// How many objects are kept for reuse: about as many as the disk threads and a few sessions have under way.
        /// </summary>
        private const int MaxSpare = 256;

        private static readonly Pool<Work> s_pool = new(() => new Work(), MaxSpare);

        private ImageFile? _image;
        private Operation _operation;
        private long _offset;
        private long _length;
        private bool _durable;
        private Memory<byte> _buffer;
        private ReadOnlyMemory<byte> _data;
        private ZeroMode _mode;
        private ExtentList? _extents;

        public static Work Rent(ImageFile image, Operation operation, long offset, long length, bool durable = false)
        {
            Work work = s_pool.Rent();
            work._image = image;
            work._operation = operation;
            work._offset = offset;
            work._length = length;
            work._durable = durable;
            return work;
        }

        public ValueTask Start(
            Memory<byte> buffer = default,
            ReadOnlyMemory<byte> data = default,
            ZeroMode mode = default,
            ExtentList? extents = null)
        {
            _buffer = buffer;
            _data = data;
            _mode = mode;
            _extents = extents;
            ValueTask task = Task;
            Threads.Enqueue(this);
            return task;
        }

        private DiskThreads Threads => _operation switch
        {
            Operation.Read or Operation.Prefetch => _image!.Readers,
            Operation.Extents => _image!._lookers,
            _ => _image!._writers,
        };

        public void Run()
        {
            try
            {
                ImageFile image = _image!;
                switch (_operation)
                {
                    case Operation.Read: image.Read(_offset, _buffer.Span); break;
                    case Operation.Write: image.Write(_offset, _data.Span, _durable); break;
                    case Operation.Zero:
                        while (!image.ZeroPart(ref _offset, ref _length, _mode, _durable))
                        {
                            if (!Threads.HasWaiting)
                                continue;
                            Threads.Enqueue(this); // zeroes may take minutes: others have their turn in between
                            return;
                        }

                        break;
                    case Operation.Trim: image.Trim(_offset, _length, _durable); break;
                    case Operation.Flush: image.Flush(); break;
                    case Operation.Prefetch:
                        LinuxFile.AdviseWillNeed(image._file, image._start + _offset, _length);
                        break;
                    case Operation.Extents: image._finder.GetExtents(_offset, _length, _extents!); break;
                }
            }
            catch (Exception failure)
            {
                Fail(failure);
                return;
            }

            Succeed();
        }

        protected override void Return()
        {
            _image = null;
            _buffer = default;
            _data = default;
            _extents = null;
            s_pool.Return(this);
        }
    }
}
