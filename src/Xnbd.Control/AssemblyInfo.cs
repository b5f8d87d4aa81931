using System.Runtime.CompilerServices;

[assembly: InternalsVisibleTo("Xnbd.Control.Tests")]
[assembly: InternalsVisibleTo("Xnbd.Fuzz")]
