using System.Text.Json.Nodes;
using Xnbd.Control;
using Xnbd.Programs.Serving;
using Xnbd.Server;
using Xnbd.Storage;

namespace Xnbd.Programs.Wrapper;

/// <summary>
/// The methods of the control channel of <c>xnbd-wrapper</c> (docs/control.md). A call that names an export goes to its
/// disk.
/// </summary>
internal sealed class WrapperMethods(WrapperExports exports, NbdServer server, Action<TimeSpan> shutDown)
{
    /// <summary>Carries out a method.</summary>
    /// <exception cref="ControlException">It failed; the message says why.</exception>
    public JsonNode? Call(string method, JsonObject parameters)
    {
        try
        {
            return method switch
            {
                "list" => exports.List(),
                "clients" when parameters["export"] is null => ClientsJson.Of(server.Clients),
                "add" => Add(parameters),
                "remove" => Remove(parameters),
                "save" => Save(),
                "reload" => Reload(),
                "shutdown" => ShutDown(parameters),
                "names-of" => new JsonArray([.. exports.NamesOf(Text(parameters, "file")).Select(n => (JsonNode)n)]),
                _ when parameters["export"] is null
                    => throw new ControlException(
                        ControlException.NoSuchMethod, $"there is no method '{method}' without an export"),
                _ => CallDisk(method, parameters),
            };
        }
        catch (Exception failure) when (failure is DiskException or FailureException)
        {
            throw new ControlException(ControlException.Failed, Advice.Describe(failure));
        }
    }

    private static string Text(JsonObject parameters, string name)
        => parameters[name]?.GetValue<string>()
            ?? throw new ControlException(ControlException.InvalidParameters, $"{name} is missing");

    /// <returns>How long clients may go on.</returns>
    private static TimeSpan Grace(JsonObject parameters) => parameters["grace-ms"]?.GetValue<long>() switch
    {
        null => TimeSpan.MaxValue,
        > int.MaxValue => TimeSpan.MaxValue,
        >= 0 and var milliseconds => TimeSpan.FromMilliseconds(milliseconds),
        _ => throw new ControlException(ControlException.InvalidParameters, "grace-ms is less than 0"),
    };

    private JsonObject Add(JsonObject parameters)
    {
        string name = Text(parameters, "name");
        if (parameters["definition"] is not JsonObject json)
            throw new ControlException(ControlException.InvalidParameters, "definition is missing");
        exports.Add(new ExportDefinition(name, json));
        return new JsonObject
        {
            ["name"] = name,
            ["uris"] = new JsonArray([.. server.UrisOf(name).Select(uri => (JsonNode)uri)]),
        };
    }

    private JsonObject Remove(JsonObject parameters)
    {
        string name = Text(parameters, "name");
        return new JsonObject { ["name"] = name, ["clients"] = exports.Remove(name, Grace(parameters)) };
    }

    private JsonObject Save()
    {
        exports.SaveNow();
        return [];
    }

    private JsonArray Reload() => [.. exports.Reload().Select(change => (JsonNode)change)];

    private JsonObject ShutDown(JsonObject parameters)
    {
        shutDown(Grace(parameters));
        return new JsonObject { ["clients"] = server.Clients.Count };
    }

    private JsonNode? CallDisk(string method, JsonObject parameters)
    {
        string name = Text(parameters, "export");
        JsonNode? answer = exports.Disk(name).Call(method, parameters);
        if (method == "reconnect" && parameters["host"] is not null)
        {
            List<(string, string?)> members =
                [("remote_host", Text(parameters, "host")), ("remote_port", Text(parameters, "port"))];
            if (parameters["export-name"]?.GetValue<string>() is { } remote)
                members.Add(("remote_export_name", remote));
            exports.Redefine(name, definition => definition.With([.. members]));
        }

        return answer;
    }
}
