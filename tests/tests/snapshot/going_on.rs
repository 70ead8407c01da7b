//! Programs that run while a snapshot is taken, and after it.

use std::io::{BufRead, BufReader, Read, Write};

use libtest_mimic::Failed;
use tests::sandboxes::{Host, wait_for};

use crate::guest::{python, read, remove, start, wait_for_growth, words, write};

/// A counter counts, in the copies as in the original, and each has its own.
pub fn copies() -> Result<(), Failed> {
    let host = Host::new()?;
    start(&host, "one")?;
    let count = "
n = words('/tmp/count', 1)
def count():
    while True:
        n[0] += 1
        time.sleep(.1)
go_on(count)
";
    python(&host, "one", count)?;
    write(&host, "one", "/tmp/file", b"written before")?;
    host.ok(&["snapshot", "one", "s"])?;
    host.ok(&["restore", "s", "mapped", "--pages", "map"])?;
    host.ok(&["restore", "s", "faulted", "--pages", "fault"])?;
    for name in ["mapped", "faulted", "one"] {
        if read(&host, name, "/tmp/file")? != b"written before" {
            return Err(format!("{name} has another file").into());
        }
        write(&host, name, "/tmp/file", b"written after")?;
        wait_for_growth(&host, name, "/tmp/count", 3)?;
    }
    Ok(())
}

/// Two programs write without a pause, one per processor. Each page has the generation of the pass that wrote it last, which the next pass
/// expects; and each program has seen of the other what the other had written by then.
pub fn one_moment() -> Result<(), Failed> {
    let host = Host::new()?;
    start(&host, "one")?;
    let writers = "
PAGES = 256
STEP = 4096 // 8
def writer(own, other):
    mine, theirs = words(f'/tmp/{own}', PAGES + 1), words(f'/tmp/{other}', PAGES + 1)
    def work():
        os.sched_setaffinity(0, [own])
        generation, seen = 0, 0
        while True:
            generation += 1
            for at in range(STEP, PAGES * STEP, STEP):
                if mine[at] != generation - 1: mine[1] += 1
                mine[at] = generation
            mine[0] = generation
            if theirs[0] < seen: mine[1] += 1
            seen = theirs[0]
    return work
go_on(writer(0, 1))
go_on(writer(1, 0))
";
    python(&host, "one", writers)?;
    wait_for(
        || Ok(words(&host, "one", "/tmp/0")?[0] > 1 && words(&host, "one", "/tmp/1")?[0] > 1),
    )?;
    // The second is a difference to the first, and would show what the first had done to the programs.
    for name in ["first", "second"] {
        host.ok(&["snapshot", "one", name])?;
    }
    remove(&host, &["one"])?;
    for (snapshot, pages) in [("first", "fault"), ("second", "map")] {
        host.ok(&["restore", snapshot, "copy", "--pages", pages])?;
        for path in ["/tmp/0", "/tmp/1"] {
            // The pass in which it was saved, and a whole one.
            wait_for_growth(&host, "copy", path, 2)?;
            let [passes, wrong] = words(&host, "copy", path)?;
            if wrong != 0 {
                return Err(
                    format!("{snapshot}: {path} was wrong {wrong} times in {passes}").into(),
                );
            }
        }
        remove(&host, &["copy"])?;
    }
    Ok(())
}

/// A program's streams go on where its sandbox is saved; in a copy, where nobody has them, it waits for its input.
pub fn undisturbed() -> Result<(), Failed> {
    let host = Host::new()?;
    start(&host, "one")?;
    let script = "echo $$; read line; echo got $line; cat";
    let mut program = host
        .vmm(&["exec", "-i", "one", "--", "sh", "-c", script])
        .spawn()?;
    let mut stdout = BufReader::new(program.stdout.take().ok_or("no standard output")?);
    let mut line = String::new();
    stdout.read_line(&mut line)?;
    let pid = line.trim().to_owned();
    let saved = host.ok(&["snapshot", "one", "s"]);
    let mut stdin = program.stdin.take().ok_or("no standard input")?;
    let long = "and much more\n".repeat(20_000);
    stdin.write_all(b"something\n")?;
    let input = long.clone();
    let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    stdout.read_to_string(&mut line)?;
    let status = program.wait()?;
    saved?;
    writer.join().map_err(|_| "the writer panicked")??;
    if !status.success() || line != format!("{pid}\ngot something\n{long}") {
        let len = line.len();
        return Err(format!("the program ended with {status}, {len} bytes came").into());
    }
    host.ok(&["restore", "s", "copy"])?;
    wait_for(|| {
        let look = [
            "exec",
            "copy",
            "--",
            "sh",
            "-c",
            "cut -d' ' -f3 /proc/$1/stat",
            "sh",
            &pid,
        ];
        Ok(host.ok(&look)?.stdout == "S\n")
    })
}
