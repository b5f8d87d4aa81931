namespace Xnbd.Storage.Layers;

/// <summary>How far long work on a layer has come.</summary>
/// <param name="Done">Bytes of the disk that the work has passed.</param>
/// <param name="Total">Length of the disk in bytes.</param>
public readonly record struct WorkProgress(long Done, long Total)
{
    /// <summary>
    /// How much long work reads and writes at a time, in bytes. It tells its progress after each piece.
    /// </summary>
    internal const int PieceBytes = 1 << 20;
}
