using System.Runtime.CompilerServices;

[assembly: InternalsVisibleTo("Xnbd.Storage.Tests")]
[assembly: InternalsVisibleTo("Xnbd.MicroBench")]
[assembly: InternalsVisibleTo("Xnbd.Fuzz")]
