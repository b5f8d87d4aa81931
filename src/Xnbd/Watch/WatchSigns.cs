using Spectre.Console;

namespace Xnbd.Programs.Watch;

/// <summary>The characters of the screen: of Unicode, or of ASCII where the terminal has no more.</summary>
internal sealed class WatchSigns
{
    /// <summary>For terminals that know Unicode.</summary>
    public static readonly WatchSigns Unicode = new('█', '▓', '░', '▄', '·', '»', '█', '░', "▁▂▃▄▅▆▇█");

    /// <summary>For all others.</summary>
    public static readonly WatchSigns Ascii = new('#', 'W', '0', '+', '.', '*', '#', '.', "_.-=+oO#");

    private readonly string _levels;
    private readonly Dictionary<char, (char, Style)> _cells;

    private WatchSigns(
        char fetched,
        char written,
        char zeroed,
        char part,
        char missing,
        char fetching,
        char bar,
        char barRest,
        string levels)
    {
        (Bar, BarRest, _levels) = (bar, barRest, levels);
        Style green = new(Color.Green), blue = new(Color.Blue), aqua = new(Color.Teal);
        _cells = new Dictionary<char, (char, Style)>
        {
            ['F'] = (fetched, green),
            ['f'] = (part, green),
            ['W'] = (written, blue),
            ['w'] = (part, blue),
            ['Z'] = (zeroed, aqua),
            ['z'] = (part, aqua),
            ['.'] = (missing, new Style(Color.Grey)),
            ['*'] = (fetching, new Style(Color.Yellow, decoration: Decoration.Bold)),
        };
    }

    /// <summary>The part of a bar that is done.</summary>
    public char Bar { get; }

    /// <summary>The part of a bar that is not done.</summary>
    public char BarRest { get; }

    /// <summary>How a cell of the map is drawn.</summary>
    /// <param name="cell">Its sign in the report.</param>
    public (char Sign, Style Style) Cell(char cell)
        => _cells.TryGetValue(cell, out (char, Style) drawn) ? drawn : ('?', Style.Plain);

    /// <summary>A part of a column of a chart.</summary>
    /// <param name="value">The column's value; null where nothing is known.</param>
    /// <param name="max">The value of a full column.</param>
    /// <param name="row">The row, counted from the bottom.</param>
    /// <param name="rows">How many rows a full column has.</param>
    public char Level(double? value, double max, int row, int rows)
    {
        if (value is not > 0)
            return value is null || row > 0 ? ' ' : _levels[0];
        int level = (int)Math.Ceiling(Math.Min(1, value.Value / max) * rows * _levels.Length) - (row * _levels.Length);
        return level <= 0 ? ' ' : _levels[Math.Min(level, _levels.Length) - 1];
    }
}
