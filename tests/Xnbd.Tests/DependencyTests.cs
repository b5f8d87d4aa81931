using System.Reflection;
using System.Text.RegularExpressions;
using System.Xml.Linq;
using Xnbd.TestKit;

namespace Xnbd.Tests;

/// <summary>The arrows between the projects point one way: see ARCHITECTURE.md.</summary>
public partial class DependencyTests
{
    [Theory]
    [InlineData("Xnbd.Protocol")]
    [InlineData("Xnbd.Linux")]
    [InlineData("Xnbd.Storage", "Xnbd.Linux")]
    [InlineData("Xnbd.Client", "Xnbd.Protocol", "Xnbd.Storage")]
    [InlineData("Xnbd.Server", "Xnbd.Protocol", "Xnbd.Storage")]
    [InlineData("Xnbd.Control", "Xnbd.Linux")]
    [InlineData("Xnbd", "Xnbd.Client", "Xnbd.Control", "Xnbd.Server")]
    public void A_project_refers_to_these_alone(string project, params string[] references)
    {
        XDocument document = XDocument.Load(Path.Combine(Repository.Root, "src", project, project + ".csproj"));
        Assert.Equal(
            references,
            document.Descendants("ProjectReference")
                .Select(r => Path.GetFileNameWithoutExtension((string)r.Attribute("Include")!)).Order());
    }

    [Fact]
    public void Only_the_Linux_project_calls_native_code()
    {
        foreach (string file in Sources())
        {
            bool isNative = File.ReadAllText(file) is var text
                && (text.Contains("LibraryImport", StringComparison.Ordinal)
                    || text.Contains("DllImport", StringComparison.Ordinal)
                    || text.Contains("unsafe", StringComparison.Ordinal));
            Assert.True(
                !isNative || file.Contains("/Xnbd.Linux/", StringComparison.Ordinal), $"{file} calls native code");
        }
    }

    [Fact]
    public void Only_the_programs_know_the_console_and_the_environment()
    {
        foreach (string file in Sources().Where(f => !f.Contains("/src/Xnbd/", StringComparison.Ordinal)))
        {
            string text = File.ReadAllText(file);
            foreach (string word in (string[])["Console.", "Environment.Exit", "GetEnvironmentVariable", "PosixSignal"])
                Assert.False(text.Contains(word, StringComparison.Ordinal), $"{file} uses {word}");
        }
    }

    [Fact]
    public void Threads_are_started_in_one_place()
    {
        IEnumerable<string> places = Sources()
            .Where(file => File.ReadAllText(file).Contains("new Thread(", StringComparison.Ordinal))
            .Select(file => Path.GetFileName(file));
        Assert.Equal(["LinuxThread.cs"], places);
    }

    /// <summary>Code tells failures apart by their kind; a message is only for people.</summary>
    [Fact]
    public void No_code_looks_into_a_message()
    {
        foreach (string file in Sources())
            Assert.False(LookIntoMessage().IsMatch(File.ReadAllText(file)), $"{file} looks into a message");
    }

    /// <summary>The rooms of Xnbd.Storage: every room may use the top and the rooms that are listed here.</summary>
    [Theory]
    [InlineData("")]
    [InlineData("Threads")]
    [InlineData("Maps")]
    [InlineData("Images", "Threads")]
    [InlineData("Overlay", "Maps", "Threads")]
    [InlineData("Layers", "Images", "Maps", "Overlay", "Threads")]
    [InlineData("Cache", "Images", "Maps", "Overlay", "Threads")]
    [InlineData("Access")]
    public void A_room_of_the_storage_uses_these_alone(string room, params string[] mayUse)
    {
        string folder = Path.Combine(Storage, room);
        // A room that is named within code, also without the first part of its name.
        var namedInCode = new Regex($@"(?:\bXnbd\.Storage\.|(?<![\w.]))({string.Join('|', Rooms())})\.(?=[A-Z])");
        foreach (string file in Directory.EnumerateFiles(folder, "*.cs"))
        {
            string text = File.ReadAllText(file);
            string own = room.Length == 0 ? "Xnbd.Storage" : $"Xnbd.Storage.{room}";
            Assert.True(
                text.Contains($"namespace {own};", StringComparison.Ordinal) || !text.Contains(
                    "namespace ", StringComparison.Ordinal),
                $"{file} is not in the namespace {own}");
            foreach (Match used in RoomPattern().Matches(text).Concat(namedInCode.Matches(text)))
            {
                string name = used.Groups[1].Value;
                Assert.True(name == room || mayUse.Contains(name), $"{file} uses the room {name}");
            }
        }
    }

    [Fact]
    public void Each_room_of_the_storage_is_tested()
    {
        MethodInfo test = GetType().GetMethod(nameof(A_room_of_the_storage_uses_these_alone))!;
        Assert.Equal(
            Rooms().Append("").Order(),
            test.GetCustomAttributes<InlineDataAttribute>().Select(line => (string)line.Data[0]!).Order());
    }

    private static string Storage => Path.Combine(Repository.Root, "src", "Xnbd.Storage");

    private static IEnumerable<string> Rooms()
        => Directory.GetDirectories(Storage).Select(folder => Path.GetFileName(folder)).Except(["bin", "obj"]);

    /// <summary>
    /// What a person can do stands in <c>Advice</c> of the programs: the storage says the kind of a failure and its
    /// remedy. (The string <c>xnbd-layer</c> alone is the name of a format.)
    /// </summary>
    [Fact]
    public void Only_the_programs_know_the_names_of_programs_and_options()
    {
        foreach (string file in Sources().Where(f => !f.Contains("/src/Xnbd/", StringComparison.Ordinal)))
        {
            foreach (string line in File.ReadLines(file))
            {
                if (!line.TrimStart().StartsWith("//", StringComparison.Ordinal))
                    Assert.False(OptionPattern().IsMatch(line), $"{file} names an option or a program: {line}");
            }
        }
    }

    [GeneratedRegex("""
        "(?!xnbd-layer")[^"]*((?<![\w-])--[a-z]|xnbd-[a-z])
        """)]
    private static partial Regex OptionPattern();

    [GeneratedRegex(@"Message\.(Contains|StartsWith|EndsWith|IndexOf|Split)\b")]
    private static partial Regex LookIntoMessage();

    [Fact]
    public void The_programs_have_advice_for_each_remedy()
    {
        string exceptions = File.ReadAllText(Path.Combine(Repository.Root, "src", "Xnbd.Storage", "DiskException.cs"));
        string advice = File.ReadAllText(Path.Combine(Repository.Root, "src", "Xnbd", "Advice.cs"));
        string remedies = exceptions[exceptions.IndexOf("public enum Remedy", StringComparison.Ordinal)..];
        remedies = remedies[..remedies.IndexOf("\n}", StringComparison.Ordinal)];
        string[] names = [.. RemedyPattern().Matches(remedies).Select(match => match.Groups[1].Value)];
        Assert.InRange(names.Length, 8, 100);
        foreach (string name in names.Where(name => name != "None"))
            Assert.Contains($"Remedy.{name} => ", advice, StringComparison.Ordinal);
    }

    [GeneratedRegex(@"^ +([A-Z]\w+)(?: = \d+)?,", RegexOptions.Multiline)]
    private static partial Regex RemedyPattern();

    [GeneratedRegex(@"\bXnbd\.Storage\.(?!Tests)([A-Z]\w*)")]
    private static partial Regex RoomPattern();

    private static IEnumerable<string> Sources() => Directory
        .EnumerateFiles(Path.Combine(Repository.Root, "src"), "*.cs", SearchOption.AllDirectories)
        .Where(f => !f.Contains("/obj/", StringComparison.Ordinal) && !f.Contains("/bin/", StringComparison.Ordinal));
}
