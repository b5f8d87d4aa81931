using System.Text;
using System.Text.Json.Nodes;
using Xnbd.Control;
using Xnbd.Protocol;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>Many disks behind one address: <c>xnbd-wrapper</c> and <c>xnbd-wrapper-ctl</c>.</summary>
public sealed class WrapperTests : IDisposable
{
    private readonly TempFolder _folder = new();
    private readonly string _image;

    public WrapperTests() => _image = _folder.Random("disk.img", 1 << 20);

    public void Dispose() => _folder.Dispose();

    [Fact]
    public async Task Exports_of_all_modes_are_added_listed_and_found_by_name()
    {
        string gold = _folder.Random("gold.img", 1 << 20, seed: 2);
        string port = ServerProcess.FreePort().ToString(System.Globalization.CultureInfo.InvariantCulture);
        using var wrapper = new WrapperProcess(
            _folder, "--imgfile", gold, "--readonly", "--lport", port, "--default-export", "disk");
        await wrapper.Do("--add-target", "disk", _image);
        await wrapper.Do("--add-cow", "pc 1", _image);
        await wrapper.Do(
            "--add-proxy", "px", "localhost", port, _folder.File("cache"), _folder.File("map"), _folder.File("px.ctl"),
            "--target-exportname", "disk");
        string uris = (await wrapper.Do("--add-cow", "pc/ü", _image)).Trim();
        Assert.Contains($":{port}/pc%2F%C3%BC", uris, StringComparison.Ordinal);
        Assert.Contains("size", await Tool.Succeed("nbdinfo", uris.Split('\n')[0]), StringComparison.Ordinal);
        string listed = await Tool.Succeed("nbdinfo", "--list", $"nbd://localhost:{port}");
        foreach (string name in (string[])[gold, "disk", "pc 1", "px"])
            Assert.Contains($"export=\"{name}\":", listed, StringComparison.Ordinal);
        using NbdTestClient byDefault = wrapper.Open(""), proxied = wrapper.Open("px"), own = wrapper.Open(gold);
        byte[] start = File.ReadAllBytes(_image)[..4096];
        Assert.Equal(start, byDefault.Read(0, 4096));
        Assert.Equal(start, proxied.Read(0, 4096));
        Assert.Equal(NbdError.Permission, own.Write(0, new byte[512])); // --readonly
        Dictionary<string, JsonNode> list = await wrapper.List();
        Assert.Equal(["target", "target", "cow-target", "proxy", "cow-target"],
            list.Values.Select(entry => entry["mode"]!.GetValue<string>()));
        Assert.Equal(4096, list["px"]["read-bytes"]!.GetValue<long>());
        string table = await wrapper.Do("-l");
        Assert.Matches(@"px +proxy +\S+cache +1 MiB +1 +4 KiB +0 bytes +served, \d+\.\d % cached", table);
        Assert.Contains("px", await wrapper.Do("--clients"), StringComparison.Ordinal);
        Assert.Equal(0, wrapper.Server.Stop());
        IEnumerable<string> images = Directory.GetFiles(_folder.Path, "*.img*").Select(path => Path.GetFileName(path));
        Assert.Equal(["disk.img", "gold.img"], images.Order()); // the layers are gone
    }

    [Fact]
    public void Without_a_default_export_an_empty_name_is_refused_with_the_reason()
    {
        using var wrapper = new WrapperProcess(_folder, "--imgfile", _image);
        using (NbdTestClient unnamed = NbdTestClient.Connect(wrapper.Server.SocketPath))
        {
            unnamed.Start();
            OptionReply reply = Assert.Single(unnamed.Ask(NbdOption.Go, NbdTestClient.InfoQuery("")));
            Assert.Equal(NbdOptionReplyType.ErrUnknown, reply.Type);
            Assert.Contains("no default export", Encoding.UTF8.GetString(reply.Data), StringComparison.Ordinal);
        }

        using NbdTestClient named = wrapper.Open(_image);
        Assert.Equal(1UL << 20, named.Size);
    }

    [Fact]
    public async Task What_was_added_is_there_after_a_kill_and_what_came_from_the_command_line_is_not()
    {
        string other = _folder.Random("other.img", 4096);
        using (var wrapper = new WrapperProcess(_folder, "--imgfile", other))
        {
            await wrapper.Do("--add-target", "a", _image);
            string gold = _folder.Random("gold.img", 4096);
            await wrapper.Do("--add-cow", "b", gold, "--layer", _folder.File("b.layer"));
            File.Delete(gold);
            Assert.Equal(1, (await wrapper.Try("--add-cow", "c", "/nonexistent")).ExitCode);
            wrapper.Server.Kill();
        }

        using var second = new WrapperProcess(_folder);
        Dictionary<string, JsonNode> list = await second.List();
        Assert.Equal(["a", "b"], list.Keys.Order());
        Assert.Equal("served", list["a"]["state"]!.GetValue<string>());
        Assert.Contains("No such file", list["b"]["problem"]!.GetValue<string>(), StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_state_file_of_the_original_is_loaded_and_what_is_unknown_or_broken_in_it_is_kept()
    {
        string state = _folder.File("w.state");
        File.WriteAllText(
            state,
            $$"""
            {
                "images": {
                    "PROXY_PLAIN": {
                        "bitmap_path": "/nonexistent/BITMAP",
                        "control_socket_path": "/nonexistent/CONTROL",
                        "image_path": "/nonexistent/CACHE",
                        "mode": "proxy",
                        "remote_export_name": null,
                        "remote_host": "127.0.0.1",
                        "remote_port": "1"
                    },
                    "NUL": { "mode": "target", "image_path": "/x\u0000y" },
                    "STRANGE": { "mode": "tape", "reel": 7 },
                    "TARGET": {
                        "image_path": "{{_image}}",
                        "mode": "target",
                        "colour": "blue"
                    },
                    "TEXT": "x"
                },
                "made_by": ["somebody"],
                "version": 2
            }
            """);
        using var wrapper = new WrapperProcess(_folder);
        using NbdTestClient client = wrapper.Open("TARGET");
        Assert.Equal(1UL << 20, client.Size);
        Dictionary<string, JsonNode> list = await wrapper.List();
        string problem = list["STRANGE"]["problem"]!.GetValue<string>();
        Assert.Contains("mode 'tape' is unknown", problem, StringComparison.Ordinal);
        Assert.Contains("'STRANGE' of the state file", wrapper.Server.Log, StringComparison.Ordinal);
        Assert.Contains("NUL character", list["NUL"]["problem"]!.GetValue<string>(), StringComparison.Ordinal);
        await wrapper.Do("--reload");
        await wrapper.Do("--add-target", "new", _folder.Random("new.img", 512));
        JsonNode saved = JsonNode.Parse(File.ReadAllText(state))!;
        Assert.Equal("blue", saved["images"]!["TARGET"]!["colour"]!.GetValue<string>());
        Assert.Equal(7, saved["images"]!["STRANGE"]!["reel"]!.GetValue<int>());
        Assert.Equal("x", saved["images"]!["TEXT"]!.GetValue<string>());
        Assert.Equal("somebody", saved["made_by"]![0]!.GetValue<string>());
        Assert.Equal(6, saved["images"]!.AsObject().Count);
        await wrapper.Do("--remove-by-exportname", "STRANGE");
        Assert.Equal(5, JsonNode.Parse(File.ReadAllText(state))!["images"]!.AsObject().Count);
    }

    [Theory]
    [InlineData("no JSON", "is no JSON")]
    [InlineData("""{"version": 3, "images": {}}""", "is not of version 2")]
    [InlineData("""{"version": 2, "images": []}""", "images is no object")]
    [InlineData("""{"version": 2, "images": {"a": {}, "a": {}}}""", "is no JSON")]
    [InlineData("""{"version": 2, "images": {"a": {"mode": "target", "x": "\ud800"}}}""", "is no JSON")]
    [InlineData("""{"version": 2, "images": {"\ud800": {}}}""", "is no JSON")]
    public async Task A_file_that_is_no_state_is_left_alone(string text, string reason)
    {
        File.WriteAllText(_folder.File("w.state"), text);
        ToolResult result = await Tool.Run(
            WrapperProcess.Program,
            ["--unix", _folder.File("s"), "--socket", _folder.File("c"), "--dbpath", _folder.File("w.state")]);
        Assert.Equal(1, result.ExitCode);
        Assert.Contains(reason, result.Errors, StringComparison.Ordinal);
        Assert.Equal(text, File.ReadAllText(_folder.File("w.state")));
    }

    [Fact]
    public async Task Exports_do_not_write_to_one_file_whatever_its_name()
    {
        using var wrapper = new WrapperProcess(_folder);
        await wrapper.Do("--add-target", "a", _image);
        string link = _folder.File("link.img"), hard = _folder.File("hard.img"), cow = _folder.Random("base.img", 4096);
        File.CreateSymbolicLink(link, _image);
        await Tool.Succeed("ln", _image, hard);
        foreach (string name in (string[])[_image, link, hard])
        {
            await wrapper.Refuse("is written by the export 'a'", "--add-target", "b", name);
            await wrapper.Refuse("is written by the export 'a'", "--add-target", "b", name, "--readonly");
            await wrapper.Refuse("is written by the export 'a'", "--add-cow", "b", name);
            await wrapper.Refuse("is written by the export 'a'", "--add-cow", "b", cow, "--layer", name);
            string[] proxy = ["--add-proxy", "b", "h", "1", _folder.File("c"), name, _folder.File("x")];
            await wrapper.Refuse("is written by the export 'a'", proxy);
        }

        await wrapper.Refuse(
            "are one file", "--add-proxy", "b", "h", "1", _folder.File("c"), _folder.File("c"), _folder.File("x"));
        await wrapper.Do("--add-cow", "c1", cow);
        await wrapper.Do("--add-cow", "c2", cow);
        await wrapper.Do("--add-target", "ro", cow, "--readonly");
        await wrapper.Refuse("is used by the export 'c1'", "--add-target", "w", cow);
        await wrapper.Refuse("there is an export 'a' already", "--add-target", "a", cow);
        Assert.Equal(["a", "c1", "c2", "ro"], await wrapper.Served());
    }

    [Fact]
    public async Task A_removed_export_lets_its_clients_go_on_or_not()
    {
        using var wrapper = new WrapperProcess(_folder);
        await wrapper.Do("--add-target", "a", _image);
        using NbdTestClient client = wrapper.Open("a");
        Assert.Contains("1 clients go on", await wrapper.Do("--remove-by-file", _image), StringComparison.Ordinal);
        Assert.Equal(NbdError.None, client.Write(0, [1, 2, 3]));
        Assert.Equal("leaving", (await wrapper.List())["a"]["state"]!.GetValue<string>());
        await wrapper.Refuse("which is being removed", "--add-target", "again", _image);
        client.Disconnect();
        Wait.Until(
            () => wrapper.Server.Log.Contains("its last client has left", StringComparison.Ordinal), "it is closed");
        await wrapper.Do("--add-target", "again", _image);
        using NbdTestClient second = wrapper.Open("again");
        Assert.Equal([1, 2, 3], second.Read(0, 3));
        await wrapper.Do("--remove-by-exportname", "again", "--force");
        Assert.True(second.IsClosed());
        Assert.Empty(await wrapper.List());
        await wrapper.Refuse("there is no export 'again'", "--remove-by-exportname", "again");
        Assert.Equal("{}", JsonNode.Parse(File.ReadAllText(_folder.File("w.state")))!["images"]!.ToJsonString());
    }

    [Fact]
    public async Task A_reload_changes_what_differs_and_keeps_the_clients_of_the_rest()
    {
        string state = _folder.File("w.state"), other = _folder.Random("other.img", 8192, seed: 3);
        using var wrapper = new WrapperProcess(_folder);
        await wrapper.Do("--add-target", "stays", _image);
        await wrapper.Do("--add-target", "changes", other);
        await wrapper.Do("--add-target", "goes", _folder.Random("third.img", 4096));
        using NbdTestClient stays = wrapper.Open("stays"), changes = wrapper.Open("changes");
        JsonNode saved = JsonNode.Parse(File.ReadAllText(state))!;
        JsonObject images = saved["images"]!.AsObject();
        images.Remove("goes");
        images["changes"]!["read_only"] = true;
        images["comes"] = new JsonObject { ["mode"] = "target", ["image_path"] = _folder.Random("new.img", 512) };
        File.WriteAllText(state, saved.ToJsonString());
        string said = await wrapper.Do("--reload");
        Assert.Equal(
            ["added: comes", "changed: changes", "removed: goes"],
            said.Split('\n', StringSplitOptions.RemoveEmptyEntries).Order());
        Assert.Equal(["changes", "comes", "stays"], await wrapper.Served());
        Assert.True(changes.IsClosed());
        Assert.Equal(NbdError.None, stays.Write(0, [7]));
        using NbdTestClient again = wrapper.Open("changes");
        Assert.Equal(NbdError.Permission, again.Write(0, [7]));
        Assert.Equal("nothing has changed\n", await wrapper.Do("--reload"));
        wrapper.Server.Signal(1);
        Wait.Until(() => wrapper.Server.Log.Contains("all is as it was", StringComparison.Ordinal), "SIGHUP reloads");
        File.WriteAllText(state, "broken");
        await wrapper.Refuse("is no JSON", "--reload");
        Assert.Equal(["changes", "comes", "stays"], await wrapper.Served());
    }

    [Fact]
    public async Task An_export_is_renamed_by_a_reload_and_the_command_lines_names_are_its_own()
    {
        string state = _folder.File("w.state"), other = _folder.Random("other.img", 4096);
        using var wrapper = new WrapperProcess(_folder, "--imgfile", other);
        await wrapper.Do("--add-target", "a", _image);
        JsonNode saved = JsonNode.Parse(File.ReadAllText(state))!;
        JsonObject images = saved["images"]!.AsObject();
        JsonNode entry = images["a"]!.DeepClone();
        images.Remove("a");
        images["b"] = entry;
        images[other] = new JsonObject { ["mode"] = "target", ["image_path"] = _folder.Random("third.img", 512) };
        File.WriteAllText(state, saved.ToJsonString());
        await wrapper.Do("--reload");
        using NbdTestClient renamed = wrapper.Open("b"), fromLine = wrapper.Open(other);
        Assert.Equal((1UL << 20, 4096UL), (renamed.Size, fromLine.Size));
        Assert.Contains("not of the state file", await wrapper.Do("--list", "--json"), StringComparison.Ordinal);
        await wrapper.Do("--remove-by-exportname", other, "--force"); // that of the command line
        Assert.True(fromLine.IsClosed());
        Assert.NotNull(JsonNode.Parse(File.ReadAllText(state))!["images"]![other]);
        await wrapper.Do("--reload");
        using NbdTestClient third = wrapper.Open(other);
        Assert.Equal(512UL, third.Size);
    }

    [Fact]
    public async Task An_export_that_is_leaving_can_be_forced_out()
    {
        using var wrapper = new WrapperProcess(_folder);
        await wrapper.Do("--add-target", "a", _image);
        using NbdTestClient client = wrapper.Open("a");
        await wrapper.Do("--remove-by-exportname", "a");
        await wrapper.Do("--remove-by-exportname", "a", "--force");
        Assert.True(client.IsClosed());
        Assert.Empty(await wrapper.List());
    }

    /// <summary>A name is free as soon as the removal is answered, and its new bearer is found.</summary>
    [Fact]
    public void A_name_can_be_used_again_at_once_while_the_old_export_is_leaving()
    {
        string other = _folder.Random("other.img", 8192);
        using var wrapper = new WrapperProcess(_folder);
        using var control = new ControlClient(_folder.File("w.ctl"));
        JsonObject Target(string path) => new()
        {
            ["name"] = "a",
            ["definition"] = new JsonObject { ["mode"] = "target", ["image_path"] = path },
        };
        for (int round = 0; round < 50; round++)
        {
            control.Call("add", Target(_image));
            using NbdTestClient stays = wrapper.Open("a");
            control.Call("remove", new JsonObject { ["name"] = "a" });
            control.Call("add", Target(other));
            using NbdTestClient client = wrapper.Open("a");
            Assert.Equal((1UL << 20, 8192UL), (stays.Size, client.Size));
            stays.Disconnect();
            client.Disconnect();
            control.Call("remove", new JsonObject { ["name"] = "a", ["grace-ms"] = 0 });
            Wait.Until(() => control.Call("list")!.AsArray().Count == 0, "both are closed");
        }
    }

    [Fact]
    public async Task Strange_names_stay_in_their_row()
    {
        using var wrapper = new WrapperProcess(_folder);
        await wrapper.Do("--add-target", "a\nb\u001b[31m", _image);
        string table = await wrapper.Do("--list");
        Assert.Equal(2, table.TrimEnd().Split('\n').Length);
        Assert.DoesNotContain("\u001b", table + wrapper.Server.Log, StringComparison.Ordinal);
        Assert.Equal(["a\nb\u001b[31m"], await wrapper.Served());
    }

    [Fact]
    public async Task A_proxy_is_cached_reconnected_and_switched_and_its_own_control_socket_works()
    {
        using ServerProcess one = ServerProcess.Start(_folder, _image, "--readonly");
        using ServerProcess two = ServerProcess.Start(_folder, _image, "--readonly");
        string control = _folder.File("px.ctl");
        using var wrapper = new WrapperProcess(_folder);
        await wrapper.Do(
            "--add-proxy", "px", $"unix:{one.SocketPath}", "-", _folder.File("cache"), _folder.File("map"), control);
        using NbdTestClient client = wrapper.Open("px");
        Assert.Contains("mode:         proxy", await wrapper.Do("--bgctl-query", "px"), StringComparison.Ordinal);
        await Tool.Succeed(Proxies.Control, "--query", control);
        await wrapper.Do("--bgctl-reconnect", "px", $"unix:{two.SocketPath}", "-");
        Assert.Contains(two.SocketPath, File.ReadAllText(_folder.File("w.state")), StringComparison.Ordinal);
        await wrapper.Refuse("cache all first", "--bgctl-switch", "px");
        await wrapper.Do("--bgctl-cache-all", "px");
        await wrapper.Do("--bgctl-switch", "px");
        one.Kill();
        two.Kill();
        Assert.Equal(File.ReadAllBytes(_image), client.Read(0, 1 << 20));
        wrapper.Server.Kill();
        using var again = new WrapperProcess(_folder); // a target, without a remote
        using NbdTestClient later = again.Open("px");
        Assert.Equal(File.ReadAllBytes(_image), later.Read(0, 1 << 20));
    }

    [Fact]
    public async Task A_proxy_whose_remote_is_away_comes_when_it_is_there()
    {
        string remote = _folder.File("remote");
        File.WriteAllText(
            _folder.File("w.state"),
            new JsonObject
            {
                ["version"] = 2,
                ["images"] = new JsonObject
                {
                    ["px"] = new JsonObject
                    {
                        ["mode"] = "proxy",
                        ["remote_host"] = $"unix:{remote}",
                        ["remote_port"] = "-",
                        ["image_path"] = _folder.File("cache"),
                        ["bitmap_path"] = _folder.File("map"),
                        ["control_socket_path"] = _folder.File("px.ctl"),
                    },
                    ["here"] = new JsonObject { ["mode"] = "target", ["image_path"] = _folder.Random("h", 512) },
                },
            }.ToJsonString());
        using var wrapper = new WrapperProcess(_folder);
        Wait.Until(() => wrapper.Server.Log.Contains("'px' cannot be served", StringComparison.Ordinal), "it is said");
        Assert.Equal(["here"], await wrapper.Served());
        using ServerProcess origin = ServerProcess.Start(remote, ["--target", "--readonly", "--unix", remote, _image]);
        Wait.Until(() => wrapper.Server.Log.Contains("'px' is served", StringComparison.Ordinal), "it is served", 30);
        using NbdTestClient client = wrapper.Open("px");
        Assert.Equal(File.ReadAllBytes(_image)[..512], client.Read(0, 512));
    }

    [Fact]
    public async Task A_snapshot_is_made_by_name()
    {
        using var wrapper = new WrapperProcess(_folder);
        await wrapper.Do("--add-target", "a", _image);
        await wrapper.Do("--add-cow", "c", _folder.Random("base", 512));
        string path = (await wrapper.Do("--snapshot", "a")).Trim();
        Assert.Equal(File.ReadAllBytes(_image), File.ReadAllBytes(path));
        await wrapper.Refuse("of the target mode's images", "--snapshot", "c");
        wrapper.Server.Signal(10);
        Wait.Until(
            () => wrapper.Server.Log.Contains("--snapshot NAME", StringComparison.Ordinal), "SIGUSR1 is explained");
    }

    [Fact]
    public async Task A_full_disk_under_the_state_refuses_changes_and_changes_nothing()
    {
        using TmpfsMount small = await TmpfsMount.Create(_folder, "16k");
        string state = small.File("xnbd.state");
        using var wrapper = new WrapperProcess(_folder, "--dbpath", state);
        await wrapper.Do("--add-target", "a", _image);
        string before = File.ReadAllText(state);
        File.WriteAllBytes(small.File("filler"), new byte[12 * 1024]);
        await wrapper.Refuse("cannot be written", "--add-target", "b", _folder.Random("b.img", 512));
        await wrapper.Refuse("cannot be written", "--remove-by-exportname", "a");
        Assert.Equal(before, File.ReadAllText(state));
        Assert.Equal(["a"], await wrapper.Served());
        using NbdTestClient client = wrapper.Open("a");
        File.Delete(small.File("filler"));
        await wrapper.Do("--add-target", "b", _folder.File("b.img"));
        Assert.Equal(["a", "b"], await wrapper.Served());
    }

    [Fact]
    public async Task A_second_wrapper_does_not_use_the_same_state()
    {
        using var wrapper = new WrapperProcess(_folder);
        ToolResult second = await Tool.Run(
            WrapperProcess.Program,
            ["--unix", _folder.File("2"), "--socket", _folder.File("2.ctl"), "--dbpath", _folder.File("w.state")]);
        Assert.Equal(1, second.ExitCode);
        Assert.Contains("another xnbd-wrapper uses the state file", second.Errors, StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_shutdown_waits_for_clients_and_takes_no_new_ones()
    {
        using var wrapper = new WrapperProcess(_folder);
        await wrapper.Do("--add-target", "a", _image);
        NbdTestClient client = wrapper.Open("a");
        Task<string> shutdown = wrapper.Do("--shutdown");
        Wait.Until(() => !ServerProcess.Listens(wrapper.Server.SocketPath), "nobody is let in any more");
        Assert.Equal(NbdError.None, client.Write(0, [1]));
        Assert.False(shutdown.IsCompleted);
        client.Dispose();
        Assert.Equal("the wrapper has ended\n", await shutdown);
        Assert.Equal(0, wrapper.Server.WaitForExit());

        using var second = new WrapperProcess(_folder);
        using NbdTestClient other = second.Open("a");
        await second.Do("--shutdown", "--force");
        Assert.Equal(0, second.Server.WaitForExit());
    }

    [Fact]
    public async Task A_configuration_of_nbd_server_is_taken_over_and_what_it_cannot_mean_is_named()
    {
        string more = Directory.CreateDirectory(_folder.File("conf.d")).FullName, config = _folder.File("config");
        File.WriteAllText(Path.Combine(more, "b.conf"), $"[cow]\nexportname = {_image}\ncopyonwrite = true\n");
        File.WriteAllText(Path.Combine(more, "notes.txt"), "no configuration");
        File.WriteAllText(
            config,
            $"""
            # a comment
            [generic]
                user = nbd
                port = 10809
                allowlist = true
                includedir = {more}
            [disk one]
                exportname = {_image}
                readonly = true
                flush = true
                authfile = /etc/nbd-server/allow
            [many]
                exportname = /srv/%s.img
            [nothing]
            """);
        ToolResult printed = await Tool.Run(WrapperProcess.Program, ["--import-nbd-server", config]);
        Assert.Equal(0, printed.ExitCode);
        JsonObject images = JsonNode.Parse(printed.Output)!["images"]!.AsObject();
        Assert.Equal(["cow", "disk one"], images.Select(image => image.Key).Order());
        Assert.True(images["disk one"]!["read_only"]!.GetValue<bool>());
        Assert.Equal("cow-target", images["cow"]!["mode"]!.GetValue<string>());
        foreach (string said in (string[])
            ["user = nbd", "--lport 10809", "authfile = /etc/nbd-server/allow", "many: an exportname with %s",
            "nothing: exportname is missing", "share one layer"])
            Assert.Contains(said, printed.Errors, StringComparison.Ordinal);
        Assert.DoesNotContain("flush", printed.Errors, StringComparison.Ordinal);

        string[] load = ["--import-nbd-server", config, "--load", "--dbpath", _folder.File("w.state")];
        Assert.Equal(0, (await Tool.Run(WrapperProcess.Program, load)).ExitCode);
        ToolResult again = await Tool.Run(WrapperProcess.Program, load);
        Assert.Equal(1, again.ExitCode);
        Assert.Contains("already: nothing was changed", again.Errors, StringComparison.Ordinal);
        using var wrapper = new WrapperProcess(_folder);
        Assert.Equal(["cow", "disk one"], await wrapper.Served());
        Assert.Equal(1, (await Tool.Run(WrapperProcess.Program, load)).ExitCode); // the wrapper uses the state

        File.WriteAllText(config, "exportname = before any section");
        ToolResult broken = await Tool.Run(WrapperProcess.Program, ["--import-nbd-server", config]);
        Assert.Equal(1, broken.ExitCode);
        Assert.Contains("line 1", broken.Errors, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("say what to do")]
    [InlineData("only one thing", "--list", "--save")]
    [InlineData("--add-target takes NAME FILE; 1 were given", "--add-target", "a")]
    [InlineData("--list takes no arguments", "--list", "a")]
    [InlineData("--layer does not go with --add-target", "--add-target", "a", "b", "--layer", "l")]
    [InlineData("--grace 1h: not a number", "--shutdown", "--grace", "1h")]
    [InlineData("an argument is empty", "--add-target", "", "b")]
    [InlineData("unknown option '--nosuch'", "--list", "--nosuch")]
    public async Task A_wrong_command_line_is_explained(string reason, params string[] args)
    {
        using var wrapper = new WrapperProcess(_folder);
        ToolResult result = await wrapper.Try(args);
        Assert.Equal(2, result.ExitCode);
        Assert.Contains(reason, result.Errors, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("twice", "--imgfile", "a", "--imgfile", "a")]
    [InlineData("--imgfile: the name is empty", "--imgfile", "")]
    [InlineData("--lport 0: not a number", "--lport", "0")]
    [InlineData("--max-buf-size 1: not a number", "--max-buf-size", "1")]
    [InlineData("--load goes with --import-nbd-server", "--load")]
    public async Task A_wrong_command_line_of_the_wrapper_is_explained(string reason, params string[] args)
    {
        ToolResult result = await Tool.Run(WrapperProcess.Program, args);
        Assert.Equal(2, result.ExitCode);
        Assert.Contains(reason, result.Errors, StringComparison.Ordinal);
    }
}
