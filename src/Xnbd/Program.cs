using Xnbd.Linux;
using Xnbd.Programs;
using Xnbd.Programs.Wrapper;

StandardStreams.OpenMissing();

// One executable with several programs. It is called through a link that has the program's name, or with the program's
// name as the first argument.
var programs = new Dictionary<string, Func<string[], int>>
{
    [ServerProgram.Name] = ServerProgram.Run,
    [LayerProgram.Name] = LayerProgram.Run,
    [ControlProgram.Name] = ControlProgram.Run,
    [WrapperProgram.Name] = WrapperProgram.Run,
    [WrapperControlProgram.Name] = WrapperControlProgram.Run,
};

string calledAs = Path.GetFileName(Environment.GetCommandLineArgs()[0]);
if (programs.TryGetValue(calledAs, out Func<string[], int>? program))
    return program(args);
if (args.Length > 0 && programs.TryGetValue(args[0], out program))
    return program(args[1..]);

string usage = $"usage: {calledAs} PROGRAM [ARGUMENT ...], where PROGRAM is one of: {string.Join(", ", programs.Keys)}";
if (args is ["--help" or "-h" or "-?"])
{
    Console.WriteLine(usage);
    return ExitCode.Success;
}

Console.Error.WriteLine(args.Length == 0 ? usage : $"{calledAs}: there is no program '{args[0]}'\n{usage}");
return ExitCode.Usage;
