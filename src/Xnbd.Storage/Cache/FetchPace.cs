namespace Xnbd.Storage.Cache;

/// <summary>
/// Tells how many bytes may be under way to the origin, so that the line is full and nothing stands in its queues: what
/// a client misses would wait behind that.
/// <para>
/// The model is a line with a rate and a round-trip time. Rate times round trip fills the line. The round trip is the
/// shortest of the last ten seconds. The rate is what arrives while the line is full. The line is full when answers
/// take longer than the round trip: then something stands in a queue, and the pace lets a little stand there on purpose
/// (<see cref="StandingTime"/>). While clients miss (<see cref="NoteMiss"/>), less stands there. Their own bytes count
/// as under way, so the copy leaves them as much of the line as they use.
/// </para>
/// <para>
/// How the rate changes. Each round trip without a queue, it grows: by a quarter, then twofold, until there is one.
/// While clients miss, it grows by less, since what is too much makes them wait.
/// With a queue, it approaches what is delivered. With a long queue, it falls to what is delivered at once.
/// </para>
/// <para>
/// How the round trip changes. A shorter one is believed at once. When it has not been seen for ten seconds, so little
/// is sent for a moment that the queues become empty, and what is seen then is the round trip.
/// </para>
/// Answers to what was sent while the line was not wanted full say nothing about its rate, except that it is no lower.
/// This type has no lock and no clock: the caller serializes the calls, and tells the time in seconds.
/// </summary>
internal sealed class FetchPace
{
    /// <summary>The smallest piece, in bytes: 7 ms of a line of 10 Mbit/s.</summary>
    private const int MinPieceBytes = 8 * 1024;

    /// <summary>A piece takes the line about so long, in seconds.</summary>
    private const double PieceTime = 0.004;

    /// <summary>How much is sent while nothing is known, in bytes; with clients that wait, an eighth of it.</summary>
    private const int FirstWindow = 1 << 20;

    /// <summary>
    /// How much stands in the queues of the line, in seconds, or this part of the round trip if it is more.
    /// </summary>
    private const double MinStandingTime = 0.008, StandingPart = 0.125;

    /// <summary>Which part of that may stand there while clients miss.</summary>
    private const double PolitePart = 0.5;

    /// <summary>
    /// Which part of the line is filled while the round trip is measured. While clients miss, it is more: what fills
    /// the line afterwards is sent at once, and they wait behind it.
    /// </summary>
    private const double ProbePart = 0.75, PoliteProbePart = 0.9;

    /// <summary>For how long the round trip is believed, in seconds.</summary>
    private const double MaxRoundTripAge = 10;

    /// <summary>How many answers from an empty line end a measurement of the round trip.</summary>
    private const int ProbeAnswers = 3;

    /// <summary>Clients are taken to miss for this long after a miss, in seconds, or for two round trips.</summary>
    private const double MissTime = 0.1;

    /// <summary>After how many rounds without a queue the rate grows twofold.</summary>
    private const int SearchRounds = 3;

    /// <summary>
    /// How the rate grows in a round without a queue. While clients miss, it also grows by no more than makes a queue
    /// of the length that is wanted.
    /// </summary>
    private const double Growth = 1.25, MaxPoliteGrowth = 1.1;

    /// <summary>How many answers in a row must be late before the rate falls: one may have waited for a disk.</summary>
    private const int LateAnswers = 4;

    private double _rate; // in bytes per second; 0 while nothing is known
    private double _roundTrip = double.PositiveInfinity;
    private double _roundTripAt; // when it was seen last
    private long _delivered; // bytes, in all
    private double _deliveredAt; // when the last of them arrived
    private long _roundEnd; // a round ends with the answer to what was sent after so many bytes had arrived
    private double _leastQueue = double.PositiveInfinity; // of the answers of this round, in seconds
    private bool _wasFull; // the line, in this round
    private long _refilledAt; // bytes that will have arrived when the line is full again, after a measurement
    private int _calmRounds; // in a row, without a queue
    private bool _isSearching = true; // the line may be much faster
    private int _lateAnswers; // in a row
    private double _missAt = double.NegativeInfinity;
    private double _probeTrip; // the shortest round trip of this measurement
    private double _believedTrip; // the round trip before this measurement
    private long _probeFrom; // bytes that had arrived when it began
    private int _probeAnswers = -1; // of this measurement; -1 when there is none

    /// <summary>What is remembered of the moment at which a fetch was sent.</summary>
    /// <param name="SentAt">The time in seconds.</param>
    /// <param name="Delivered">Bytes that had arrived by then.</param>
    /// <param name="DeliveredAt">When the last of them had arrived.</param>
    /// <param name="IsWanted">The line was wanted full.</param>
    /// <param name="IsFull">And about as much was under way as was allowed.</param>
    /// <param name="IsProbe">The round trip was being measured, and the queues were empty.</param>
    public readonly record struct Mark(
        double SentAt, long Delivered, double DeliveredAt, bool IsWanted, bool IsFull, bool IsProbe);

    /// <summary>What the line delivers, in bytes per second; 0 while nothing is known.</summary>
    public double Rate => _rate;

    /// <summary>The time of an answer if nothing stands in a queue, in seconds; infinite if unknown.</summary>
    public double RoundTrip => _roundTrip;

    /// <summary>How much one request should read, in bytes; a multiple of <see cref="MinPieceBytes"/>.</summary>
    public int PieceBytes => _rate == 0
        ? FirstWindow / 16
        : (int)Math.Clamp(_rate * PieceTime, MinPieceBytes, Fetch.MaxBytes) / MinPieceBytes * MinPieceBytes;

    private double StandingTime => Math.Max(MinStandingTime, _roundTrip * StandingPart);

    /// <summary>A client waits for the origin.</summary>
    /// <param name="now">The time in seconds.</param>
    public void NoteMiss(double now) => _missAt = now;

    /// <summary>Whether clients miss, at present.</summary>
    /// <param name="now">The time in seconds.</param>
    public bool IsPolite(double now)
        => now - _missAt < Math.Max(MissTime, double.IsFinite(_roundTrip) ? 2 * _roundTrip : 0);

    /// <summary>How much may be under way, in bytes.</summary>
    /// <param name="now">The time in seconds.</param>
    /// <param name="isPolite">Clients miss, and would wait behind what stands in the queues.</param>
    public long Window(double now, bool isPolite)
    {
        if (_rate == 0)
            return isPolite ? FirstWindow / 8 : FirstWindow;
        double time = _roundTrip + (isPolite ? PolitePart * StandingTime : StandingTime);
        if (_probeAnswers >= 0)
            time = Math.Min(time, (isPolite ? PoliteProbePart : ProbePart) * _roundTrip);
        double window = _rate * time;
        if (isPolite)
            window -= 2 * Math.Max(0, PieceBytes - (_rate * PieceTime)); // of a slow line, where a piece is a queue
        return Math.Max(MinPieceBytes, (long)window);
    }

    /// <summary>A fetch is being sent.</summary>
    /// <param name="now">The time in seconds.</param>
    /// <param name="underWay">Bytes that are under way, with this fetch.</param>
    /// <param name="window">How many may be.</param>
    /// <param name="isMoreWanted">The line is wanted full: by the copy, or to read ahead.</param>
    public Mark Send(double now, long underWay, long window, bool isMoreWanted)
    {
        if (isMoreWanted && _probeAnswers < 0 && _rate > 0 && now - _roundTripAt > MaxRoundTripAge)
        {
            _believedTrip = _roundTrip;
            BeginProbe();
        }

        bool isFull = underWay + (PieceBytes * 3 / 2) >= window;
        bool isProbe = _probeAnswers >= 0 && underWay <= Math.Max(
            PieceBytes, (IsPolite(now) ? PoliteProbePart : ProbePart) * _rate * _roundTrip);
        return new Mark(now, _delivered, _deliveredAt, isMoreWanted, isMoreWanted && isFull, isProbe);
    }

    /// <summary>Begins to count time anew: nothing was under way.</summary>
    /// <param name="now">The time in seconds.</param>
    public void Resume(double now) => _deliveredAt = now;

    /// <summary>A fetch was answered.</summary>
    /// <param name="mark">What <see cref="Send"/> has said.</param>
    /// <param name="bytes">Its length.</param>
    /// <param name="now">The time in seconds.</param>
    public void Arrive(Mark mark, long bytes, double now)
    {
        _delivered += bytes;
        _deliveredAt = now;
        double trip = Math.Max(now - mark.SentAt, 1e-6);
        double rate = (_delivered - mark.Delivered) / Math.Max(now - mark.DeliveredAt, 1e-6);
        NoteTrip(trip, mark, now);
        if (!mark.IsWanted || _isSearching)
            _rate = Math.Max(_rate, rate);
        if (mark.IsWanted && mark.Delivered >= _refilledAt)
            NoteQueue(Math.Max(0, trip - _roundTrip - (bytes / _rate)), rate, mark.IsFull);
        if (mark.Delivered < _roundEnd)
            return;
        EndRound(rate, now);
        _roundEnd = _delivered;
    }

    private void NoteTrip(double trip, Mark mark, double now)
    {
        if (trip < _roundTrip)
            _roundTrip = trip;
        if (trip <= _roundTrip + (StandingTime / 8))
            _roundTripAt = now;
        if (!mark.IsProbe || _probeAnswers < 0 || mark.Delivered < _probeFrom)
            return;
        _probeTrip = Math.Min(_probeTrip, trip);
        if (++_probeAnswers < ProbeAnswers)
            return;
        _roundTrip = _probeTrip;
        _roundTripAt = now;
        if (_probeTrip < 0.9 * _believedTrip)
        {
            _believedTrip = _probeTrip; // something stands in the queues: less is sent, and it is measured again
            BeginProbe();
            return;
        }

        _probeAnswers = -1;
        _refilledAt = _delivered + Window(now, isPolite: false);
    }

    private void BeginProbe()
    {
        _probeAnswers = 0;
        _probeTrip = double.PositiveInfinity;
        _probeFrom = _delivered;
    }

    /// <summary>What stood in the queues, in seconds, and what was delivered meanwhile, in bytes per second.</summary>
    private void NoteQueue(double queue, double rate, bool isFull)
    {
        _leastQueue = Math.Min(_leastQueue, queue);
        _wasFull |= isFull;
        _lateAnswers = queue > 2 * StandingTime ? _lateAnswers + 1 : 0;
        if (_isSearching)
            return; // what is sent in a burst makes a queue by itself
        if (_lateAnswers >= LateAnswers)
            _rate = Math.Min(_rate, rate);
        else if (isFull && queue > StandingTime / 4)
            _rate += (rate - _rate) / 8;
    }

    private void EndRound(double rate, double now)
    {
        if (!_wasFull)
            return;
        _wasFull = false;
        bool isCalm = _leastQueue < StandingTime / 4;
        _leastQueue = double.PositiveInfinity;
        _calmRounds = isCalm ? _calmRounds + 1 : 0;
        if (!isCalm)
        {
            if (_isSearching)
                _rate = rate;
            _isSearching = false;
        }
        else if (IsPolite(now) && !_isSearching)
        {
            _rate *= Math.Min(MaxPoliteGrowth, 1 + (PolitePart * StandingTime / _roundTrip));
            _calmRounds = 0; // there was little to make a queue: it does not tell that the line is much faster
        }
        else
        {
            _rate *= (_isSearching |= _calmRounds >= SearchRounds) ? 2 : Growth;
        }
    }
}
