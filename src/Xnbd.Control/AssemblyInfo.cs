using System.Runtime.CompilerServices;

[assembly: InternalsVisibleTo("Xnbd.Control.Tests")]
