using System.Runtime.CompilerServices;

[assembly: InternalsVisibleTo("Xnbd.Fuzz")]
