using Xnbd.TestKit;

namespace Xnbd.Fuzz.Tests;

/// <summary>Every input of the corpus goes through its target: the seeds, and whatever has made a target fail
/// once.</summary>
public class CorpusTests
{
    private static string Corpus => Path.Combine(Repository.Root, "fuzz", "corpus");

    public static TheoryData<string> Targets => [.. FuzzTarget.All.Keys];

    [Theory]
    [MemberData(nameof(Targets))]
    public async Task No_input_of_the_corpus_makes_its_target_fail(string name)
    {
        FuzzTarget target = FuzzTarget.All[name]();
        string[] files = Directory.GetFiles(Path.Combine(Corpus, name));
        Assert.NotEmpty(files);
        foreach (string file in files)
        {
            byte[] input = await File.ReadAllBytesAsync(file);
            // The targets of our client give up after 30 s: an input that hangs must be seen before that.
            Exception? failure = await Record.ExceptionAsync(
                () => Task.Run(() => target.Run(input)).WaitAsync(TimeSpan.FromSeconds(20)));
            Assert.True(failure is null, $"{file}: {failure}");
        }
    }

    [Theory]
    [MemberData(nameof(Targets))]
    public async Task The_corpus_has_the_seeds_of_each_target(string name)
    {
        foreach ((string seed, byte[] input) in FuzzTarget.All[name]().Seeds())
            Assert.Equal(input, await File.ReadAllBytesAsync(Path.Combine(Corpus, name, seed)));
    }

    /// <summary>A check that cannot fail would let any defect through.</summary>
    [Fact]
    public void A_wrong_reply_is_found()
    {
        byte[] fromServer = [.. new byte[] { 0x67, 0x44, 0x66, 0x98, 0, 0, 0, 5 }, .. new byte[8]];
        var agreement = new ExpectedAgreement(IsStructured: false, []);
        var request = new Protocol.NbdRequest(0, Protocol.NbdCommand.Flush, Cookie: 0, 0, 0);
        var due = new ExpectedReply(request, Fails: false, []);
        Assert.Throws<CheckException>(() => new ReplyCheck(agreement, [due]).Run(new ByteReader(fromServer)));
        Assert.Throws<CheckException>(() => new ReplyCheck(agreement, [due]).Run(new ByteReader([])));
        new ReplyCheck(agreement, [due with { Fails = true }]).Run(new ByteReader(fromServer));
    }
}
