using System.Runtime.CompilerServices;

[assembly: InternalsVisibleTo("Xnbd.Server.Tests")]
