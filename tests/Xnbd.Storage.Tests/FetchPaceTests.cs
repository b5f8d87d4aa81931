using Xnbd.Storage.Cache;

namespace Xnbd.Storage.Tests;

/// <summary>
/// The pace of fetches, on a simulated line with a simulated clock: it fills the line, keeps its queue short, and finds
/// the rate again when the line has changed.
/// </summary>
public sealed class FetchPaceTests
{
    private const double Mbit = 1e6 / 8;

    /// <summary>
    /// A line with one queue, a copy that wants all of it, and, if a test says so, a client that misses one block after
    /// the other.
    /// </summary>
    private sealed class Line(double rate, double roundTrip, double jitter = 0, int seed = 1)
    {
        private readonly FetchPace _pace = new();
        private readonly Random _random = new(seed);
        private readonly PriorityQueue<(FetchPace.Mark Mark, int Bytes, bool IsMiss), double> _answers = new();
        private double _freeAt; // when the queue is empty
        private long _underWay;
        private double _nextMissAt = double.PositiveInfinity;

        public FetchPace Pace => _pace;

        public double Now { get; private set; }

        public double Rate { get; set; } = rate;

        public double RoundTrip { get; set; } = roundTrip;

        public bool IsCopying { get; set; } = true;

        /// <summary>Bytes of the copy that have arrived.</summary>
        public long Copied { get; private set; }

        /// <summary>The longest time that bytes have stood in the queue, in seconds.</summary>
        public double LongestQueue { get; set; }

        /// <summary>How long the client's misses took, in seconds.</summary>
        public List<double> Misses { get; } = [];

        public bool HasClient
        {
            set => _nextMissAt = value ? Now : double.PositiveInfinity;
        }

        /// <summary>Runs for a time in seconds.</summary>
        /// <returns>The part of the line that the copy used.</returns>
        public double Run(double seconds)
        {
            double end = Now + seconds, start = Now;
            long before = Copied;
            while (true)
            {
                Send();
                double next = Math.Min(_nextMissAt, _answers.TryPeek(out _, out double at) ? at : end);
                if (next >= end)
                    break;
                Now = next;
                if (next == _nextMissAt)
                {
                    _nextMissAt = double.PositiveInfinity;
                    _pace.NoteMiss(Now);
                    Send(4096, isMiss: true);
                    continue;
                }

                (FetchPace.Mark mark, int bytes, bool isMiss) = _answers.Dequeue();
                _underWay -= bytes;
                _pace.Arrive(mark, bytes, Now);
                if (isMiss)
                {
                    Misses.Add(Now - mark.SentAt);
                    _nextMissAt = Now + 0.0001;
                }
                else
                {
                    Copied += bytes;
                }
            }

            Now = end;
            return (Copied - before) / ((end - start) * Rate);
        }

        private void Send()
        {
            while (IsCopying)
            {
                int piece = _pace.PieceBytes;
                if (_underWay > 0 && _underWay + piece > _pace.Window(Now, _pace.IsPolite(Now)))
                    return;
                Send(piece, isMiss: false);
            }
        }

        private void Send(int bytes, bool isMiss)
        {
            if (_underWay == 0)
                _pace.Resume(Now);
            _underWay += bytes;
            FetchPace.Mark mark = _pace.Send(Now, _underWay, _pace.Window(Now, _pace.IsPolite(Now)), IsCopying);
            double arrives = Math.Max(Now + (RoundTrip / 2), _freeAt);
            LongestQueue = Math.Max(LongestQueue, arrives - Now - (RoundTrip / 2));
            _freeAt = arrives + (bytes / Rate);
            _answers.Enqueue((mark, bytes, isMiss), _freeAt + (RoundTrip / 2) + (_random.NextDouble() * jitter));
        }
    }

    public static TheoryData<double, double, double> Lines
    {
        get
        {
            var lines = new TheoryData<double, double, double>();
            foreach (double rate in (double[])[10, 100, 1000, 10_000])
            {
                foreach (double roundTrip in (double[])[0.2, 1, 5, 20, 100, 200])
                {
                    foreach (double jitter in (double[])[0, 1, 4])
                        lines.Add(rate, roundTrip, jitter);
                }
            }

            return lines;
        }
    }

    [Theory]
    [MemberData(nameof(Lines))]
    public void The_copy_fills_the_line_and_leaves_its_queue_short(
        double megabits, double milliseconds, double jitterMs)
    {
        var line = new Line(megabits * Mbit, milliseconds / 1000, jitterMs / 1000);
        line.Run(6); // time to find the rate, also on the longest line
        Assert.InRange(line.Run(60), megabits < 100 ? 0.9 : 0.97, 1.01);

        // No longer queue than the next measurement of the round trip needs to be noticed.
        line.LongestQueue = 0;
        line.Run(5);
        Assert.InRange(line.LongestQueue, 0, 0.16 + (2 * milliseconds / 1000));
        Assert.InRange(line.Pace.RoundTrip, milliseconds / 1000, (milliseconds / 1000) + 0.05);
    }

    [Theory]
    [MemberData(nameof(Lines))]
    public void The_rate_does_not_oscillate(double megabits, double milliseconds, double jitterMs)
    {
        var line = new Line(megabits * Mbit, milliseconds / 1000, jitterMs / 1000);
        line.Run(6);
        var rates = new List<double>();
        for (int i = 0; i < 300; i++)
        {
            line.Run(0.1);
            rates.Add(line.Pace.Rate / line.Rate);
        }

        rates.Sort();
        Assert.InRange(rates[150], 0.95, 1.5); // more than the line has is a longer queue, and no more
        Assert.InRange(rates[15], 0.8, 1.5);

        // A piece of a slow line, and a jitter as long as a round trip, look like a queue that comes and goes.
        bool isSmooth = megabits >= 100 && jitterMs <= 1;
        Assert.InRange(rates[285], 0.95, isSmooth ? 1.6 : 4);
    }

    [Theory]
    [MemberData(nameof(Lines))]
    public void A_client_waits_little_and_the_copy_goes_on(double megabits, double milliseconds, double jitterMs)
    {
        var line = new Line(megabits * Mbit, milliseconds / 1000, jitterMs / 1000);
        line.Run(6);
        line.HasClient = true;
        line.Run(1);
        line.Misses.Clear();
        double copied = line.Run(20);
        line.Misses.Sort();
        double[] extra = [.. line.Misses.Select(miss => miss - (milliseconds / 1000))];
        Assert.InRange(extra[extra.Length / 2], 0, 0.02);
        Assert.InRange(extra[extra.Length * 99 / 100], 0, 0.06);
        Assert.InRange(copied, jitterMs < milliseconds ? 0.6 : 0.4, 1); // a long jitter looks like a queue
    }

    [Theory]
    [InlineData(100, 0.2)]
    [InlineData(100, 20)]
    [InlineData(1000, 20)]
    public void It_recovers_when_the_line_was_slow_for_a_second(double megabits, double milliseconds)
    {
        var line = new Line(megabits * Mbit, milliseconds / 1000, jitter: 0.001);
        line.Run(5);
        line.Rate /= 10;
        line.Run(0.5);
        line.LongestQueue = 0;
        line.Run(0.5);
        Assert.InRange(line.LongestQueue, 0, 0.12); // what was under way has gone, and the window is smaller
        line.Rate *= 10;
        Assert.InRange(line.Run(2), 0.9, 1.01);
    }

    [Fact]
    public void It_finds_the_new_round_trip_when_the_line_becomes_longer_or_shorter()
    {
        var line = new Line(100 * Mbit, 0.020, jitter: 0.001);
        line.Run(5);
        line.RoundTrip = 0.080;
        line.Run(15);
        Assert.InRange(line.Pace.RoundTrip, 0.080, 0.095);
        Assert.InRange(line.Run(5), 0.95, 1.01);
        line.RoundTrip = 0.010;
        line.Run(2);
        Assert.InRange(line.Run(5), 0.95, 1.01);
        line.Run(30);
        Assert.InRange(line.Pace.RoundTrip, 0.010, 0.024);
    }

    [Fact]
    public void A_client_alone_says_nothing_about_the_rate_but_that_it_is_no_lower()
    {
        var line = new Line(100 * Mbit, 0.020);
        line.Run(5);
        double rate = line.Pace.Rate;
        line.IsCopying = false;
        line.Run(1);
        line.HasClient = true;
        line.Run(30);
        Assert.InRange(line.Pace.Rate, rate * 0.75, rate * 1.3);
    }

    [Fact]
    public void Pieces_are_small_on_a_slow_line_and_large_on_a_fast_one()
    {
        foreach ((double megabits, int least, int most) in
            ((double, int, int)[])[(2, 8, 8), (100, 32, 80), (1000, 400, 720), (20_000, 1024, 1024)])
        {
            var line = new Line(megabits * Mbit, 0.001);
            line.Run(5);
            Assert.InRange(line.Pace.PieceBytes, least << 10, most << 10);
            Assert.Equal(0, line.Pace.PieceBytes % BlockRange.BlockSize);
        }
    }
}
