namespace Xnbd.Storage.Images;

/// <summary>What an image is opened for.</summary>
public enum ImageUse
{
    /// <summary>
    /// Others may use it as well, and may also write it. Excluded are programs that need it alone, as its only writer,
    /// or as a base.
    /// </summary>
    Shared,

    /// <summary>
    /// Others may read it, and nobody else may write it. For a program that only reads it, this is the same as
    /// <see cref="Shared"/>.
    /// </summary>
    OnlyWriter,

    /// <summary>It is a base, under layers: nobody may write it meanwhile.</summary>
    Base,

    /// <summary>Nobody else may use it.</summary>
    Alone,
}
