using System.Runtime.CompilerServices;

[assembly: InternalsVisibleTo("Xnbd.Client.Tests")]
[assembly: InternalsVisibleTo("Xnbd.Fuzz")]
