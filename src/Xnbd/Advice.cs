using Xnbd.Storage;

namespace Xnbd.Programs;

/// <summary>
/// The one place where a failure of a disk becomes advice: which option or command does what the failure's
/// <see cref="Remedy"/> says.
/// </summary>
internal static class Advice
{
    /// <summary>A failure's message, followed by what to do about it.</summary>
    public static string Describe(Exception failure)
        => failure is DiskException disk && For(disk) is { } advice ? $"{failure.Message}; {advice}" : failure.Message;

    private static string? For(DiskException failure) => failure.Remedy switch
    {
        Remedy.OpenReadOnly => "to serve it read-only: xnbd-server --readonly",
        Remedy.NameLayerDirectory => "say with --cow-dir in which directory its layer is to go",
        Remedy.BindToChangedBase => "xnbd-server --force binds the layer to it as it is now",
        Remedy.CompleteCommit => $"complete it with: xnbd-layer commit {failure.RemedyPath}",
        Remedy.CompleteDiscard => $"complete that with: xnbd-layer discard {failure.RemedyPath}",
        Remedy.OverwriteImage => "--clear-bitmap overwrites them all",
        Remedy.ClearMap => "--clear-bitmap gives up everything",
        Remedy.ImportOrClearMap => "--import-bitmap takes it over, --clear-bitmap starts afresh",
        Remedy.RebindMap => "if that is the same disk: --rebind",
        Remedy.CacheAll => "cache all first: xnbd-bgctl --cache-all",
        Remedy.BeginKeeping => "when nobody writes to the remote any more: xnbd-bgctl --begin",
        _ => null,
    };
}
