using Xnbd.Programs;

// One executable, called by several names: through a link named for the program, or with the program's name as the
// first argument.
var programs = new Dictionary<string, Func<string[], int>>
{
    [ServerProgram.Name] = ServerProgram.Run,
    [LayerProgram.Name] = LayerProgram.Run,
    [ControlProgram.Name] = ControlProgram.Run,
};

string calledAs = Path.GetFileName(Environment.GetCommandLineArgs()[0]);
if (programs.TryGetValue(calledAs, out Func<string[], int>? program))
    return program(args);
if (args.Length > 0 && programs.TryGetValue(args[0], out program))
    return program(args[1..]);

Console.Error.WriteLine($"usage: {calledAs} PROGRAM [ARGUMENT ...], where PROGRAM is one of: {string.Join(", ", programs.Keys)}");
return ExitCode.Usage;
