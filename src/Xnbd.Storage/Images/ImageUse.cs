namespace Xnbd.Storage.Images;

/// <summary>What an image is opened for.</summary>
public enum ImageUse
{
    /// <summary>
    /// Others may use it as well, also write it, but nobody who needs it alone, who is to be its only writer, or as a
    /// base.
    /// </summary>
    Shared,

    /// <summary>
    /// Others may read it, and nobody else may write it. For who only reads, the same as <see cref="Shared"/>.
    /// </summary>
    OnlyWriter,

    /// <summary>As a base, under layers: nobody may write it meanwhile.</summary>
    Base,

    /// <summary>Nobody else may use it.</summary>
    Alone,
}
