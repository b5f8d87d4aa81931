namespace Xnbd.Storage.Cache;

/// <content>Who is let in next: misses, then what is read ahead, then the copy.</content>
internal sealed partial class FetchQueue
{
    /// <summary>
    /// How many fetches of the copy wait for their turn, so that one can go out as soon as an answer has arrived.
    /// </summary>
    private const int MaxCopiesWaiting = 4;

    /// <summary>What is read ahead is fetched in pieces of at most this size, in blocks: 256 KiB.</summary>
    private const int MaxAheadBlocks = 64;

    private readonly FetchPace _pace = new(); // guarded by _lock
    private readonly LinkedList<Fetch>[] _waiting = [new(), new(), new()]; // for room, or their turn; by purpose
    private readonly Queue<TaskCompletionSource<int>> _turns = new(); // who wants to copy the next piece
    private readonly int[] _inFlight = new int[3]; // requests, by purpose
    private long _bytesAhead; // that wait for their turn; read as an estimate without the lock

    /// <summary>
    /// Whether there is room to read ahead. Half of the room belongs to those who wait. And nothing is read ahead while
    /// much is to be stored: what is stored late has left the processor's cache. An estimate.
    /// </summary>
    public bool HasRoomAhead
        => Volatile.Read(ref _bytesInFlight) + Volatile.Read(ref _bytesAhead) < _maxBytes / 2
            && Volatile.Read(ref _bytesArrived) <= Fetch.MaxBytes;

    /// <summary>How much one fetch should read ahead, in blocks; a power of two.</summary>
    public int AheadBlocks
    {
        get
        {
            lock (_lock)
            {
                int blocks = Math.Min(_pace.PieceBytes / BlockRange.BlockSize, MaxAheadBlocks);
                return (int)System.Numerics.BitOperations.RoundUpToPowerOf2((uint)blocks);
            }
        }
    }

    /// <summary>What the line to the origin delivers, in bytes per second; 0 while nothing is known.</summary>
    public long Rate
    {
        get
        {
            lock (_lock)
                return (long)_pace.Rate;
        }
    }

    private double Now => _time.GetTimestamp() / (double)_time.TimestampFrequency;

    /// <summary>Completes when the copy should fetch another piece.</summary>
    /// <param name="cancel">Ends the waiting.</param>
    /// <returns>How many blocks the piece should have at most.</returns>
    public async Task<int> TurnAsync(CancellationToken cancel)
    {
        var turn = new TaskCompletionSource<int>(TaskCreationOptions.RunContinuationsAsynchronously);
        lock (_lock)
        {
            if (_isDetached || (_turns.Count == 0 && _waiting[(int)FetchPurpose.Copy].Count < MaxCopiesWaiting))
                return PieceBlocks;
            _turns.Enqueue(turn);
        }

        using CancellationTokenRegistration registration = cancel.Register(() => turn.TrySetCanceled(cancel));
        return await turn.Task;
    }

    /// <summary>
    /// Reads blocks of the origin once more, as a piece of the copy. Nobody joins the read, and nothing is kept of it.
    /// </summary>
    /// <param name="range">At most <see cref="Fetch.MaxBlocks"/>.</param>
    /// <param name="buffer">As long as the blocks.</param>
    /// <exception cref="DiskException">The origin failed, or is detached.</exception>
    public async Task ReadAgainAsync(BlockRange range, Memory<byte> buffer)
    {
        var fetch = new Fetch(range, FetchPurpose.Copy) { IsStale = true };
        lock (_lock)
        {
            if (_isDetached)
                throw Replaced();
            Enqueue(fetch);
            LetIn();
        }

        SendSoon();
        try
        {
            await fetch.Arrived.Task;
            fetch.Buffer!.Slice(0, buffer.Length).CopyTo(buffer.Span);
        }
        finally
        {
            Release(fetch);
        }
    }

    private int PieceBlocks => _pace.PieceBytes / BlockRange.BlockSize;

    private void Enqueue(Fetch fetch)
    {
        fetch.Place = _waiting[(int)fetch.Purpose].AddLast(fetch);
        if (fetch.Purpose == FetchPurpose.ReadAhead)
            _bytesAhead += BytesOf(fetch);
    }

    /// <summary>A fetch waits no more. The lock is held.</summary>
    private void Unqueue(Fetch fetch, LinkedListNode<Fetch> place)
    {
        _waiting[(int)fetch.Purpose].Remove(place);
        fetch.Place = null;
        if (fetch.Purpose == FetchPurpose.ReadAhead)
            _bytesAhead -= BytesOf(fetch);
    }

    /// <summary>Somebody waits for a fetch who comes before those who wanted it so far. The lock is held.</summary>
    private void Promote(Fetch fetch, LinkedListNode<Fetch> place, FetchPurpose purpose)
    {
        Unqueue(fetch, place);
        fetch.Purpose = purpose;
        Enqueue(fetch);
    }

    /// <summary>
    /// Lets in the fetches that wait, as far as there is room, and as it is their turn. The lock is held; they are to
    /// be sent.
    /// </summary>
    private void LetIn()
    {
        double now = double.NaN;
        for (var purpose = FetchPurpose.Miss; purpose <= FetchPurpose.Copy; purpose++)
        {
            while (_waiting[(int)purpose].First is { Value: var next } place)
            {
                if (double.IsNaN(now))
                    now = Now;
                if (_requestsInFlight >= _maxRequests || !HasRoom(BytesOf(next)))
                    return;
                if (!IsTurn(next, now))
                    break;
                Unqueue(next, place);
                LetIn(next, now);
            }
        }

        while (_waiting[(int)FetchPurpose.Copy].Count < MaxCopiesWaiting
            && _turns.TryDequeue(out TaskCompletionSource<int>? turn))
        {
            if (turn.TrySetResult(PieceBlocks))
                break; // it comes back at once
        }
    }

    private void LetIn(Fetch fetch, double now)
    {
        if (_requestsInFlight == 0)
            _pace.Resume(now);
        if (fetch.Purpose == FetchPurpose.Miss)
            _pace.NoteMiss(now);
        _inFlight[(int)fetch.Purpose]++;
        _requestsInFlight++;
        _bytesInFlight += BytesOf(fetch);
        fetch.IsCounted = true;
        bool isCopying = fetch.Purpose == FetchPurpose.Copy || _waiting[(int)FetchPurpose.Copy].Count > 0;
        long window = _pace.Window(now, isCopying && _pace.IsPolite(now));
        fetch.Mark = _pace.Send(now, _bytesInFlight, window, isCopying || fetch.Purpose == FetchPurpose.ReadAhead);
        _toSend.Enqueue(fetch);
    }

    /// <summary>
    /// Whether a fetch for which there is room may go out now. A miss may. One that is read ahead, and one of the copy,
    /// may always be under way: whatever clients miss, both go on.
    /// </summary>
    private bool IsTurn(Fetch fetch, double now)
    {
        if (fetch.Purpose == FetchPurpose.Miss || _requestsInFlight == 0)
            return true;
        if (_inFlight[(int)fetch.Purpose] == 0)
            return true;
        long bytes = _bytesInFlight + BytesOf(fetch);
        if (bytes + _bytesArrived > _maxBytes - (_maxBytes / 8))
            return false; // the rest of the room is for misses
        bool isCopy = fetch.Purpose == FetchPurpose.Copy;
        return bytes <= _pace.Window(now, isCopy && _pace.IsPolite(now));
    }

    /// <summary>The origin has answered. The lock is held.</summary>
    private void Answered(Fetch fetch, int length, bool isSuccess)
    {
        _requestsInFlight--;
        _bytesInFlight -= length;
        _inFlight[(int)fetch.Purpose]--;
        if (isSuccess)
            _pace.Arrive(fetch.Mark, length, Now);
    }
}
