namespace Xnbd.Storage.Images;

/// <summary>
/// Syncs of an image, each shared by all who wait for one: those who ask while a sync runs share the next one. It
/// starts after they asked, so it covers what they mean. (This is a group commit for threads that may wait, such as
/// disk threads: each of them goes on by itself, where it can do more work that waits.)
/// <para>
/// States: at most one sync runs, on the thread of one of those who asked for it. A sync that fails is final: it may
/// have lost data that the kernel no longer holds, so every later one fails, too.
/// </para>
/// <para>
/// Locks: <c>_lock</c> guards all fields. It is not held while a sync runs, and no other lock is taken under it.
/// </para>
/// </summary>
/// <param name="sync">Does one sync, and returns why it failed; null if it did not.</param>
internal sealed class ImageSync(Func<DiskException?> sync)
{
    private readonly object _lock = new();
    private bool _isRunning;
    private long _started; // how many syncs were started: the number of the last one
    private long _ended; // the number of the last sync that has ended
    private volatile DiskException? _failure;

    /// <summary>Waits for a sync that starts from now on.</summary>
    /// <exception cref="DiskException">The sync failed, or an earlier one did.</exception>
    public void Run()
    {
        long number;
        lock (_lock)
        {
            long needed = _started + 1; // one that starts from now on
            while (_isRunning && _ended < needed)
                Monitor.Wait(_lock);
            ThrowIfFailed();
            if (_ended >= needed)
                return;
            _isRunning = true;
            number = ++_started;
        }

        DiskException? failure = sync();
        lock (_lock)
        {
            _isRunning = false;
            _ended = number;
            _failure ??= failure;
            Monitor.PulseAll(_lock);
            ThrowIfFailed();
        }
    }

    /// <summary>Throws if a sync has failed.</summary>
    /// <exception cref="DiskException">A sync has failed.</exception>
    public void ThrowIfFailed()
    {
        if (_failure is { } failure)
        {
            throw new DiskException(
                DiskError.Io,
                "an earlier sync failed and may have lost data; nothing is called durable any more "
                    + $"({failure.Message})");
        }
    }
}
