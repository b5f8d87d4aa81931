using Xnbd.Protocol;

namespace Xnbd.Server;

/// <summary>What makes a request valid. It is checked once, before anything is done (sections "Command flags", "Request
/// types" and "Error values").</summary>
internal static class RequestRules
{
    /// <summary>Validates a request.</summary>
    /// <param name="request">The request.</param>
    /// <param name="agreement">What the handshake agreed on.</param>
    /// <param name="message">For people, when there is an error.</param>
    /// <returns><see cref="NbdError.None"/> when it may be carried out.</returns>
    public static NbdError Validate(in NbdRequest request, Agreement agreement, out string message)
    {
        NbdCommandFlags allowed = NbdCommandFlags.Fua | request.Command switch
        {
            NbdCommand.Read when agreement.StructuredReplies => NbdCommandFlags.Df,
            NbdCommand.WriteZeroes => NbdCommandFlags.NoHole | NbdCommandFlags.FastZero,
            NbdCommand.BlockStatus => NbdCommandFlags.ReqOne,
            _ => NbdCommandFlags.None,
        };
        bool isKnown = request.Command is NbdCommand.Read or NbdCommand.Write or NbdCommand.Flush or NbdCommand.Trim
            or NbdCommand.Cache or NbdCommand.WriteZeroes or NbdCommand.BlockStatus;
        if (!isKnown)
        {
            message = "unknown command";
            return NbdError.Invalid;
        }

        if ((request.Flags & ~allowed) != 0)
        {
            message = "flags that this command does not have";
            return NbdError.Invalid;
        }

        if (request.Command == NbdCommand.Flush)
        {
            message = "";
            return NbdError.None; // offset and length are reserved
        }

        bool changes = request.Command is NbdCommand.Write or NbdCommand.WriteZeroes or NbdCommand.Trim;
        if (changes && agreement.Export.IsReadOnly)
        {
            message = "this export is read-only";
            return NbdError.Permission;
        }

        bool hasPayload = request.Command is NbdCommand.Read or NbdCommand.Write;
        if (hasPayload && request.Length > ServerLimits.MaxPayload)
        {
            message = "more than the maximum payload";
            return request.Command == NbdCommand.Read ? NbdError.Overflow : NbdError.Invalid;
        }

        ulong size = (ulong)agreement.Export.Disk.Length;
        if (request.Offset > size || request.Length > size - request.Offset)
        {
            message = "beyond the end of the export";
            return request.Command is NbdCommand.Write or NbdCommand.WriteZeroes ? NbdError.NoSpace : NbdError.Invalid;
        }

        bool hasContexts = agreement.Contexts != MetaContexts.None;
        if (request.Command == NbdCommand.BlockStatus && (!hasContexts || request.Length == 0))
        {
            message = hasContexts ? "block status of nothing" : "no metadata context was negotiated";
            return NbdError.Invalid;
        }

        message = "";
        return NbdError.None;
    }
}
