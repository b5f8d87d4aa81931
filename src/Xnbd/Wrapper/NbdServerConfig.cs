using System.Text.Json.Nodes;

namespace Xnbd.Programs.Wrapper;

/// <summary>
/// Reads a configuration file of <c>nbd-server</c> (nbd-server(5)): sections in brackets, lines <c>name = value</c>,
/// comments that begin with <c>#</c>. The section <c>generic</c> holds what is for the server; each other one is an
/// export. What has no counterpart here is told line by line.
/// </summary>
internal sealed class NbdServerConfig
{
    /// <summary>Members that need nothing here: what they ask for is always so, or is of no matter.</summary>
    private static readonly HashSet<string> s_needless =
    [
        "flush", "fua", "trim", "rotational", "sparse_cow", "splice", "timeout", "oldstyle", "max_threads",
        "duallisten", "sdp", "allowlist",
    ];

    private readonly Action<string> _tell;
    private readonly Dictionary<string, JsonNode?> _images = [];

    private NbdServerConfig(Action<string> tell) => _tell = tell;

    /// <summary>Reads the file, and those of its <c>includedir</c>.</summary>
    /// <param name="path">The file.</param>
    /// <param name="tell">Receives what cannot be taken over, a line each.</param>
    /// <returns>Entries of a state file, by name.</returns>
    /// <exception cref="FailureException">A file cannot be read, or is no such file.</exception>
    public static IReadOnlyDictionary<string, JsonNode?> Read(string path, Action<string> tell)
    {
        var config = new NbdServerConfig(tell);
        foreach (Section section in Parse(path))
        {
            if (section.Name != "generic")
            {
                config.Add(section);
                continue;
            }

            config.TellGeneric(section);
            if (section.Values.GetValueOrDefault("includedir") is { } folder)
                config.Include(folder);
        }

        return config._images;
    }

    private void Include(string folder)
    {
        if (!Directory.Exists(folder))
        {
            _tell($"includedir: there is no directory '{folder}'");
            return;
        }

        foreach (string path in Directory.GetFiles(folder, "*.conf").Order(StringComparer.Ordinal))
        {
            foreach (Section section in Parse(path))
            {
                if (section.Name == "generic")
                    _tell($"'{path}': the section generic of an included file is passed over");
                else
                    Add(section);
            }
        }
    }

    private void TellGeneric(Section section)
    {
        foreach ((string name, string value) in section.Values)
        {
            string? what = name switch
            {
                "port" => $"start xnbd-wrapper with --lport {value}",
                "listenaddr" => $"start xnbd-wrapper with --laddr {value}",
                "unixsock" => $"start xnbd-wrapper with --unix {value}",
                "includedir" => null,
                "user" or "group" => "not supported yet: start xnbd-wrapper as that user",
                _ when s_needless.Contains(name) => null,
                _ => "not supported",
            };
            if (what is not null)
                _tell($"generic: {name} = {value}: {what}");
        }
    }

    private void Add(Section section)
    {
        Dictionary<string, string> values = section.Values;
        if (values.GetValueOrDefault("exportname") is not { Length: > 0 } image)
        {
            _tell($"{section.Name}: exportname is missing: not taken over");
            return;
        }

        string? obstacle = Array.Find(["multifile", "treefiles"], name => IsTrue(section, name));
        if (obstacle is not null || image.Contains("%s", StringComparison.Ordinal))
        {
            _tell($"{section.Name}: {obstacle ?? "an exportname with %s"} is not supported: not taken over");
            return;
        }

        bool isCow = IsTrue(section, "copyonwrite");
        var json = new JsonObject
        {
            ["mode"] = isCow ? ExportDefinition.CowTarget : ExportDefinition.Target,
            ["image_path"] = Path.GetFullPath(image),
        };
        if (IsTrue(section, "readonly"))
            json["read_only"] = true;
        if (isCow)
        {
            if (values.GetValueOrDefault("cowdir") is { Length: > 0 } folder)
                json["cow_dir"] = Path.GetFullPath(folder);
            _tell($"{section.Name}: copyonwrite: all clients of the export share one layer here; give each an export");
        }

        foreach ((string name, string value) in values)
        {
            if (name is "authfile")
                _tell($"{section.Name}: authfile = {value}: not supported yet: ANYBODY may connect");
            else if (name is not ("exportname" or "readonly" or "copyonwrite" or "cowdir" or "multifile" or "treefiles")
                && !s_needless.Contains(name) && value is not ("false" or ""))
                _tell($"{section.Name}: {name} = {value}: not supported");
        }

        if (!_images.TryAdd(section.Name, json))
            _tell($"{section.Name}: a second export of this name is not taken over");
    }

    private static bool IsTrue(Section section, string name) => section.Values.GetValueOrDefault(name) is "true";

    private static List<Section> Parse(string path)
    {
        string[] lines;
        try
        {
            lines = File.ReadAllLines(path);
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            throw new FailureException($"cannot read '{path}': {failure.Message}");
        }

        var sections = new List<Section>();
        for (int i = 0; i < lines.Length; i++)
        {
            string line = lines[i].Trim();
            if (line.Length == 0 || line[0] == '#')
                continue;
            if (line[0] == '[' && line[^1] == ']')
                sections.Add(new Section(line[1..^1], []));
            else if (sections.Count > 0 && line.IndexOf('=') is > 0 and var at)
                sections[^1].Values[line[..at].Trim()] = line[(at + 1)..].Trim();
            else
                throw new FailureException($"'{path}', line {i + 1}: neither a section nor a value of one");
        }

        return sections;
    }

    private sealed record Section(string Name, Dictionary<string, string> Values);
}
