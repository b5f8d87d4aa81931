namespace Xnbd.Storage.Threads;

/// <summary>
/// Objects that are kept for reuse, so that a steady load allocates none. Any thread rents and returns. Whoever returns
/// an object has cleared what it referred to, and does not touch it any more.
/// </summary>
/// <typeparam name="T">What is kept.</typeparam>
/// <param name="create">Makes an object when none is kept.</param>
/// <param name="maxKept">How many objects are kept at most; the garbage collector takes the rest.</param>
public sealed class Pool<T>(Func<T> create, int maxKept)
    where T : class
{
    private readonly Stack<T> _kept = new();

    /// <summary>Takes an object that is kept, or creates one.</summary>
    public T Rent()
    {
        lock (_kept)
        {
            if (_kept.TryPop(out T? item))
                return item;
        }

        return create();
    }

    /// <summary>Takes an object back.</summary>
    public void Return(T item)
    {
        lock (_kept)
        {
            if (_kept.Count < maxKept)
                _kept.Push(item);
        }
    }
}
