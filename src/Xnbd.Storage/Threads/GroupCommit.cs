namespace Xnbd.Storage.Threads;

/// <summary>
/// A commit that is done once for all who wait for one. Whoever asks while a commit runs shares the next one: it starts
/// after they asked, so it covers what they mean. A commit that fails, fails for all who share it.
/// <para>
/// States: idle; a commit runs; a commit runs and others wait for the next one. <c>_lock</c> guards these; it is not
/// held while a commit runs. Waiters go on through the thread pool, never on the thread that commits.
/// </para>
/// </summary>
/// <param name="commit">One commit; two never run at the same time.</param>
internal sealed class GroupCommit(Func<ValueTask> commit)
{
    private readonly Lock _lock = new();
    private bool _isRunning;
    private TaskCompletionSource? _next; // completes for those who asked during the present commit

    /// <summary>Waits for a commit that starts from now on.</summary>
    public Task RunAsync()
    {
        var mine = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
        lock (_lock)
        {
            if (_isRunning)
                return (_next ??= mine).Task;
            _isRunning = true;
        }

        _ = Run(mine);
        return mine.Task;
    }

    private async Task Run(TaskCompletionSource? waiters)
    {
        while (waiters is not null)
        {
            Exception? failure = null;
            try
            {
                await commit();
            }
            catch (Exception caught)
            {
                failure = caught;
            }

            TaskCompletionSource? next;
            lock (_lock)
            {
                next = _next;
                _next = null;
                _isRunning = next is not null;
            }

            if (failure is null)
                waiters.SetResult();
            else
                waiters.SetException(failure);
            waiters = next;
        }
    }
}
