using System.Runtime.InteropServices;

namespace Xnbd.Bench.Moves;

/// <summary>
/// The disk that moves, and what a client must read of it. Every other piece of 8 MiB is data, and the rest are holes.
/// The content of a block follows from its index and its version, so the model is one number for each block.
/// <para>
/// One thread at a time uses it: the client, and after its end the one that compares.
/// </para>
/// </summary>
internal sealed class MovingDisk
{
    /// <summary>Length in bytes.</summary>
    public const long Length = 2L << 30;

    public const int BlockBytes = 4096;

    public const int BlockCount = (int)(Length / BlockBytes);

    /// <summary>Blocks of a piece of data, or of a hole.</summary>
    public const int PieceBlocks = (8 << 20) / BlockBytes;

    /// <summary>Bytes that a move cannot avoid to send.</summary>
    public const long AllocatedBytes = Length / 2;

    private readonly uint[] _versions = new uint[BlockCount]; // how often a block was written
    private readonly HashSet<int> _unknown = []; // blocks of writes that were lost: they may be old or new
    private readonly byte[] _expected = new byte[BlockBytes];

    /// <summary>Whether a block is data before the first write.</summary>
    public static bool IsData(int blockIndex) => blockIndex / PieceBlocks % 2 == 0;

    /// <summary>Makes the image, as it is before the first write.</summary>
    public static void Create(string path)
    {
        using FileStream file = File.Create(path);
        file.SetLength(Length);
        byte[] piece = new byte[PieceBlocks * BlockBytes];
        for (int first = 0; first < BlockCount; first += 2 * PieceBlocks)
        {
            for (int i = 0; i < PieceBlocks; i++)
                Fill(piece.AsSpan(i * BlockBytes, BlockBytes), first + i, 0);
            RandomAccess.Write(file.SafeFileHandle, piece, (long)first * BlockBytes);
        }
    }

    /// <summary>Makes an image of nothing but a hole.</summary>
    /// <returns>Its path.</returns>
    public static string CreateEmpty(string path)
    {
        using FileStream file = File.Create(path);
        file.SetLength(Length);
        return path;
    }

    /// <summary>The data of the next write of some blocks.</summary>
    public byte[] Next(int blockIndex, int blockCount)
    {
        byte[] data = new byte[blockCount * BlockBytes];
        for (int i = 0; i < blockCount; i++)
            Fill(data.AsSpan(i * BlockBytes, BlockBytes), blockIndex + i, _versions[blockIndex + i] + 1);
        return data;
    }

    /// <summary>The write was acknowledged.</summary>
    public void Wrote(int blockIndex, int blockCount)
    {
        for (int i = blockIndex; i < blockIndex + blockCount; i++)
        {
            _versions[i]++;
            _unknown.Remove(i);
        }
    }

    /// <summary>The write got no reply, or an error.</summary>
    public void LostWrite(int blockIndex, int blockCount)
        => _unknown.UnionWith(Enumerable.Range(blockIndex, blockCount));

    /// <summary>How many of some blocks are not as they must be.</summary>
    public int Differences(int blockIndex, ReadOnlySpan<byte> data)
    {
        int count = 0;
        for (int i = 0; i * BlockBytes < data.Length; i++)
        {
            Fill(_expected, blockIndex + i, _versions[blockIndex + i]);
            if (!data.Slice(i * BlockBytes, BlockBytes).SequenceEqual(_expected) && !_unknown.Contains(blockIndex + i))
                count++;
        }

        return count;
    }

    private static void Fill(Span<byte> block, int blockIndex, uint version)
    {
        if (version == 0 && !IsData(blockIndex))
        {
            block.Clear();
            return;
        }

        ulong state = ((ulong)version << 32 | (uint)blockIndex) * 0xd1342543de82ef95;
        foreach (ref ulong word in MemoryMarshal.Cast<byte, ulong>(block))
        {
            state = (state * 0x5851f42d4c957f2d) + 0x14057b7ef767814f; // a linear congruential generator
            word = state ^ (state >> 29);
        }
    }
}
