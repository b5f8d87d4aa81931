using System.Runtime.CompilerServices;

[assembly: InternalsVisibleTo("Xnbd.Server.Tests")]
[assembly: InternalsVisibleTo("Xnbd.Fuzz")]
