using System.Threading.Tasks.Sources;

namespace Xnbd.Storage.Threads;

/// <summary>
/// An operation and the task that stands for it. Objects are reused, so that a steady stream of operations allocates
/// nothing.
/// <para>
/// States: rented; completed, once; returned to its pool, by whoever awaits the task. The task is awaited exactly once.
/// Whoever awaits it goes on at once, on the thread that completes the operation.
/// </para>
/// </summary>
public abstract class PooledOperation : IValueTaskSource
{
    private ManualResetValueTaskSourceCore<bool> _completion;

    /// <summary>The task. It is taken before the operation is handed to anybody.</summary>
    public ValueTask Task => new(this, _completion.Version);

    /// <summary>Completes the operation. It may have been reused when this returns.</summary>
    public void Succeed() => _completion.SetResult(true);

    /// <summary>Fails the operation. It may have been reused when this returns.</summary>
    public void Fail(Exception failure) => _completion.SetException(failure);

    /// <summary>Clears what the operation refers to, and returns it to its pool.</summary>
    protected abstract void Return();

    void IValueTaskSource.GetResult(short token)
    {
        try
        {
            _completion.GetResult(token);
        }
        finally
        {
            _completion.Reset();
            Return();
        }
    }

    ValueTaskSourceStatus IValueTaskSource.GetStatus(short token) => _completion.GetStatus(token);

    void IValueTaskSource.OnCompleted(
        Action<object?> continuation, object? state, short token, ValueTaskSourceOnCompletedFlags flags)
        => _completion.OnCompleted(continuation, state, token, flags);
}
