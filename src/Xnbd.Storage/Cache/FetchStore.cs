using Xnbd.Storage.Maps;
using Xnbd.Storage.Overlay;
using Xnbd.Storage.Threads;

namespace Xnbd.Storage.Cache;

/// <summary>
/// Stores what has arrived: data into the file, then states into the map.
/// <para>
/// One thread stores at a time, since writes to one file exclude each other in the kernel. The thread that has received
/// the data stores them after its replies have gone out, while they are in its processor's cache. What is more than
/// <see cref="Fetch.MaxBytes"/> goes to a disk thread; so does everything while the file is slow, so that no reply
/// waits for it.
/// </para>
/// <para>
/// Blocks are written while they are held, and only where they are absent: a fetch never overwrites what was written
/// since it started. If a writer holds a block, the fetch waits and is held up. Such fetches have their own room, for
/// the writer may wait for a fetch that waits for room. When that room is full, the fetch skips those blocks.
/// </para>
/// <para>
/// What was stored is made durable in steps, behind those who fetch. Otherwise a client's flush would have to sync all
/// that was fetched since the last one. Copies survive the death of the process as soon as the round has written the
/// map, and the death of the machine after a step or a flush. What is lost is fetched again.
/// </para>
/// Locks: <c>_lock</c> guards the queue, the steps and the count of held-up bytes. Inside it no other lock is taken and
/// no code of another part runs. Blocks are held in <c>BlockLocks</c>, never while <c>_lock</c> is held.
/// </summary>
internal sealed class FetchStore : IDiskWork
{
    /// <summary>The file is written in units of this size, in bytes: a writer waits for one of them.</summary>
    public const int UnitBytes = 64 * 1024;

    /// <summary>
    /// How much is stored between two steps, in bytes: a flush waits for twice as much, tens of milliseconds.
    /// </summary>
    public const long StepBytes = 16 << 20;

    /// <summary>A file that takes longer for a round is slow: memory takes half a millisecond.</summary>
    private static readonly TimeSpan s_slowRound = TimeSpan.FromMilliseconds(10);

    /// <summary>For how long a file that was slow is taken for slow.</summary>
    private static readonly TimeSpan s_slowTime = TimeSpan.FromSeconds(1);

    private readonly Disk _local;
    private readonly BlockMap _map;
    private readonly BlockLocks _changing;
    private readonly long _maxHeldUpBytes;
    private readonly Action _storeHere;

    private readonly object _lock = new(); // pulsed when the storing or a step has ended
    private readonly Queue<Fetch> _toStore = new();
    private bool _isStoring;
    private bool _isClosed;
    private long _bytesHeldUp; // of fetches that wait for writers
    private long _stepBytes; // stored since the last step began
    private Task _step = Task.CompletedTask; // the last step
    private long _slowUntil = long.MinValue; // a time stamp; only an estimate

    /// <summary>Makes a store without work.</summary>
    /// <param name="local">The file; it is the caller's.</param>
    /// <param name="map">Which blocks the file holds.</param>
    /// <param name="changing">Blocks whose state is being changed.</param>
    /// <param name="maxHeldUpBytes">How many bytes wait for writers at most.</param>
    public FetchStore(Disk local, BlockMap map, BlockLocks changing, long maxHeldUpBytes)
    {
        _local = local;
        _map = map;
        _changing = changing;
        _maxHeldUpBytes = maxHeldUpBytes;
        _storeHere = () => Begin(isHere: true);
    }

    /// <summary>Called when a fetch waits for writers: from now on its bytes take the room of the store.</summary>
    public required Action<Fetch> HeldUp { get; init; }

    /// <summary>
    /// Called with the fetches that are over, each with the reason if it was not stored. No lock is held.
    /// </summary>
    public required Action<IReadOnlyList<(Fetch Fetch, DiskException? Failure)>> Ended { get; init; }

    /// <summary>Called with the reason when something could not be stored.</summary>
    public required Action<DiskException> CannotStore { get; init; }

    /// <summary>Makes durable what is in the file and in the map.</summary>
    public required Func<ValueTask> Flush { get; init; }

    /// <summary>Runs work on a thread that may wait for the file.</summary>
    public Action<IDiskWork> RunLater { get; init; } = DiskThreads.NewWriters().Enqueue;

    /// <summary>Tells whether the file is slow.</summary>
    public TimeProvider Time { get; init; } = TimeProvider.System;

    private long BytesOf(Fetch fetch) => fetch.Range.LengthOn(_map.Header.Source.Length);

    /// <summary>
    /// Takes a fetch that has arrived. It is stored at the end of this thread's batch; without a batch nobody knows who
    /// waits for this thread, so another one stores.
    /// </summary>
    public void Add(Fetch fetch)
    {
        bool isClosed;
        lock (_lock)
        {
            isClosed = _isClosed;
            if (!isClosed)
                _toStore.Enqueue(fetch);
        }

        if (isClosed)
            Ended([(fetch, Closed())]);
        else if (!DeferredWork.TryDefer(WorkPhase.Store, _storeHere))
            Begin(isHere: false);
    }

    /// <summary>Begins to store, unless a thread stores already.</summary>
    /// <param name="isHere">Whether this thread stores, unless the file is slow.</param>
    private void Begin(bool isHere)
    {
        lock (_lock)
        {
            if (_isStoring || _isClosed || _toStore.Count == 0)
                return;
            _isStoring = true;
        }

        if (isHere && Time.GetTimestamp() >= Volatile.Read(ref _slowUntil))
            StoreArrived(Fetch.MaxBytes);
        else
            RunLater(this);
    }

    /// <inheritdoc/>
    void IDiskWork.Run() => StoreArrived(long.MaxValue);

    /// <summary>
    /// Stores round by round, until nothing is left; the caller has set <c>_isStoring</c>. A round is up to
    /// <see cref="Fetch.MaxBytes"/>, and ends with one write of the map for all of it.
    /// </summary>
    /// <param name="maxBytes">About how much this thread stores; a disk thread stores the rest.</param>
    private void StoreArrived(long maxBytes)
    {
        long bytes = 0;
        while (IsAnyLeft())
        {
            if (bytes >= maxBytes)
            {
                RunLater(this);
                return;
            }

            bytes += StoreRound();
        }
    }

    /// <returns>False when nothing is left: then this thread does not store any more.</returns>
    private bool IsAnyLeft()
    {
        lock (_lock)
        {
            if (!_isClosed && _toStore.Count > 0)
                return true;
            _isStoring = false;
            Monitor.PulseAll(_lock);
            return false;
        }
    }

    /// <returns>How many bytes were stored, or handed to those who wait for writers.</returns>
    private long StoreRound()
    {
        var stored = new List<(Fetch Fetch, DiskException? Failure)>();
        long start = Time.GetTimestamp(), bytes = 0;
        while (bytes < Fetch.MaxBytes)
        {
            Fetch? fetch;
            lock (_lock)
            {
                if (_isClosed || !_toStore.TryDequeue(out fetch))
                    break;
            }

            bytes += BytesOf(fetch);
            ValueTask<DiskException?> storing = Store(fetch);
            if (storing.IsCompleted)
                stored.Add((fetch, storing.Result));
            else
                _ = EndLater(fetch, storing);
        }

        EndStored(stored);
        if (Time.GetElapsedTime(start) > s_slowRound)
            Volatile.Write(
                ref _slowUntil, Time.GetTimestamp() + (long)(s_slowTime.TotalSeconds * Time.TimestampFrequency));
        return bytes;
    }

    /// <summary>Writes to the file what has arrived, where nobody has written meanwhile, unless it is stale.</summary>
    /// <returns>Why it could not be stored; null if nothing failed.</returns>
    private async ValueTask<DiskException?> Store(Fetch fetch)
    {
        try
        {
            await StoreAbsent(fetch);
            return null;
        }
        catch (Exception caught)
        {
            return AsDiskException(caught);
        }
    }

    private async ValueTask StoreAbsent(Fetch fetch)
    {
        for (BlockRange left = fetch.Range; left.Count > 0 && !fetch.IsStale;)
        {
            BlockRange run = _map.Run(left, out BlockState state);
            left = left.After(run);
            if (state != BlockState.Absent)
                continue;
            if (!_changing.TryEnter(run))
            {
                if (!TryHoldUp(fetch))
                {
                    fetch.IsSkipped = true;
                    continue;
                }

                await _changing.EnterAsync(run);
            }

            try
            {
                if (fetch.IsHeldUp && Volatile.Read(ref _isClosed))
                    throw Closed(); // while the fetch waited for writers, the file may have been closed
                await StoreHeld(fetch, run);
            }
            finally
            {
                _changing.Leave(run);
            }
        }
    }

    /// <summary>Writes what is still absent of blocks that are held.</summary>
    private async ValueTask StoreHeld(Fetch fetch, BlockRange held)
    {
        while (held.Count > 0)
        {
            BlockRange part = _map.Run(held, out BlockState state);
            held = held.After(part);
            if (state != BlockState.Absent || fetch.IsStale) // whoever makes it stale changes these blocks afterwards
                continue;
            int start = (int)(part.Offset - fetch.Range.Offset), length = (int)part.LengthOn(_map.Header.Source.Length);
            await WriteData(part.Offset, fetch.Buffer!.Memory.Slice(start, length));
            _map.SetFetched(part);
        }
    }

    /// <summary>Writes data as data, and long runs of zeroes as holes: a sparse origin stays sparse.</summary>
    private async ValueTask WriteData(long offset, ReadOnlyMemory<byte> data)
    {
        for (int length; data.Length > 0; offset += length, data = data[length..])
        {
            length = Math.Min(UnitBytes, data.Length);
            if (length == UnitBytes && !data.Span[..length].ContainsAnyExcept((byte)0))
                await _local.ZeroAsync(offset, length, ZeroMode.MayPunch, durable: false);
            else if (!_local.TryWrite(offset, data.Span[..length]))
                await _local.WriteAsync(offset, data[..length], durable: false);
        }
    }

    /// <summary>Lets a fetch wait for writers, if there is room for that, and gives its other room to others.</summary>
    private bool TryHoldUp(Fetch fetch)
    {
        if (fetch.IsHeldUp)
            return true;
        lock (_lock)
        {
            if (_bytesHeldUp + BytesOf(fetch) > _maxHeldUpBytes)
                return false;
            _bytesHeldUp += BytesOf(fetch);
            fetch.IsHeldUp = true;
        }

        HeldUp(fetch);
        return true;
    }

    private async Task EndLater(Fetch fetch, ValueTask<DiskException?> storing)
    {
        DiskException? failure = await storing;
        if (Volatile.Read(ref _isClosed))
            Ended([(fetch, failure ?? Closed())]); // without the map: its file may be closed
        else
            EndStored([(fetch, failure)]);
    }

    /// <summary>Writes the map, once for all that was stored, and ends the fetches.</summary>
    private void EndStored(List<(Fetch Fetch, DiskException? Failure)> stored)
    {
        DiskException? behind = null;
        try
        {
            _map.WriteBehind();
        }
        catch (Exception caught)
        {
            behind = AsDiskException(caught);
        }

        long bytes = 0;
        for (int i = 0; i < stored.Count; i++)
        {
            (Fetch fetch, DiskException? failure) = stored[i];
            bytes += BytesOf(fetch);
            stored[i] = (fetch, failure ?? behind);
            if ((failure ?? behind) is { } told && !Volatile.Read(ref _isClosed))
                CannotStore(told);
        }

        lock (_lock)
        {
            _bytesHeldUp -= stored.Sum(s => s.Fetch.IsHeldUp ? BytesOf(s.Fetch) : 0);
            _stepBytes += bytes;
            BeginStep();
        }

        Ended(stored);
    }

    /// <summary>Begins a step, if enough was stored and none is under way. The lock is held.</summary>
    private void BeginStep()
    {
        if (_stepBytes < StepBytes || _isClosed || !_step.IsCompleted)
            return;
        _stepBytes = 0;
        var ended = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
        _step = ended.Task;
        _ = Task.Run(() => RunStep(ended));
    }

    private async Task RunStep(TaskCompletionSource ended)
    {
        try
        {
            await Flush();
        }
        catch (Exception)
        {
            // A failed sync is remembered: clients' flushes fail, too. Another failure is theirs to find.
        }

        lock (_lock)
        {
            ended.SetResult();
            BeginStep();
            Monitor.PulseAll(_lock);
        }
    }

    /// <summary>
    /// The step that those who fetch without reading wait for; null unless another step was stored meanwhile. Readers
    /// and writers wait for none.
    /// </summary>
    public Task? StepToWaitFor()
    {
        lock (_lock)
            return _stepBytes >= StepBytes && !_step.IsCompleted ? _step : null;
    }

    /// <summary>
    /// Ends the storing, after what is being stored. What has not been stored is given up, also if it comes later; it
    /// is fetched again some day.
    /// </summary>
    public void Stop()
    {
        List<(Fetch, DiskException?)> left;
        lock (_lock)
        {
            _isClosed = true;
            while (_isStoring || !_step.IsCompleted)
                Monitor.Wait(_lock);
            left = [.. _toStore.Select(fetch => (fetch, (DiskException?)Closed()))];
            _toStore.Clear();
        }

        Ended(left); // those that wait for room are sent, and fail
    }

    private static DiskException Closed() => new(DiskError.Io, "the cache is closed");

    private static DiskException AsDiskException(Exception failure)
        => failure as DiskException ?? new DiskException(DiskError.Io, failure.Message);
}
