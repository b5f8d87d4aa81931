using System.Net.Sockets;
using System.Text;
using System.Text.Json.Nodes;
using Xnbd.Linux;
using Xnbd.TestKit;

namespace Xnbd.Control.Tests;

/// <summary>
/// Server and client of the control channel over a real socket; raw clients send what no client should.
/// </summary>
public sealed class ControlChannelTests : IDisposable
{
    private static readonly TimeSpan s_time = TimeSpan.FromSeconds(10);

    private readonly TempFolder _folder = new();
    private readonly ManualResetEventSlim _gate = new(); // "wait" returns when it is set
    private int _waiting; // calls of "wait" that are under way
    private int _noted; // calls of "note" so far

    public void Dispose()
    {
        _gate.Set();
        _folder.Dispose();
    }

    private string SocketPath => _folder.File("control");

    [Fact]
    public void A_call_has_its_result()
    {
        using ControlServer server = Start();
        using var client = new ControlClient(SocketPath);
        Assert.Equal("text", (string?)client.Call("echo", new JsonObject { ["value"] = "text" }));
        Assert.Null(client.Call("echo"));
    }

    [Fact]
    public void A_failed_call_has_its_code_and_message_and_the_channel_goes_on()
    {
        using ControlServer server = Start();
        using var client = new ControlClient(SocketPath);
        ControlException failure = Assert.Throws<ControlException>(() => client.Call("fail"));
        Assert.Equal((ControlException.Failed, "it failed"), (failure.Code, failure.Message));
        failure = Assert.Throws<ControlException>(() => client.Call("break"));
        Assert.Equal((ControlException.Failed, "out of order"), (failure.Code, failure.Message));
        Assert.Equal(ControlException.NoSuchMethod, Assert.Throws<ControlException>(() => client.Call("nothing")).Code);
        Assert.Equal(1, (int?)client.Call("echo", new JsonObject { ["value"] = 1 }));
    }

    [Theory]
    [InlineData("hello", ControlException.ParseError)]
    [InlineData("", ControlException.ParseError)]
    [InlineData("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"echo\"", ControlException.ParseError)]
    [InlineData("{\"jsonrpc\":\"2.0\",\"id\":1,\"id\":2,\"method\":\"echo\"}", ControlException.ParseError)]
    [InlineData("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"\\ud800\"}", ControlException.ParseError)]
    [InlineData("{\"jsonrpc\":\"2.0\",\"id\":\"\\ud800\",\"method\":\"echo\"}", ControlException.ParseError)]
    [InlineData("[]", ControlException.InvalidRequest)]
    [InlineData("null", ControlException.InvalidRequest)]
    [InlineData("7", ControlException.InvalidRequest)]
    [InlineData("{}", ControlException.InvalidRequest)]
    [InlineData("{\"jsonrpc\":\"1.0\",\"id\":1,\"method\":\"echo\"}", ControlException.InvalidRequest)]
    [InlineData("{\"jsonrpc\":2.0,\"id\":1,\"method\":\"echo\"}", ControlException.InvalidRequest)]
    [InlineData("{\"jsonrpc\":\"2.0\",\"id\":1}", ControlException.InvalidRequest)]
    [InlineData("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":7}", ControlException.InvalidRequest)]
    [InlineData("{\"jsonrpc\":\"2.0\",\"id\":{},\"method\":\"echo\"}", ControlException.InvalidRequest)]
    [InlineData("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"echo\",\"params\":[1]}", ControlException.InvalidRequest)]
    public void A_line_that_is_no_request_has_an_error_and_the_connection_goes_on(string line, int code)
    {
        using ControlServer server = Start();
        using var client = new RawClient(SocketPath);
        client.SendLine(line);
        JsonObject answer = client.ReceiveAnswer();
        Assert.Equal(code, (int?)answer["error"]!["code"]);
        Assert.True(answer.ContainsKey("id") && answer["id"] is null, "an answer to no request has the id null");
        client.SendLine(Request(5, "echo"));
        Assert.Equal(5, (int?)client.ReceiveAnswer()["id"]);
    }

    /// <summary>Objects within objects, and bytes that are no text.</summary>
    [Fact]
    public void Deep_or_broken_text_is_no_json()
    {
        using ControlServer server = Start();
        using var client = new RawClient(SocketPath);
        client.SendLine(string.Concat(Enumerable.Repeat("{\"a\":", 5000)));
        Assert.Equal(ControlException.ParseError, (int?)client.ReceiveAnswer()["error"]!["code"]);
        client.Send([.. "{\"jsonrpc\":\"2.0\",\"id\":\""u8, 0xff, 0xfe, .. "\",\"method\":\"echo\"}\n"u8]);
        Assert.Equal(ControlException.ParseError, (int?)client.ReceiveAnswer()["error"]!["code"]);
    }

    [Fact]
    public void Wrong_parameters_have_their_code()
    {
        using ControlServer server = Start();
        using var client = new RawClient(SocketPath);
        foreach (string value in (string[])["\"seven\"", "{}", "[]", "true", "1.5", "99999999999", "\"\\ud800\""])
        {
            client.SendLine($"{{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"number\",\"params\":{{\"value\":{value}}}}}");
            Assert.Equal(ControlException.InvalidParameters, (int?)client.ReceiveAnswer()["error"]!["code"]);
        }
    }

    [Fact]
    public void A_line_that_is_too_long_ends_the_connection()
    {
        using ControlServer server = Start();
        using var client = new RawClient(SocketPath);
        client.Send(Encoding.UTF8.GetBytes(new string(' ', ControlServer.MaxLine)));
        Assert.Equal(ControlException.InvalidRequest, (int?)client.ReceiveAnswer()["error"]!["code"]);
        Assert.True(client.IsEnded());
        Works();
    }

    [Fact]
    public void A_line_of_the_greatest_length_is_answered()
    {
        using ControlServer server = Start();
        using var client = new RawClient(SocketPath);
        client.SendLine(Request(1, "echo").PadRight(ControlServer.MaxLine - 1));
        Assert.Equal(1, (int?)client.ReceiveAnswer()["id"]);
    }

    [Fact]
    public void Requests_of_one_connection_are_answered_in_order_however_they_are_cut()
    {
        using ControlServer server = Start();
        using var client = new RawClient(SocketPath);
        byte[] lines = Encoding.UTF8.GetBytes(
            string.Concat(Enumerable.Range(0, 50).Select(i => Request(i, "echo") + "\n")));
        for (int at = 0; at < lines.Length; at += 37)
            client.Send(lines.AsSpan(at, Math.Min(37, lines.Length - at)));
        for (int i = 0; i < 50; i++)
            Assert.Equal(i, (int?)client.ReceiveAnswer()["id"]);
    }

    [Fact]
    public void An_id_may_be_a_number_a_text_or_null()
    {
        using ControlServer server = Start();
        using var client = new RawClient(SocketPath);
        foreach (string id in (string[])["7", "\"seven\"", "null", "1.5"])
        {
            client.SendLine($"{{\"jsonrpc\":\"2.0\",\"id\":{id},\"method\":\"echo\"}}");
            JsonObject answer = client.ReceiveAnswer();
            Assert.Equal(id, answer["id"]?.ToJsonString() ?? "null");
            Assert.True(answer.ContainsKey("result"));
        }
    }

    [Theory]
    [InlineData("note")]
    [InlineData("fail")]
    [InlineData("break")]
    [InlineData("nothing")]
    public void A_notification_is_carried_out_and_has_no_answer(string method)
    {
        using ControlServer server = Start();
        using var client = new RawClient(SocketPath);
        client.SendLine($"{{\"jsonrpc\":\"2.0\",\"method\":\"{method}\"}}");
        client.SendLine(Request(1, "note"));
        Assert.Equal(1, (int?)client.ReceiveAnswer()["id"]);
        Assert.Equal(method == "note" ? 2 : 1, Volatile.Read(ref _noted));
    }

    [Fact]
    public void A_call_holds_up_no_other_connection()
    {
        using ControlServer server = Start();
        using var client = new RawClient(SocketPath);
        client.SendLine(Request(1, "wait"));
        WaitFor(() => Volatile.Read(ref _waiting) == 1);
        Works();
        _gate.Set();
        Assert.Equal(1, (int?)client.ReceiveAnswer()["id"]);
    }

    [Fact]
    public void Silent_clients_make_room_and_one_whose_call_is_under_way_does_not()
    {
        using ControlServer server = Start();
        using var busy = new RawClient(SocketPath);
        busy.SendLine(Request(1, "wait"));
        WaitFor(() => Volatile.Read(ref _waiting) == 1);
        var silent = new List<RawClient>();
        for (int i = 0; i < 3 * ControlServer.MaxClients; i++)
            silent.Add(new RawClient(SocketPath));
        Works();
        Assert.True(silent[0].IsEnded());
        _gate.Set();
        Assert.Equal(1, (int?)busy.ReceiveAnswer()["id"]);
        silent.ForEach(client => client.Dispose());
    }

    [Fact]
    public void Silent_clients_push_out_each_other_and_no_client_that_works()
    {
        int accepted = 0;
        using ControlServer server = ControlServer.Start(SocketPath, Call, (name, work) =>
        {
            if (name == "control client")
                Interlocked.Increment(ref accepted);
            return LinuxThread.TryStart(name, work) is not null;
        });
        using var working = new ControlClient(SocketPath);
        var silent = new List<RawClient>();
        for (int i = 1; i <= 40; i++)
        {
            silent.Add(new RawClient(SocketPath));
            WaitFor(() => Volatile.Read(ref accepted) == 1 + i);
            if (i % 5 == 0)
                working.Call("echo");
        }

        Assert.All(silent[..^(ControlServer.MaxClients - 1)], client => Assert.True(client.IsEnded()));
        silent[^1].SendLine(Request(1, "echo"));
        Assert.Equal(1, (int?)silent[^1].ReceiveAnswer()["id"]);
        silent.ForEach(client => client.Dispose());
    }

    /// <summary>
    /// A client is accepted while the threads of those that were pushed out have not ended: it waits for one of them.
    /// </summary>
    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void A_client_that_waits_for_a_thread_is_answered_or_told_that_the_server_ends(bool ends)
    {
        using var hold = new ManualResetEventSlim();
        using ControlServer server = ControlServer.Start(SocketPath, Call, (name, work) =>
            LinuxThread.TryStart(name, () =>
            {
                if (name == "control client")
                    hold.Wait(s_time);
                work();
            }) is not null);
        var clients = new List<RawClient>();
        for (int i = 0; i <= ControlServer.MaxThreads; i++)
            clients.Add(new RawClient(SocketPath));
        Assert.True(clients[ControlServer.MaxClients].IsEnded()); // the last one has pushed it out, and waits
        if (ends)
        {
            Task ending = Task.Run(server.Dispose);
            JsonObject answer = clients[^1].ReceiveAnswer();
            Assert.Equal("the server is ending", (string?)answer["error"]!["message"]);
            Assert.True(ending.Wait(s_time));
            hold.Set();
        }
        else
        {
            hold.Set();
            clients[^1].SendLine(Request(1, "echo"));
            Assert.Equal(1, (int?)clients[^1].ReceiveAnswer()["id"]);
        }

        clients.ForEach(client => client.Dispose());
    }

    [Fact]
    public void Many_clients_at_once_are_all_answered()
    {
        using ControlServer server = Start();
        Parallel.For(0, 200, new ParallelOptions { MaxDegreeOfParallelism = ControlServer.MaxClients }, i =>
        {
            using var client = new ControlClient(SocketPath);
            Assert.Equal(i, (int?)client.Call("echo", new JsonObject { ["value"] = i }));
        });
    }

    /// <summary>
    /// Clients that leave during their calls keep threads; their number is bounded, and the channel recovers.
    /// </summary>
    [Fact]
    public void Calls_whose_clients_have_left_do_not_fill_the_process_with_threads()
    {
        int threads = 0, peak = 0;
        using ControlServer server = ControlServer.Start(SocketPath, Call, (name, work) =>
            LinuxThread.TryStart(name, () =>
            {
                int now = Interlocked.Increment(ref threads);
                InterlockedMax(ref peak, now);
                work();
                Interlocked.Decrement(ref threads);
            }) is not null);
        for (int i = 0; i < 3 * ControlServer.MaxThreads; i++)
        {
            using var client = new RawClient(SocketPath);
            client.TrySendLine(Request(i, "wait"));
            if (i < ControlServer.MaxThreads)
                WaitFor(() => Volatile.Read(ref _waiting) == i + 1);
            else
                Assert.Equal("too many calls are under way", (string?)client.ReceiveAnswer()["error"]!["message"]);
        }

        Assert.Equal(ControlServer.MaxThreads + 1, Volatile.Read(ref peak)); // with that which accepts
        _gate.Set();
        WaitFor(() => Volatile.Read(ref threads) == 1);
        Works();
    }

    [Fact]
    public void Too_many_calls_are_refused_with_a_reason()
    {
        using ControlServer server = Start();
        var clients = new List<RawClient>();
        while (Volatile.Read(ref _waiting) < ControlServer.MaxThreads)
        {
            int before = Volatile.Read(ref _waiting);
            clients.Add(new RawClient(SocketPath));
            clients[^1].SendLine(Request(1, "wait"));
            WaitFor(() => Volatile.Read(ref _waiting) > before);
        }

        using var refused = new RawClient(SocketPath);
        JsonObject answer = refused.ReceiveAnswer();
        Assert.Equal("too many calls are under way", (string?)answer["error"]!["message"]);
        Assert.True(refused.IsEnded());
        _gate.Set();
        WaitFor(() => Volatile.Read(ref _waiting) == 0);
        Works();
        clients.ForEach(client => client.Dispose());
    }

    [Fact]
    public void Without_a_thread_to_spare_clients_are_served_one_after_the_other()
    {
        using ControlServer server = ControlServer.Start(
            SocketPath, Call, (name, work) => name == "control" && LinuxThread.TryStart(name, work) is not null);
        using var silent = new RawClient(SocketPath); // it has to leave after a second
        Parallel.For(0, 8, i =>
        {
            using var client = new ControlClient(SocketPath);
            Assert.Equal(i, (int?)client.Call("echo", new JsonObject { ["value"] = i }));
        });
        Assert.True(silent.IsEnded());
    }

    [Fact]
    public async Task Without_a_thread_to_spare_a_client_that_sends_single_bytes_keeps_nobody_waiting()
    {
        using ControlServer server = ControlServer.Start(
            SocketPath, Call, (name, work) => name == "control" && LinuxThread.TryStart(name, work) is not null);
        using var dripping = new RawClient(SocketPath);
        using var ended = new CancellationTokenSource();
        int sent = 0;
        Task drip = Task.Run(async () =>
        {
            for (bool isOpen = true; isOpen && !ended.IsCancellationRequested; sent++)
            {
                isOpen = dripping.TrySend("x"u8); // each byte comes before the server has waited long enough
                await Task.Delay(50);
            }
        });
        WaitFor(() => Volatile.Read(ref sent) > 2);
        Task served = Task.Run(Works);
        bool isServed = await Task.WhenAny(served, Task.Delay(s_time)) == served;
        await ended.CancelAsync();
        await drip;
        await served;
        Assert.True(isServed, "the other client waits as long as bytes are sent");
    }

    [Fact]
    public void Without_any_thread_it_does_not_start_and_leaves_no_socket()
    {
        Assert.Throws<IOException>(() => ControlServer.Start(SocketPath, Call, (_, _) => false));
        Assert.False(File.Exists(SocketPath));
    }

    [Fact]
    public void The_end_waits_for_a_call_answers_it_and_removes_the_socket()
    {
        ControlServer server = Start();
        using var client = new RawClient(SocketPath);
        client.SendLine(Request(1, "wait"));
        WaitFor(() => Volatile.Read(ref _waiting) == 1);
        Task end = Task.Run(server.Dispose);
        WaitFor(() => !File.Exists(SocketPath));
        Assert.False(end.IsCompleted);
        _gate.Set();
        Assert.True(end.Wait(s_time));
        Assert.Equal(0, Volatile.Read(ref _waiting));
        Assert.Equal(1, (int?)client.ReceiveAnswer()["id"]);
        Assert.True(client.IsEnded());
        Assert.Throws<SocketException>(() => new ControlClient(SocketPath));
    }

    [Fact]
    public void The_end_does_not_wait_for_ever()
    {
        ControlServer server = Start();
        using var client = new RawClient(SocketPath);
        client.SendLine(Request(1, "wait"));
        WaitFor(() => Volatile.Read(ref _waiting) == 1);
        Assert.True(Task.Run(server.Dispose).Wait(s_time));
    }

    [Fact]
    public void A_client_learns_that_the_server_has_gone()
    {
        ControlServer server = Start();
        using var client = new ControlClient(SocketPath);
        client.Call("echo");
        server.Dispose();
        Assert.Throws<IOException>(() => client.Call("echo"));
    }

    [Fact]
    public void The_socket_is_its_owners()
    {
        using ControlServer server = Start();
        Assert.Equal(UnixFileMode.UserRead | UnixFileMode.UserWrite, File.GetUnixFileMode(SocketPath));
    }

    [Fact]
    public void A_socket_in_use_is_left_alone()
    {
        using ControlServer server = Start();
        IOException failure = Assert.Throws<IOException>(Start);
        Assert.Equal("another process listens there", failure.Message);
        Works();
    }

    [Fact]
    public void A_socket_that_a_killed_process_left_is_replaced()
    {
        using (var killed = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified))
        {
            killed.Bind(new UnixDomainSocketEndPoint(SocketPath));
            killed.Listen();
            File.Move(SocketPath, SocketPath + ".kept"); // the BCL removes the file of a socket that it closes
        }

        File.Move(SocketPath + ".kept", SocketPath);
        using ControlServer server = Start();
        Works();
    }

    [Fact]
    public void A_file_that_is_no_socket_stays()
    {
        File.WriteAllText(SocketPath, "important");
        Assert.Throws<IOException>(Start);
        Assert.Equal("important", File.ReadAllText(SocketPath));
    }

    [Fact]
    public void A_path_that_is_too_long_is_refused()
        => Assert.Throws<ArgumentException>(() => ControlServer.Start(_folder.File(new string('x', 200)), Call));

    private ControlServer Start() => ControlServer.Start(SocketPath, Call);

    private void Works()
    {
        using var client = new ControlClient(SocketPath);
        Assert.Equal("well", (string?)client.Call("echo", new JsonObject { ["value"] = "well" }));
    }

    private JsonNode? Call(string method, JsonObject parameters)
    {
        switch (method)
        {
            case "echo":
                return parameters["value"]?.DeepClone();
            case "number":
                return parameters["value"]!.GetValue<int>();
            case "note":
                return Interlocked.Increment(ref _noted);
            case "wait":
                Interlocked.Increment(ref _waiting);
                _gate.Wait();
                Interlocked.Decrement(ref _waiting);
                return null;
            case "fail":
                throw new ControlException(ControlException.Failed, "it failed");
            case "break":
                throw new NotSupportedException("out of order");
            default:
                throw new ControlException(ControlException.NoSuchMethod, $"there is no method '{method}'");
        }
    }

    private static string Request(int id, string method)
        => $"{{\"jsonrpc\":\"2.0\",\"id\":{id},\"method\":\"{method}\"}}";

    private static void WaitFor(Func<bool> condition)
        => Assert.True(SpinWait.SpinUntil(condition, s_time), "it did not come to that in time");

    private static void InterlockedMax(ref int place, int value)
    {
        int seen;
        while ((seen = Volatile.Read(ref place)) < value && Interlocked.CompareExchange(ref place, value, seen) != seen)
        {
        }
    }

    /// <summary>A client that sends any bytes.</summary>
    private sealed class RawClient : IDisposable
    {
        private readonly Socket _socket = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        private readonly StreamReader _reader;

        public RawClient(string path)
        {
            _socket.Connect(new UnixDomainSocketEndPoint(path));
            _socket.ReceiveTimeout = (int)s_time.TotalMilliseconds;
            _reader = new StreamReader(new NetworkStream(_socket));
        }

        public void Send(ReadOnlySpan<byte> bytes) => _socket.Send(bytes);

        public void SendLine(string line) => Send(Encoding.UTF8.GetBytes(line + "\n"));

        public void TrySendLine(string line) => TrySend(Encoding.UTF8.GetBytes(line + "\n"));

        /// <returns>False when the client was refused, or has to leave.</returns>
        public bool TrySend(ReadOnlySpan<byte> bytes)
        {
            try
            {
                Send(bytes);
                return true;
            }
            catch (SocketException)
            {
                return false;
            }
        }

        public JsonObject ReceiveAnswer()
            => JsonNode.Parse(_reader.ReadLine() ?? throw new IOException("no answer"))!.AsObject();

        /// <summary>Waits for the end of the connection.</summary>
        public bool IsEnded()
        {
            try
            {
                return _reader.ReadLine() is null;
            }
            catch (IOException failure)
                when (failure.InnerException is SocketException { SocketErrorCode: SocketError.ConnectionReset })
            {
                return true;
            }
        }

        public void Dispose()
        {
            _reader.Dispose();
            _socket.Dispose();
        }
    }
}
