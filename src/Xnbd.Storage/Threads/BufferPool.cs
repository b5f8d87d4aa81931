using System.Numerics;
using Xnbd.Linux;

namespace Xnbd.Storage.Threads;

/// <summary>
/// Buffers for requests and replies, in sizes that are powers of two. Some are kept for reuse, so that a steady load
/// touches no fresh pages; the others go back to the system at once. Any thread rents and returns; one lock guards the
/// spare buffers.
/// </summary>
/// <param name="maxSpareBytes">How many bytes are kept in buffers that nobody uses.</param>
public sealed class BufferPool(long maxSpareBytes) : IDisposable
{
    private const int MinLog = 12;
    private const int MaxLog = 26;

    private readonly Stack<NativeBuffer>[] _spare
        = [.. Enumerable.Range(MinLog, MaxLog - MinLog + 1).Select(_ => new Stack<NativeBuffer>())];
    private long _spareBytes;
    private bool _isDisposed;

    /// <summary>Takes a buffer of at least <paramref name="length"/> bytes, with any contents.</summary>
    public NativeBuffer Rent(int length)
    {
        int index = IndexOf(length);
        lock (_spare)
        {
            if (_spare[index].TryPop(out NativeBuffer? buffer))
            {
                _spareBytes -= buffer.Length;
                return buffer;
            }
        }

        return new NativeBuffer(1 << (index + MinLog));
    }

    /// <summary>Takes a buffer back; its owner must not touch it any more.</summary>
    public void Return(NativeBuffer buffer)
    {
        lock (_spare)
        {
            if (!_isDisposed && _spareBytes + buffer.Length <= maxSpareBytes)
            {
                _spareBytes += buffer.Length;
                _spare[IndexOf(buffer.Length)].Push(buffer);
                return;
            }
        }

        buffer.Free();
    }

    /// <summary>Frees the buffers that nobody uses. The others are freed when they come back.</summary>
    public void Dispose()
    {
        lock (_spare)
        {
            _isDisposed = true;
            foreach (Stack<NativeBuffer> stack in _spare)
            {
                while (stack.TryPop(out NativeBuffer? buffer))
                    buffer.Free();
            }
        }
    }

    private static int IndexOf(int length)
        => Math.Max(0, BitOperations.Log2(BitOperations.RoundUpToPowerOf2((uint)length)) - MinLog);
}
