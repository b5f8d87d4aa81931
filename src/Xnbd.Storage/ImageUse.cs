namespace Xnbd.Storage;

/// <summary>What an image is opened for.</summary>
public enum ImageUse
{
    /// <summary>Others may use it as well, also write it, but nobody who needs it alone, or as a base.</summary>
    Shared,

    /// <summary>As a base, under layers: nobody may write it meanwhile.</summary>
    Base,

    /// <summary>Nobody else may use it.</summary>
    Alone,
}
