using System.Globalization;
using System.Security.Cryptography;
using Xnbd.TestKit;

namespace Xnbd.Interop.Tests;

/// <summary>
/// A disk with files for a <see cref="Guest"/>, and the guest's work on it. The guest reads the files that came with
/// the disk, and writes others, again and again, past its own cache (O_DIRECT). It compares what it reads with
/// checksums, and with copies in its memory.
/// </summary>
internal sealed class GuestFiles
{
    /// <summary>How many files come with the disk: old0, old1 and so on, of 1 MiB each.</summary>
    public const int Count = 48;

    public const int FileBytes = 1 << 20;

    private const string Mount = "mount -t ext4 -o discard /dev/vda /mnt";

    /// <summary>Works until /tmp/stop is there, or something is wrong. Then /tmp/wrong says what.</summary>
    private const string Work = """
        #!/bin/sh
        set -o pipefail
        cd /mnt
        n=0
        same() { dd if=$1 bs=64k iflag=direct 2>/tmp/dd | cmp -s - /tmp/$1 || wrong "$1 is not what was written"; }
        wrong() { echo "round $n: $* $(grep -v records /tmp/dd)" >/tmp/wrong; exit 1; }
        while [ ! -e /tmp/stop ]; do
          set -- $(sed -n $((n % FILES + 1))p sums)
          sum=$(dd if=$2 bs=64k iflag=direct 2>/tmp/dd | md5sum) || wrong "$2 cannot be read"
          [ ${sum%% *} = $1 ] || wrong "$2 is not what came with the disk"

          new=new$((n % 24)) before=new$(((n + 12) % 24))
          [ $((n % 8)) != 7 ] || rm -f $new
          dd if=/dev/urandom of=/tmp/$new bs=4k count=$((RANDOM % 64 + 1)) 2>/dev/null
          [ $((n % 2)) = 0 ] && how=oflag=direct || how=conv=fsync
          dd if=/tmp/$new of=$new bs=64k $how 2>/tmp/dd || wrong "$new cannot be written"
          same $new
          [ ! -e /tmp/$before ] || same $before
          n=$((n + 1))
          echo $n >/tmp/rounds.new
          mv /tmp/rounds.new /tmp/rounds
        done

        """;

    /// <summary>Compares all files, and names those that are not what they must be.</summary>
    private const string Check = """
        #!/bin/sh
        cd /mnt
        sync
        echo 3 >/proc/sys/vm/drop_caches
        md5sum -c sums 2>&1 | grep -v ': OK$' && bad=1
        for new in /tmp/new*; do cmp ${new#/tmp/} $new || bad=1; done
        [ -z "$bad" ]

        """;

    private readonly TempFolder _folder;

    private GuestFiles(TempFolder folder, string image, GuestSystem system)
        => (_folder, Image, System) = (folder, image, system);

    /// <summary>The disk's image: an ext4 of 96 MiB.</summary>
    public string Image { get; }

    /// <summary>A system that does the work.</summary>
    public GuestSystem System { get; }

    /// <summary>Makes the disk, or skips the test with the reason.</summary>
    public static async Task<GuestFiles> Create(TempFolder folder)
    {
        var system = new GuestSystem(
            folder,
            ["virtio_pci", "virtio_blk"],
            ("bin/work", Work.Replace("FILES", $"{Count}", StringComparison.Ordinal)),
            ("bin/check", Check));
        string content = Directory.CreateDirectory(folder.File("content")).FullName;
        var sums = new StringWriter();
        for (int i = 0; i < Count; i++)
        {
            byte[] bytes = File.ReadAllBytes(folder.Random($"content/old{i}", FileBytes, seed: i));
            sums.Write($"{Convert.ToHexStringLower(MD5.HashData(bytes))}  old{i}\n");
        }

        File.WriteAllText(Path.Combine(content, "sums"), sums.ToString());
        string image = folder.Sparse("disk.img", 96 << 20);
        await Tool.Succeed("mkfs.ext4", "-q", "-b", "4096", "-d", content, image);
        return new GuestFiles(folder, image, system);
    }

    /// <summary>Boots a guest on a server of the disk, and lets it work.</summary>
    public Guest Boot(string socket)
    {
        Guest guest = Guest.Boot(_folder, System, Guest.NbdDisk(socket));
        try
        {
            guest.Run(Mount);
            guest.Run("echo 0 >/tmp/rounds; work >/dev/null 2>&1 &");
            Continue(guest, 3);
            return guest;
        }
        catch
        {
            guest.Dispose();
            throw;
        }
    }

    /// <summary>
    /// Waits until the guest has worked for some rounds from now on. In none of them anything may have been wrong.
    /// </summary>
    public static void Continue(Guest guest, int rounds) => guest.Run(
        $"""
        end=$(($(cat /tmp/rounds) + {rounds}))
        until [ -e /tmp/wrong ] || [ $(cat /tmp/rounds) -ge $end ]; do sleep 0.1; done
        ! cat /tmp/wrong 2>/dev/null
        """);

    /// <summary>Waits until the guest's work finds that something is wrong.</summary>
    /// <returns>What it found.</returns>
    public static string WaitForWrong(Guest guest)
        => guest.Run("until [ -s /tmp/wrong ]; do sleep 0.1; done; cat /tmp/wrong");

    /// <summary>Ends the work, in which nothing may have been wrong.</summary>
    public static void Stop(Guest guest)
    {
        Continue(guest, 1);
        guest.Run("touch /tmp/stop; while pidof work; do sleep 0.1; done; ! cat /tmp/wrong 2>/dev/null");
    }

    /// <summary>Ends the work, lets the guest check all files and its kernel's messages, and turns it off.</summary>
    /// <returns>The checksums of the files that it wrote, by name.</returns>
    public static Dictionary<string, string> End(Guest guest)
    {
        Stop(guest);
        guest.Run("check");
        string sums = guest.Run("cd /tmp; md5sum new*");
        guest.Run("umount /mnt");
        string messages = guest.Run("dmesg");
        foreach (string word in (string[])["I/O error", "EXT4-fs error", "EXT4-fs warning", "hung"])
            Assert.DoesNotContain(word, messages, StringComparison.OrdinalIgnoreCase);
        guest.PowerOff();
        return sums.Split('\n', StringSplitOptions.RemoveEmptyEntries).Select(line => line.Split("  "))
            .ToDictionary(words => words[1], words => words[0]);
    }

    /// <summary>Checks the file system of an image, and all files in it.</summary>
    public async Task CheckImage(string image, Dictionary<string, string> written)
    {
        await Tool.Succeed("e2fsck", "-fn", image);
        string files = Directory.CreateDirectory(_folder.File("files")).FullName;
        await Tool.Succeed("debugfs", "-R", $"rdump / {files}", image);
        var expected = new Dictionary<string, string>(written);
        foreach (string line in File.ReadAllLines(_folder.File("content/sums")))
            expected.Add(line.Split("  ")[1], line.Split("  ")[0]);
        Assert.True(expected.Count > Count);
        foreach ((string name, string sum) in expected)
        {
            byte[] bytes = await File.ReadAllBytesAsync(Path.Combine(files, name));
            Assert.Equal((name, sum), (name, Convert.ToHexStringLower(MD5.HashData(bytes))));
        }
    }

    /// <summary>The offset on the disk of a file's first block, in bytes.</summary>
    public static async Task<long> OffsetOf(string file, string image)
        => 4096 * long.Parse(
            (await Tool.Succeed("debugfs", "-R", $"bmap /{file} 0", image)).Trim(),
            CultureInfo.InvariantCulture);
}
