using System.Text;
using System.Text.Json;
using System.Text.Json.Nodes;
using Microsoft.Win32.SafeHandles;
using Xnbd.Linux;

namespace Xnbd.Programs.Wrapper;

/// <summary>
/// The state file of <c>xnbd-wrapper</c>: which exports there are (docs/formats.md). It is replaced as a whole: written
/// beside its place, synced, renamed, and the directory synced. So whatever happens, the old state or the new one is
/// there. As long as the process lives, a lock on <c>PATH.lock</c> keeps others out. Members of the document that this
/// program does not know are kept. Its user calls it on one thread at a time.
/// </summary>
internal sealed class StateFile : IDisposable
{
    private const int Version = 2;

    private static readonly JsonDocumentOptions s_strict = new() { AllowDuplicateProperties = false };

    private readonly string _path;
    private readonly SafeFileHandle _lock;
    private JsonObject _document;

    private StateFile(string path, SafeFileHandle lockFile, JsonObject document)
        => (_path, _lock, _document) = (path, lockFile, document);

    /// <summary>Opens the state file, which may be absent. The directory of the default one is made.</summary>
    /// <exception cref="FailureException">Another process uses it, or it cannot be read, or is no state.</exception>
    public static StateFile Open(string path)
    {
        if (new FileInfo(path) is { LinkTarget: not null } link)
            path = link.ResolveLinkTarget(returnFinalTarget: true)!.FullName; // a link stays one
        string folder = Path.GetDirectoryName(path)!;
        if (path == WrapperOptions.DefaultState && !Directory.Exists(folder))
        {
            try
            {
                Directory.CreateDirectory(folder);
            }
            catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
            {
                throw new FailureException($"cannot make the directory of the state file: {failure.Message}; "
                    + "--dbpath names another file");
            }
        }

        string lockPath = path + ".lock";
        Errno errno = LinuxFile.Open(lockPath, OpenMode.ReadWrite | OpenMode.Create, out SafeFileHandle? lockFile);
        if (errno != Errno.None)
            throw new FailureException($"cannot open '{lockPath}': {errno.Describe()}");
        try
        {
            if (LinuxFile.TryLock(lockFile!) == Errno.EAGAIN)
                throw new FailureException($"another xnbd-wrapper uses the state file '{path}'");
            return new StateFile(path, lockFile!, Read(path));
        }
        catch
        {
            lockFile!.Dispose();
            throw;
        }
    }

    /// <summary>The entries, by name: what they are made of, whether that makes sense or not.</summary>
    public IReadOnlyList<KeyValuePair<string, JsonNode?>> Images => [.. _document["images"]!.AsObject()];

    /// <summary>Reads the file again, as somebody may have changed it.</summary>
    /// <exception cref="FailureException">
    /// It cannot be read, or is no state; then the old one is still known.
    /// </exception>
    public void Reload() => _document = Read(_path);

    /// <summary>Reads the entries of a state file.</summary>
    /// <exception cref="FailureException">It cannot be read, or is no state.</exception>
    public static IReadOnlyList<KeyValuePair<string, JsonNode?>> ReadImages(string path)
        => File.Exists(path)
            ? [.. Read(path)["images"]!.AsObject()]
            : throw new FailureException($"there is no '{path}'");

    /// <summary>Writes the entries. It is durable when this returns.</summary>
    /// <exception cref="FailureException">That failed; the old state is still there.</exception>
    public void Save(IEnumerable<KeyValuePair<string, JsonNode?>> images)
    {
        JsonObject document = _document.DeepClone().AsObject();
        document["images"] = Copy(images);
        string partial = _path + ".new";
        try
        {
            Write(partial, Encoding.UTF8.GetBytes(Text(document) + "\n"));
            Errno errno = LinuxFile.Rename(partial, _path);
            if (errno != Errno.None)
                throw Failure(errno);
        }
        catch
        {
            _ = LinuxFile.Unlink(partial);
            throw;
        }

        LinuxFile.SyncDirectoryOf(_path);
        _document = document;
    }

    /// <inheritdoc/>
    public void Dispose() => _lock.Dispose();

    /// <summary>The text of a state file with these entries.</summary>
    public static string Text(IEnumerable<KeyValuePair<string, JsonNode?>> images)
        => Text(new JsonObject { ["version"] = Version, ["images"] = Copy(images) });

    private static JsonObject Copy(IEnumerable<KeyValuePair<string, JsonNode?>> images)
        => new(images.Select(pair => KeyValuePair.Create(pair.Key, pair.Value?.DeepClone())));

    private static string Text(JsonObject document)
    {
        using var stream = new MemoryStream();
        using (var writer = new Utf8JsonWriter(stream, new JsonWriterOptions { Indented = true }))
            document.WriteTo(writer);
        return Encoding.UTF8.GetString(stream.ToArray());
    }

    private void Write(string partial, byte[] text)
    {
        _ = LinuxFile.Unlink(partial); // left by a killed process
        Errno errno = LinuxFile.Open(partial, OpenMode.ReadWrite | OpenMode.CreateNew, out SafeFileHandle? file);
        if (errno != Errno.None)
            throw Failure(errno);
        using (file)
        {
            long count = LinuxFile.Write(file!, text, 0);
            errno = count < 0 ? Errno.Of(count) : LinuxFile.Sync(file!);
            if (errno != Errno.None)
                throw Failure(errno);
        }
    }

    private FailureException Failure(Errno errno)
        => new($"the state file '{_path}' cannot be written: {errno.Describe()}");

    /// <summary>Reads every text of a document, which is else read when it is needed.</summary>
    /// <exception cref="InvalidOperationException">One is not valid Unicode.</exception>
    private static void Validate(JsonNode? node)
    {
        if (node is JsonObject members)
        {
            foreach ((_, JsonNode? member) in members)
                Validate(member);
        }
        else if (node is JsonArray elements)
        {
            foreach (JsonNode? element in elements)
                Validate(element);
        }
        else if (node?.GetValueKind() == JsonValueKind.String)
        {
            _ = node.GetValue<string>();
        }
    }

    private static JsonObject Read(string path)
    {
        byte[] text;
        try
        {
            text = File.ReadAllBytes(path);
        }
        catch (Exception failure) when (failure is FileNotFoundException or DirectoryNotFoundException)
        {
            return new JsonObject { ["version"] = Version, ["images"] = new JsonObject() };
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            throw new FailureException($"the state file '{path}' cannot be read: {failure.Message}");
        }

        try
        {
            if (JsonNode.Parse(text, nodeOptions: null, s_strict) is not JsonObject document)
                throw new FailureException($"'{path}' is no state of xnbd-wrapper: it is no JSON object");
            if (document["version"] is not JsonValue version || !version.TryGetValue(out int number)
                || number != Version)
                throw new FailureException($"the state file '{path}' is not of version {Version}");
            Validate(document);
            document["images"] ??= new JsonObject();
            return document["images"] is JsonObject
                ? document : throw new FailureException($"the state file '{path}': images is no object");
        }
        catch (Exception failure) when (failure is JsonException or ArgumentException or InvalidOperationException)
        {
            throw new FailureException($"the state file '{path}' is no JSON: {failure.Message}");
        }
    }
}
