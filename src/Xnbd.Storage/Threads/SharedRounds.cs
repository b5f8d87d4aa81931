namespace Xnbd.Storage.Threads;

/// <summary>
/// Work that many ask for and that needs to be done once for all who wait, such as a commit: who asks while a round is under
/// way shares the next one, which starts after they asked, and so covers what they mean. A round that fails, fails for them.
/// </summary>
/// <param name="round">One round of the work; never two at the same time.</param>
internal sealed class SharedRounds(Func<ValueTask> round)
{
    private readonly Lock _lock = new();
    private bool _isRunning;
    private TaskCompletionSource? _next; // for those who asked during the present round

    /// <summary>Runs a round that starts from now on.</summary>
    public Task RunAsync()
    {
        var mine = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
        lock (_lock)
        {
            if (_isRunning)
                return (_next ??= mine).Task;
            _isRunning = true;
        }

        _ = RunRounds(mine);
        return mine.Task;
    }

    private async Task RunRounds(TaskCompletionSource? waiters)
    {
        while (waiters is not null)
        {
            Exception? failure = null;
            try
            {
                await round();
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
