using Xnbd.Linux;
using Xnbd.Storage.Threads;

namespace Xnbd.Server;

/// <summary>What all sessions of an export share.</summary>
/// <param name="Buffers">For requests and replies.</param>
/// <param name="Budget">The export's share of what is in flight.</param>
/// <param name="Failures">Logs requests that failed.</param>
/// <param name="Time">Tells how long clients let others wait.</param>
/// <param name="Stopping">Signalled, once and for all, when these sessions are to end.</param>
internal sealed record SessionServices(
    BufferPool Buffers, RequestBudget Budget, FailureLog Failures, TimeProvider Time, LinuxEvent Stopping);
