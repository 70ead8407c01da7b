//! `vmm branch`.

use std::collections::HashSet;

use libtest_mimic::Failed;
use rustix::process::Signal;
use tests::sandboxes::{Host, is_alive, process_state, signal, wait_for};

use crate::guest::{GOES_ON, SHAPE, python, read, remove, start, wait_for_growth, words, write};

/// A program that counts, and draws a random number for each count.
pub const COUNT: &str = "
n = words('/tmp/count', 8)
def count():
    while n[0] < 4000:
        n[n[0] + 2] = int.from_bytes(os.urandom(8), 'little')
        n[0] += 1
        time.sleep(.1)
go_on(count)
";

/// What a guest says of itself that no other may say.
pub const IDENTITY: &str = "
import random, uuid
print(os.uname().nodename, uuid.uuid4(), random.getrandbits(64))
print(open('/etc/machine-id').read())
";

/// A program that draws a number as soon as it sees that it has stood still, and writes down when that was.
const DRAW: &str = "
n = words('/tmp/drawn', 16)
def draw():
    os.setpriority(os.PRIO_PROCESS, 0, -20)
    last = time.monotonic_ns()
    while n[0] < 4000:
        now = time.monotonic_ns()
        if now - last > 2_000_000:
            n[2 * n[0] + 2] = now
            n[2 * n[0] + 3] = int.from_bytes(os.urandom(8), 'little')
            n[0] += 1
            now = time.monotonic_ns()
        last = now
go_on(draw)
";

/// The numbers that the program of [`COUNT`] has drawn.
pub fn drawn(host: &Host, name: &str) -> Result<Vec<u64>, Failed> {
    let bytes = read(host, name, "/tmp/count")?;
    let words: Vec<_> = bytes
        .chunks_exact(8)
        .filter_map(|word| word.first_chunk().copied().map(u64::from_le_bytes))
        .collect();
    let count = usize::try_from(*words.first().ok_or("an empty file")?)?;
    Ok(words.get(2..count + 2).ok_or("a short file")?.to_vec())
}

/// How many numbers both have from the first on.
pub fn common<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// How many numbers the first of `series` has in common with each of the others: the same number with all, or none is returned.
fn parted_at(series: &[Vec<u64>]) -> Result<usize, Failed> {
    let (first, others) = series.split_first().ok_or("nobody")?;
    let moments: HashSet<_> = others.iter().map(|other| common(first, other)).collect();
    match Vec::from_iter(&moments)[..] {
        [moment] => Ok(*moment),
        _ => Err(format!("they parted at {moments:?}, not at one moment").into()),
    }
}

/// Parent and children have drawn the same numbers until one moment, and others from then on.
pub fn go_on() -> Result<(), Failed> {
    let host = Host::new()?;
    start(&host, "one")?;
    python(&host, "one", COUNT)?;
    write(&host, "one", "/tmp/file", b"written before")?;
    wait_for(|| Ok(words(&host, "one", "/tmp/count")?[0] > 2))?;
    let before = drawn(&host, "one")?.len();
    let names = host.ok(&["branch", "one", "kid", "-n", "3"])?;
    names.expect_stdout("kid-1\nkid-2\nkid-3\n")?;
    let all = ["one", "kid-1", "kid-2", "kid-3"];
    let mut series = Vec::new();
    for name in all {
        wait_for_growth(&host, name, "/tmp/count", 2)?;
        if read(&host, name, "/tmp/file")? != b"written before" {
            return Err(format!("{name} has another file").into());
        }
        write(&host, name, "/tmp/file", name.as_bytes())?;
        series.push(drawn(&host, name)?);
    }
    let parted = parted_at(&series)?;
    if parted < before {
        return Err(format!("they parted at {parted}, before they were there: {before}").into());
    }
    let mut seen = HashSet::new();
    for name in all {
        if read(&host, name, "/tmp/file")? != name.as_bytes() {
            return Err(format!("{name} has the file of another").into());
        }
        let said = python(&host, name, IDENTITY)?;
        let words: Vec<_> = said.split_whitespace().collect();
        // One that has booted has not the name of its sandbox.
        if words.len() != 4 || (name != "one" && words.first() != Some(&name)) {
            return Err(format!("{name} says {said}").into());
        }
        if let Some(twice) = words.iter().find(|word| !seen.insert((**word).to_owned())) {
            return Err(format!("{name} says {twice}, as another").into());
        }
    }
    remove(&host, &all)?;
    host.expect_ls(&[])
}

/// A program that draws a number at once draws none that it draws in another child: before the guest's agent has been told that it is another.
pub fn draw() -> Result<(), Failed> {
    let host = Host::new()?;
    start(&host, "one")?;
    let code = format!("{GOES_ON}{DRAW}");
    // Before all others, as root may be.
    host.ok(&["exec", "one", "-u", "root", "--lang", "python", "-c", &code])?;
    wait_for(|| Ok(words(&host, "one", "/tmp/drawn")?[0] > 0))?;
    host.ok(&["branch", "one", "kid", "-n", "3"])?;
    let mut drawn = Vec::new();
    for name in ["one", "kid-1", "kid-2", "kid-3"] {
        wait_for_growth(&host, name, "/tmp/drawn", 1)?;
        let bytes = read(&host, name, "/tmp/drawn")?;
        let pairs = bytes.chunks_exact(16).map(<[u8]>::to_vec);
        drawn.push(pairs.skip(1).collect::<Vec<_>>());
    }
    // What was drawn at the same time was drawn before they parted.
    let common = |other: &Vec<_>| drawn.first().map_or(0, |first| common(first, other));
    let before = drawn.iter().skip(1).map(common).max().unwrap_or(0);
    let mut seen = HashSet::new();
    let own = drawn.iter().flat_map(|pairs| pairs.iter().skip(before));
    for number in own.filter_map(|pair| pair.get(8..)) {
        if number != [0; 8] && !seen.insert(number) {
            let number = number.escape_ascii();
            return Err(format!("{number} was drawn by two").into());
        }
    }
    remove(&host, &["one", "kid-1", "kid-2", "kid-3"])
}

/// Each generation has the memory of those before it and its own.
pub fn generations() -> Result<(), Failed> {
    let host = Host::new()?;
    start(&host, "g0")?;
    for depth in 1..=4 {
        let parent = format!("g{}", depth - 1);
        write(&host, &parent, &format!("/tmp/{parent}"), parent.as_bytes())?;
        host.ok(&["branch", &parent, &format!("g{depth}")])?;
        // What the parent writes later is its own.
        write(
            &host,
            &parent,
            "/tmp/g0",
            format!("late {depth}").as_bytes(),
        )?;
    }
    for depth in 0..4 {
        let file = read(&host, "g4", &format!("/tmp/g{depth}"))?;
        let expected = match depth {
            0 => "g0".to_owned(),
            depth => format!("g{depth}"),
        };
        if file != expected.as_bytes() {
            let file = file.escape_ascii();
            return Err(format!("g4 has {file} in place of {expected}").into());
        }
    }
    let tree = host.ok(&["ls", "--tree"])?.stdout;
    for (line, depth) in tree.lines().skip(1).zip(0..) {
        let expected = format!("{}g{depth} ", "  ".repeat(depth));
        if !line.starts_with(&expected) {
            return Err(format!("{expected:?} is not in its place:\n{tree}").into());
        }
    }
    let branch = &host.inspect("g4")?["branch"];
    let root = host.inspect("g0")?["id"].clone();
    if branch["depth"] != 4 || branch["root"] != root || branch["parent_name"] != "g3" {
        return Err(format!("g4 says that it comes from {branch}").into());
    }
    Ok(())
}

/// Whoever of a family is killed, the others live; and nobody is left a zombie.
pub fn deaths() -> Result<(), Failed> {
    let host = Host::new()?;
    start(&host, "one")?;
    write(&host, "one", "/tmp/file", b"kept")?;
    host.ok(&["branch", "one", "kid-1"])?;
    host.ok(&["branch", "one", "kid-2"])?;
    let pids = [host.pid("kid-1")?, host.pid("one")?];
    signal(pids[0], Signal::KILL)?;
    wait_for(|| Ok(process_state(pids[0]).is_none()))?;
    for name in ["one", "kid-2"] {
        python(&host, name, "assert open('/tmp/file').read() == 'kept'")?;
    }
    signal(pids[1], Signal::KILL)?;
    wait_for(|| Ok(!is_alive(pids[1])))?;
    write(&host, "kid-2", "/tmp/more", b"more")?;
    host.ok(&["branch", "kid-2", "grandkid"])?;
    if read(&host, "grandkid", "/tmp/file")? != b"kept" {
        return Err("the grandchild has another file".into());
    }
    host.expect_ls(&[
        ("one", "killed"),
        ("kid-1", "killed"),
        ("kid-2", "running"),
        ("grandkid", "running"),
    ])
}

/// A name that is taken leaves no children at all, and what makes no sense is told.
pub fn all_or_none() -> Result<(), Failed> {
    let host = Host::new()?;
    let budget = ["--tree-sandboxes", "5", "--tree-memory", "1G"];
    host.ok(&[&["start", "one"], &SHAPE[..], &budget].concat())?;
    host.ok(&["branch", "one", "kid-2"])?;
    host.refused(
        &["branch", "one", "kid", "-n", "3"],
        &["kid-2", "is running", "choose another"],
    )?;
    wait_for(|| Ok(host.ok(&["ls", "--quiet"])?.stdout == "one\nkid-2\n"))?;
    host.refused(
        &["branch", "one", "-n", "4"],
        &["has 2 sandboxes", "budget of 5", "--tree-sandboxes"],
    )?;
    host.refused(
        &["branch", "kid-2", "--reserve", "1100M"],
        &["1100 MiB more", "budget of 1024 MiB", "--tree-memory"],
    )?;
    host.refused(&["branch", "one", "-n", "0"], &["1 to 1000, not 0"])?;
    host.refused(&["branch", "nobody"], &["no sandbox is called \"nobody\""])?;
    host.refused(&["branch", "one", "a b"], &["cannot be a sandbox's name"])?;
    let ttl = host.ok(&["branch", "one", "short", "--ttl", "3s"])?;
    ttl.expect_stdout("short\n")?;
    wait_for(|| Ok(host.inspect("short")?["state"] == "ended"))?;
    host.ok(&["rm", "short"])?;
    host.expect_ls(&[("one", "running"), ("kid-2", "running")])
}

/// A branch is saved like any sandbox, and comes back without those that it came from.
pub fn commit() -> Result<(), Failed> {
    let host = Host::new()?;
    start(&host, "one")?;
    write(&host, "one", "/tmp/a", b"a")?;
    host.ok(&["snapshot", "one", "base"])?;
    remove(&host, &["one"])?;
    host.ok(&["restore", "base", "one"])?;
    write(&host, "one", "/tmp/b", b"b")?;
    host.ok(&["branch", "one", "kid"])?;
    write(&host, "kid", "/tmp/c", b"c")?;
    host.ok(&["snapshot", "kid", "difference"])?;
    host.ok(&["snapshot", "kid", "full", "--full"])?;
    remove(&host, &["one", "kid"])?;
    let parent = host.ok(&["snap", "inspect", "difference"])?.stdout;
    let base = host.ok(&["snap", "inspect", "base"])?.stdout;
    let id = |text: &str, key: &str| -> Result<_, Failed> {
        Ok(serde_json::from_str::<serde_json::Value>(text)?[key].clone())
    };
    if id(&parent, "parent")? != id(&base, "id")? {
        return Err(format!("it does not rest on the base: {parent}").into());
    }
    for snapshot in ["difference", "full"] {
        host.ok(&["snap", "verify", snapshot])?;
        host.ok(&["restore", snapshot, "again"])?;
        for (path, content) in [("/tmp/a", b"a"), ("/tmp/b", b"b"), ("/tmp/c", b"c")] {
            if read(&host, "again", path)? != content {
                return Err(format!("{snapshot}: {path} is another file").into());
            }
        }
        remove(&host, &["again"])?;
    }
    Ok(())
}
