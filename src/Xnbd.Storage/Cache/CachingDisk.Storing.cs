using System.Diagnostics;
using Xnbd.Storage.Maps;
using Xnbd.Storage.Threads;

namespace Xnbd.Storage.Cache;

/// <content>
/// Storing what was fetched. It is the work of one thread at a time: writes of one file exclude each other in the kernel, where
/// others would spin for their turn instead of receiving. The thread that has received stores, after the replies have gone out
/// (the data are in its processor's cache), unless another one does; what is more than a little goes to a disk thread. And
/// all of it does as long as the file is slow: so that no reply waits for it.
/// <para>
/// What was stored is made durable in steps. Otherwise a client's flush would have to write all that was fetched
/// since the last one, which on a fast line takes seconds. Those who fetch without reading wait while two steps are
/// not durable; readers never do.
/// </para>
/// </content>
internal sealed partial class CachingDisk : IDiskWork
{
    /// <summary>Data are stored, and zeroes become holes of the file, in units of this size, in bytes: who writes to the file waits for one of them.</summary>
    private const int StoreBytes = 64 * 1024;

    /// <summary>A file that takes longer than this to take <see cref="CachingDisk.MaxFetchBytes"/> is slow: memory takes half a millisecond.</summary>
    private static readonly TimeSpan s_slowStore = TimeSpan.FromMilliseconds(10);

    /// <summary>How long the end of the program waits for what was fetched last to be stored.</summary>
    private static readonly TimeSpan s_longestStoring = TimeSpan.FromSeconds(1);

    /// <summary>How long a file that was slow is taken for slow, in milliseconds.</summary>
    private const int SlowTime = 1000;

    private readonly Action<IDiskWork>? _runStoring; // given by tests only
    private readonly Action _storeHere;
    private readonly Action _storeLast; // puts that off once more, when all of the batch is known

    /// <summary>
    /// So much is stored between two steps, in bytes: a client's flush waits for twice as much, tens of milliseconds.
    /// </summary>
    private const long StepBytes = 16 << 20;

    private long _stepBytes; // stored since the last step began
    private Task _step = Task.CompletedTask; // the last step

    private long _slowUntil; // in milliseconds of the system's clock; only an estimate
    private bool _isStoring;
    private bool _isClosed;

    /// <summary>Waits until what has arrived by now is stored, or could not be; a short time, since it may wait for writers.</summary>
    internal async Task StoredAsync()
    {
        Task[] storing;
        lock (_fetching)
            storing = [.. _fetches.Where(fetch => fetch.Arrived.Task.IsCompletedSuccessfully).Select(fetch => fetch.Stored.Task)];
        try
        {
            await Task.WhenAll(storing).WaitAsync(s_longestStoring);
        }
        catch (Exception failure) when (failure is DiskException or TimeoutException)
        {
            // What is not kept is fetched again some day.
        }
    }

    /// <summary>Ends the storing, after what is being stored; what was not is fetched again some day. The origin is closed already.</summary>
    internal void StopStoring()
    {
        Fetch[] left;
        lock (_fetching)
        {
            _isClosed = true;
            while (_isStoring || !_step.IsCompleted)
                Monitor.Wait(_fetching);
            left = [.. _toStore];
            _toStore.Clear();
        }

        foreach (Fetch fetch in left)
            End(fetch, Closed());
        lock (_fetching)
            LetWaitingIn();
        SendFetches(); // to fail
        _buffers.Dispose();
    }

    /// <summary>Stores what has arrived, until nothing is left; who comes here has set <c>_isStoring</c>.</summary>
    void IDiskWork.Run() => StoreArrived(long.MaxValue);

    /// <summary>The same, up to so many bytes; the rest is for a disk thread.</summary>
    private void StoreArrived(long most)
    {
        var stored = new List<(Fetch Fetch, DiskException? Failure)>();
        long bytes = 0, start = Stopwatch.GetTimestamp();
        while (true)
        {
            Fetch? fetch = null;
            lock (_fetching)
            {
                bool isLeft = !_isClosed && _toStore.Count > 0;
                if (isLeft && most <= 0 && bytes == 0)
                {
                    DiskThreads.Writers.Enqueue(this);
                    return;
                }

                if (isLeft && bytes < MaxFetchBytes)
                {
                    fetch = _toStore.Dequeue();
                }
                else if (!isLeft && bytes == 0)
                {
                    _isStoring = false;
                    Monitor.PulseAll(_fetching);
                    return;
                }
            }

            if (fetch is null)
            {
                // A round has ended: one write of the map for all of it.
                EndStored(stored);
                stored.Clear();
                bytes = 0;
                if (Stopwatch.GetElapsedTime(start) > s_slowStore)
                    Volatile.Write(ref _slowUntil, Environment.TickCount64 + SlowTime);
                start = Stopwatch.GetTimestamp();
                continue;
            }

            bytes += BytesOf(fetch);
            most -= BytesOf(fetch);
            ValueTask storing = Store(fetch);
            if (storing.IsCompleted)
                stored.Add((fetch, FailureOf(storing)));
            else
                _ = EndLater(fetch, storing);
        }
    }

    /// <summary>
    /// Has stored what has arrived, after all else that this thread's batch puts off: first of all replies. Without a batch nobody
    /// knows who waits for this thread, so it is none that stores.
    /// </summary>
    private void StoreSoon()
    {
        if (!Batch.TryPutOff(_storeLast))
            StartStoring(isHere: false);
    }

    private void StartStoring(bool isHere)
    {
        lock (_fetching)
        {
            if (_isStoring || _isClosed || _toStore.Count == 0)
                return;
            _isStoring = true;
        }

        if (_runStoring is not null)
            _runStoring(this);
        else if (isHere && Environment.TickCount64 >= Volatile.Read(ref _slowUntil))
            StoreArrived(MaxFetchBytes);
        else
            DiskThreads.Writers.Enqueue(this);
    }

    private async Task EndLater(Fetch fetch, ValueTask storing)
    {
        DiskException? failure = null;
        try
        {
            await storing;
        }
        catch (Exception caught)
        {
            failure = AsDiskException(caught);
        }

        EndStored([(fetch, failure)]);
    }

    private void EndStored(List<(Fetch Fetch, DiskException? Failure)> stored)
    {
        DiskException? behind = null;
        try
        {
            Map.WriteBehind();
        }
        catch (Exception caught)
        {
            behind = AsDiskException(caught);
        }

        CountToStep(stored.Sum(s => BytesOf(s.Fetch)));
        foreach ((Fetch fetch, DiskException? failure) in stored)
        {
            if ((failure ?? behind) is { } told)
                _cannotStore(told);
            End(fetch, failure ?? behind);
        }

        lock (_fetching)
            LetWaitingIn();
        SendFetches();
    }

    /// <summary>Begins a step, when enough has been stored and none is under way.</summary>
    private void CountToStep(long bytes)
    {
        lock (_fetching)
        {
            _stepBytes += bytes;
            BeginStep();
        }
    }

    /// <summary><c>_fetching</c> is held.</summary>
    private void BeginStep()
    {
        if (_stepBytes < StepBytes || _isClosed || !_step.IsCompleted)
            return;
        _stepBytes = 0;
        var ended = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
        _step = ended.Task;
        _ = Task.Run(async () =>
        {
            try
            {
                await FlushAll();
            }
            catch (Exception)
            {
                // A sync that has failed is remembered: clients' flushes fail, too. Another failure is theirs to find.
            }

            lock (_fetching)
            {
                ended.SetResult();
                BeginStep();
                Monitor.PulseAll(_fetching);
            }
        });
    }

    /// <returns>The step that those who fetch without reading wait for; null when less than another step was stored
    /// meanwhile.</returns>
    private Task? StepToWaitFor()
    {
        lock (_fetching)
            return _stepBytes >= StepBytes && !_step.IsCompleted ? _step : null;
    }

    private static DiskException? FailureOf(ValueTask storing)
    {
        try
        {
            storing.GetAwaiter().GetResult();
            return null;
        }
        catch (Exception caught)
        {
            return AsDiskException(caught);
        }
    }

    private static DiskException Closed() => new(DiskError.Io, "the cache is closed");

    private static DiskException AsDiskException(Exception failure)
        => failure as DiskException ?? new DiskException(DiskError.Io, failure.Message);

    /// <summary>Writes to the file what has arrived, where nobody has written meanwhile, unless it is stale.</summary>
    private async ValueTask Store(Fetch fetch)
    {
        for (BlockRange left = fetch.Range; left.Count > 0 && !fetch.IsStale;)
        {
            BlockRange run = Map.Run(left, out BlockState state);
            left = new BlockRange(run.End, left.End - run.End);
            if (state != BlockState.Absent)
                continue;
            if (!Changing.TryEnter(run))
            {
                // A writer holds it, who may wait for a fetch that waits for room: so what waits here has its own.
                if (!MayBeHeldUp(fetch))
                {
                    fetch.IsSkipped = true;
                    continue;
                }

                SendFetches();
                await Changing.EnterAsync(run);
            }

            try
            {
                for (BlockRange inside = run; inside.Count > 0;)
                {
                    BlockRange part = Map.Run(inside, out BlockState now);
                    if (now == BlockState.Absent && !fetch.IsStale) // whoever makes it stale looks at these blocks when they have been left
                    {
                        await StoreData(part.Offset, fetch.Buffer!.Memory.Slice((int)(part.Offset - fetch.Range.Offset), (int)part.LengthOn(Length)));
                        Map.SetFetched(part);
                    }

                    inside = new BlockRange(part.End, inside.End - part.End);
                }
            }
            finally
            {
                Changing.Leave(run);
            }
        }
    }

    /// <summary>Lets a fetch wait for writers, and others in for it, unless as much waits already as may be fetched at all.</summary>
    private bool MayBeHeldUp(Fetch fetch)
    {
        lock (_fetching)
        {
            if (!fetch.IsHeldUp && _bytesHeldUp + BytesOf(fetch) > _mostBytes)
                return false;
            if (!fetch.IsHeldUp)
                _bytesHeldUp += BytesOf(fetch);
            fetch.IsHeldUp = true;
            Uncount(fetch);
            LetWaitingIn();
            return true;
        }
    }

    /// <summary>Its bytes are not to be waited for any more; <c>_fetching</c> is held.</summary>
    private void Uncount(Fetch fetch)
    {
        if (fetch.IsCounted)
            _bytesToStore -= BytesOf(fetch);
        fetch.IsCounted = false;
    }

    /// <summary>Makes a part of the file a hole.</summary>
    private ValueTask MakeHole(long offset, long length) => Local.ZeroAsync(offset, length, ZeroMode.MayPunch, durable: false);

    /// <summary>Data as data, and long runs of zeroes as holes: a sparse origin stays sparse.</summary>
    private async ValueTask StoreData(long offset, ReadOnlyMemory<byte> data)
    {
        for (int length; data.Length > 0; offset += length, data = data[length..])
        {
            length = Math.Min(StoreBytes, data.Length);
            if (length == StoreBytes && !data.Span[..length].ContainsAnyExcept((byte)0))
            {
                await MakeHole(offset, length);
            }
            else if (!Local.TryWrite(offset, data.Span[..length]))
            {
                await Local.WriteAsync(offset, data[..length], durable: false);
            }
        }
    }
}
