using System.Text;
using System.Text.Json;
using System.Text.Json.Nodes;

namespace Xnbd.Control;

/// <summary>The messages of JSON-RPC 2.0 on the server's end: each is one line of JSON. Pure functions.</summary>
internal static class ControlMessage
{
    private const string Version = "2.0";

    private static readonly JsonDocumentOptions s_strict = new() { AllowDuplicateProperties = false };

    /// <summary>Reads a request.</summary>
    /// <param name="line">The line, without its end.</param>
    /// <param name="request">The request.</param>
    /// <param name="error">The answer to a line that is no request; null when it is one.</param>
    /// <returns>Whether the line is a request.</returns>
    public static bool TryParse(ReadOnlySpan<byte> line, out ControlRequest request, out byte[]? error)
    {
        request = default;
        error = null;
        try
        {
            if (JsonNode.Parse(line, nodeOptions: null, s_strict) is JsonObject message
                && IsText(message["jsonrpc"], out string? version) && version == Version
                && IsText(message["method"], out string? method)
                && message["params"] is null or JsonObject
                && IsId(message["id"]))
            {
                // Of an absent id and one that is null, only the absent one makes a notification.
                request = new ControlRequest(
                    method!,
                    message["params"] as JsonObject ?? [],
                    message["id"]?.DeepClone(),
                    !message.ContainsKey("id"));
                return true;
            }

            error = Error(null, ControlException.InvalidRequest, "no request of JSON-RPC 2.0 with named parameters");
        }
        catch (JsonException failure)
        {
            error = Error(null, ControlException.ParseError, failure.Message);
        }
        catch (InvalidOperationException)
        {
            error = Error(null, ControlException.ParseError, "the text is not valid Unicode");
        }

        return false;
    }

    /// <summary>The answer of a call that succeeded.</summary>
    public static byte[] Result(JsonNode? id, JsonNode? result)
        => Line(new JsonObject { ["jsonrpc"] = Version, ["id"] = id, ["result"] = result });

    /// <summary>The answer of a call that failed.</summary>
    public static byte[] Error(JsonNode? id, int code, string message) => Line(new JsonObject
    {
        ["jsonrpc"] = Version,
        ["id"] = id,
        ["error"] = new JsonObject { ["code"] = code, ["message"] = message },
    });

    private static bool IsId(JsonNode? node)
        => node is null || IsText(node, out _) || node.GetValueKind() == JsonValueKind.Number;

    private static bool IsText(JsonNode? node, out string? text)
    {
        text = null;
        return node is JsonValue value && value.TryGetValue(out text);
    }

    private static byte[] Line(JsonObject message) => Encoding.UTF8.GetBytes(message.ToJsonString() + "\n");
}

/// <summary>A request of a client.</summary>
/// <param name="Method">The method's name.</param>
/// <param name="Parameters">The parameters; empty if there are none.</param>
/// <param name="Id">Identifies the answer; may be null.</param>
/// <param name="IsNotification">The client wants no answer, not even to an error.</param>
internal readonly record struct ControlRequest(string Method, JsonObject Parameters, JsonNode? Id, bool IsNotification);
