using Xnbd.Protocol;
using Xnbd.Storage;

namespace Xnbd.Server;

/// <summary>
/// Builds the replies of requests whose disk operation has ended. It is used by whichever thread completes the
/// operation, also by several at the same time, and has no state of its own.
/// </summary>
/// <param name="agreement">What the handshake agreed on; it determines the form of replies.</param>
/// <param name="failures">Logs requests that failed.</param>
/// <param name="peer">The client's name for the log.</param>
internal sealed class ReplyBuilder(Agreement agreement, FailureLog failures, string peer)
{
    /// <summary>
    /// Builds the reply of a pending request whose disk operation has ended, or an error if it has failed.
    /// </summary>
    public void Build(PendingRequest pending)
    {
        NbdRequest request = pending.Request;
        try
        {
            pending.GetResult();
            switch (request.Command)
            {
                case NbdCommand.Read:
                    BuildRead(pending);
                    break;
                case NbdCommand.BlockStatus:
                    BuildBlockStatus(pending);
                    break;
                default:
                    pending.ReplySmall(NbdReply.WriteSimple(pending.SmallReply, NbdError.None, request.Cookie));
                    break;
            }
        }
        catch (OperationCanceledException)
        {
            // The client is gone, and nothing is sent to it any more.
            pending.ReplySmall(WriteError(pending.SmallReply, request, NbdError.Shutdown, "the client is gone"));
        }
        catch (Exception failure)
        {
            NbdError error = LogFailure(request, failure);
            pending.ReplySmall(WriteError(pending.SmallReply, request, error, ErrorMap.Describe(error)));
        }
    }

    private void BuildRead(PendingRequest pending)
    {
        NbdRequest request = pending.Request;
        int length = (int)request.Length, headers = ReadChunks.HeaderRoom(length);
        Span<byte> buffer = pending.Buffer!.GetSpan();
        if (!agreement.StructuredReplies)
        {
            int start = headers - NbdSize.SimpleReply;
            NbdReply.WriteSimple(buffer[start..], NbdError.None, request.Cookie);
            pending.ReplyFromBuffer(start, NbdSize.SimpleReply + length);
            return;
        }

        bool mayCut = (request.Flags & NbdCommandFlags.Df) == 0;
        (int at, int all) = ReadChunks.Write(
            buffer, headers, length, request.Offset, request.Cookie, mayCut, isLast: true);
        pending.ReplyFromBuffer(at, all);
    }

    /// <summary>Builds one chunk for each context; in it, neighbours of equal status are one extent.</summary>
    private void BuildBlockStatus(PendingRequest pending)
    {
        Span<byte> buffer = pending.Buffer!.GetSpan();
        int at = 0;
        for (MetaContexts left = agreement.Contexts; left != MetaContexts.None;)
        {
            MetaContexts context = left & ~(left - 1); // the lowest bit
            left &= ~context;
            int chunk = at, count = 0;
            at += NbdReply.BlockStatusLength(0);
            uint lastStatus = 0, lastLength = 0;
            foreach (Extent extent in pending.Extents!.Extents)
            {
                uint status = context == MetaContexts.AllocationDepth ? (uint)extent.Depth
                    : (uint)(extent.IsHole ? NbdAllocation.Hole | NbdAllocation.Zero : NbdAllocation.Data);
                bool joins = count > 0 && status == lastStatus;
                lastLength = (uint)extent.Length + (joins ? lastLength : 0);
                lastStatus = status;
                if (joins)
                    at -= NbdReply.ExtentLength;
                else
                    count++;
                at += NbdReply.WriteExtent(buffer[at..], lastLength, status);
            }

            NbdChunkFlags flags = left == MetaContexts.None ? NbdChunkFlags.Done : NbdChunkFlags.None;
            NbdReply.WriteBlockStatus(buffer[chunk..], flags, pending.Request.Cookie, (uint)context, count);
        }

        pending.ReplyFromBuffer(0, at);
    }

    /// <summary>Writes an error, in the form that was agreed on.</summary>
    /// <param name="destination">At least <see cref="NbdReply.MaxErrorChunk"/> bytes.</param>
    /// <param name="request">The request that failed.</param>
    /// <param name="error">The error for the client.</param>
    /// <param name="message">The message for people.</param>
    /// <returns>Bytes written.</returns>
    public int WriteError(Span<byte> destination, in NbdRequest request, NbdError error, string message)
        => agreement.StructuredReplies
            ? NbdReply.WriteErrorChunk(destination, request.Cookie, error, message)
            : NbdReply.WriteSimple(destination, error, request.Cookie);

    /// <summary>Logs why a request failed.</summary>
    /// <returns>The error for the client.</returns>
    public NbdError LogFailure(in NbdRequest request, Exception failure)
    {
        if (failure is DiskException { Error: DiskError.NotSupported })
            return NbdError.NotSupported; // the usual answer to a fast zero: nothing went wrong
        failures.Log(peer, request.Command, failure.Message);
        return failure is DiskException known ? ErrorMap.ToNbd(known.Error) : NbdError.Io;
    }
}
