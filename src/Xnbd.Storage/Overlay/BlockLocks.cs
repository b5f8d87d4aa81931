using Xnbd.Storage.Maps;

namespace Xnbd.Storage.Overlay;

/// <summary>
/// Exclusive use of ranges of blocks, first come, first served: a range is entered when no range that overlaps it and
/// came earlier is still inside or waiting. Few ranges are in use at a time (those of writes to absent blocks, of
/// zeroes, and of fetched blocks that are stored), so they are kept in a list. No thread waits: whoever
/// cannot enter gets a task.
/// <para>
/// <c>_lock</c> guards the list; nothing is called while it is held. Whoever holds a range may take other locks, but
/// must not wait for another range of the same disk.
/// </para>
/// </summary>
internal sealed class BlockLocks
{
    /// <summary>
    /// How many blocks long work holds at a time: 64 MiB. A writer waits for these, not for all of the work.
    /// </summary>
    public const int MaxHeldBlocks = 16 * 1024;

    private readonly Lock _lock = new();
    private readonly List<(BlockRange Range, TaskCompletionSource? Waiter)> _entries = []; // in order of arrival

    /// <summary>Enters a range, if that is possible at once.</summary>
    public bool TryEnter(BlockRange range)
    {
        lock (_lock)
        {
            if (IsTaken(range, _entries.Count))
                return false;
            _entries.Add((range, null));
            return true;
        }
    }

    /// <summary>Enters a range; the task completes when it has been entered.</summary>
    /// <param name="range">The range.</param>
    /// <param name="cancel">Ends the waiting: the range is not entered then.</param>
    public ValueTask EnterAsync(BlockRange range, CancellationToken cancel = default)
    {
        TaskCompletionSource waiter;
        lock (_lock)
        {
            if (!IsTaken(range, _entries.Count))
            {
                _entries.Add((range, null));
                return ValueTask.CompletedTask;
            }

            // Its continuation must not run inside the Leave of another range.
            waiter = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
            _entries.Add((range, waiter));
        }

        return cancel.CanBeCanceled ? Wait(range, waiter, cancel) : new ValueTask(waiter.Task);
    }

    /// <summary>Waits for a range, and gives its place up if it is told to.</summary>
    private async ValueTask Wait(BlockRange range, TaskCompletionSource waiter, CancellationToken cancel)
    {
        try
        {
            await waiter.Task.WaitAsync(cancel);
        }
        catch (OperationCanceledException)
        {
            lock (_lock)
            {
                int waiting = _entries.FindIndex(entry => entry.Waiter == waiter);
                Remove(waiting >= 0 ? waiting : IndexInside(range)); // meanwhile it may have been its turn
            }

            throw;
        }
    }

    /// <summary>Leaves a range that was entered.</summary>
    public void Leave(BlockRange range)
    {
        lock (_lock)
            Remove(IndexInside(range));
    }

    /// <summary>
    /// Works on a range's blocks of some states while they are held: nobody stores or writes there meanwhile.
    /// </summary>
    /// <param name="map">The states of the blocks.</param>
    /// <param name="range">The blocks.</param>
    /// <param name="isMeant">Tells the states that are worked on.</param>
    /// <param name="work">What is done with blocks of one state.</param>
    /// <param name="skipsHeld">Whether blocks that somebody else holds are left out; else they are waited for.</param>
    /// <param name="cancel">Ends it.</param>
    public async Task ForEachAsync(
        BlockMap map,
        BlockRange range,
        Func<BlockState, bool> isMeant,
        Func<BlockRange, ValueTask> work,
        bool skipsHeld = false,
        CancellationToken cancel = default)
    {
        for (BlockRange left = range; left.Count > 0;)
        {
            cancel.ThrowIfCancellationRequested();
            BlockRange run = map.Run(left with { Count = Math.Min(left.Count, MaxHeldBlocks) }, out BlockState state);
            left = left.After(run);
            if (!isMeant(state))
                continue;
            if (!TryEnter(run))
            {
                if (skipsHeld)
                    continue;
                await EnterAsync(run, cancel);
            }

            try
            {
                for (BlockRange held = run; held.Count > 0;)
                {
                    BlockRange part = map.Run(held, out BlockState now);
                    held = held.After(part);
                    if (isMeant(now))
                        await work(part);
                }
            }
            finally
            {
                Leave(run);
            }
        }
    }

    /// <summary>The place of a range that has been entered. The lock is held.</summary>
    private int IndexInside(BlockRange range)
    {
        int index = 0;
        while (_entries[index].Range != range || _entries[index].Waiter is not null)
            index++;
        return index;
    }

    /// <summary>Removes an entry, and lets those in that have waited for it. The lock is held.</summary>
    private void Remove(int index)
    {
        _entries.RemoveAt(index);
        for (int i = index; i < _entries.Count; i++)
        {
            (BlockRange waiting, TaskCompletionSource? waiter) = _entries[i];
            if (waiter is null || IsTaken(waiting, i))
                continue;
            _entries[i] = (waiting, null);
            waiter.SetResult();
        }
    }

    /// <summary>Whether one of the first entries overlaps a range.</summary>
    private bool IsTaken(BlockRange range, int count)
    {
        for (int i = 0; i < count; i++)
        {
            if (_entries[i].Range.Overlaps(range))
                return true;
        }

        return false;
    }
}
