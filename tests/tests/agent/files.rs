//! Files: in and out, whole or not at all, as the user of the request.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use vmm::agent::{Agent, AgentError, FileKind, WatchKind, WriteOptions};

use crate::guest::{ask, connect, expect, is_slow};

fn refusal<T: std::fmt::Debug>(result: Result<T, AgentError>, word: &str) -> Result<(), Failed> {
    match result {
        Err(AgentError::Refused { code, message }) => {
            expect(format!("{code:?}") == word, (word, code, message))
        }
        other => expect(false, (word, other)),
    }
}

fn write(agent: &Agent, path: &str, data: &str, options: WriteOptions) -> Result<u64, AgentError> {
    agent.write_file(Path::new(path), &mut data.as_bytes(), options)
}

fn read(agent: &Agent, path: &str) -> Result<String, AgentError> {
    let mut data = Vec::new();
    agent.read_file(Path::new(path), &mut data)?;
    Ok(String::from_utf8_lossy(&data).into_owned())
}

pub fn basics() -> Result<(), Failed> {
    let agent = connect()?;
    let plain = WriteOptions::default();
    let parents = WriteOptions {
        parents: true,
        ..plain
    };
    refusal(write(&agent, "basics/a/file", "one", plain), "NotFound")?;
    write(&agent, "basics/a/file", "one", parents)?;
    expect(
        read(&agent, "/home/user/basics/a/file")? == "one",
        "what was written",
    )?;
    write(
        &agent,
        "basics/a/file",
        ", two",
        WriteOptions {
            append: true,
            ..plain
        },
    )?;
    expect(
        read(&agent, "basics/a/file")? == "one, two",
        "what was appended",
    )?;
    let new = WriteOptions {
        create_new: true,
        ..plain
    };
    refusal(write(&agent, "basics/a/file", "x", new), "Exists")?;
    write(&agent, "basics/a/new", "", new)?;
    write(
        &agent,
        "basics/a/file",
        "three",
        WriteOptions {
            mode: Some(0o4750),
            ..plain
        },
    )?;
    write(&agent, "basics/a/file", "four", plain)?;
    let info = agent.stat(Path::new("basics/a/file"), false)?;
    expect(
        (info.mode, info.uid, info.gid, info.size) == (0o4750, 1000, 1000, 4),
        &info,
    )?;
    ask(
        &agent,
        "cd /home/user/basics/a; ln -s file link; ln -s nowhere dangling; mkfifo pipe",
    )?;
    write(&agent, "basics/a/link", "through", plain)?;
    expect(
        read(&agent, "basics/a/file")? == "through",
        "through the link",
    )?;
    let kinds: BTreeMap<_, _> = agent
        .list(Path::new("basics/a"))?
        .into_iter()
        .map(|entry| {
            (
                String::from_utf8_lossy(&entry.name).into_owned(),
                entry.kind(),
            )
        })
        .collect();
    let expected = [
        ("dangling", FileKind::Symlink),
        ("file", FileKind::File),
        ("link", FileKind::Symlink),
        ("new", FileKind::File),
        ("pipe", FileKind::Other),
    ];
    let expected = expected.map(|(name, kind)| (name.to_owned(), kind));
    expect(kinds == BTreeMap::from(expected), &kinds)?;
    let link = agent.stat(Path::new("basics/a/link"), false)?;
    expect(
        link.target == b"file" && link.kind() == FileKind::Symlink,
        &link,
    )?;
    expect(
        agent.stat(Path::new("basics/a/link"), true)?.kind() == FileKind::File,
        "followed",
    )?;
    agent.make_directory(Path::new("basics/b/c"), Some(0o700), true)?;
    refusal(
        agent.make_directory(Path::new("basics/b/c"), None, false),
        "Exists",
    )?;
    agent.rename(Path::new("basics/a"), Path::new("basics/b/d"))?;
    refusal(agent.remove(Path::new("basics/b"), false), "NotEmpty")?;
    refusal(read(&agent, "basics/b"), "IsADirectory")?;
    refusal(agent.list(Path::new("basics/b/d/file")), "NotADirectory")?;
    agent.remove(Path::new("basics/b/d/link"), false)?;
    agent.remove(Path::new("basics"), true)?;
    refusal(agent.stat(Path::new("basics"), false), "NotFound")?;
    refusal(agent.stat(Path::new(""), false), "InvalidArgument")
}

/// A source that fails after a while.
struct Failing(usize);

impl Read for Failing {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.0 == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.0 -= 1;
        out.fill(b'n');
        Ok(out.len())
    }
}

pub fn whole() -> Result<(), Failed> {
    let agent = connect()?;
    agent.make_directory(Path::new("whole"), None, false)?;
    write(&agent, "whole/file", "old", WriteOptions::default())?;
    let names =
        |agent: &Agent| -> Result<usize, Failed> { Ok(agent.list(Path::new("whole"))?.len()) };
    for path in ["whole/file", "whole/other"] {
        let source = &mut Failing(4);
        let result = agent.write_file(Path::new(path), source, WriteOptions::default());
        expect(matches!(result, Err(AgentError::Source(_))), result)?;
    }
    // A client that is gone in the middle of it.
    let client = connect()?;
    let worker = std::thread::spawn(move || {
        let (reader, mut writer) = std::os::unix::net::UnixStream::pair()?;
        writer.write_all(&[b'n'; 100_000])?;
        let closer = client.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(500));
            closer.set_deadline(Some(Instant::now()));
            drop(writer);
        });
        let mut reader = reader;
        let result = client.write_file(
            Path::new("whole/file"),
            &mut reader,
            WriteOptions::default(),
        );
        Ok::<_, io::Error>(format!("{:?}", result.err()))
    });
    let _ = worker.join().map_err(|_| "the worker panicked")??;
    let start = Instant::now();
    while names(&agent)? != 1 && start.elapsed() < Duration::from_secs(5) {}
    expect(names(&agent)? == 1, "something unfinished is left")?;
    expect(read(&agent, "whole/file")? == "old", "the file has changed")?;
    agent.remove(Path::new("whole"), true)?;
    Ok(())
}

pub fn permissions() -> Result<(), Failed> {
    let agent = connect()?;
    let plain = WriteOptions::default();
    refusal(write(&agent, "/etc/x", "x", plain), "PermissionDenied")?;
    refusal(agent.list(Path::new("/root")), "PermissionDenied")?;
    refusal(
        agent.remove(Path::new("/etc/passwd"), false),
        "PermissionDenied",
    )?;
    let root = agent.as_user("root");
    write(&root, "/etc/x", "x", plain)?;
    write(&root, "/root/x", "x", plain)?;
    refusal(read(&agent, "/root/x"), "PermissionDenied")?;
    expect(read(&agent, "/etc/x")? == "x", "what root wrote")?;
    refusal(write(&agent, "/etc/x", "y", plain), "PermissionDenied")?;
    root.remove(Path::new("/etc/x"), false)?;
    // A file that is not theirs stays so, even where the directory would let them replace it.
    ask(
        &agent,
        "mkdir -m 777 /home/user/open; echo r >/home/user/open/file",
    )?;
    refusal(write(&agent, "open/file", "u", plain), "PermissionDenied")?;
    // And what root writes to a file of the user's stays the user's.
    write(&agent, "open/own", "u", plain)?;
    write(&root, "/home/user/open/own", "r", plain)?;
    expect(
        agent.stat(Path::new("open/own"), false)?.uid == 1000,
        "the owner",
    )?;
    refusal(read(&agent.as_user("stranger"), "open/own"), "NoSuchUser")?;
    root.remove(Path::new("/home/user/open"), true)?;
    Ok(())
}

pub fn trees() -> Result<(), Failed> {
    let agent = connect()?;
    let here = tempfile::tempdir()?;
    let from = here.path().join("from");
    std::fs::create_dir_all(from.join("deep/er"))?;
    let data: Vec<u8> = (0..200_000_u32)
        .map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1])
        .collect();
    std::fs::write(from.join("deep/er/data"), &data)?;
    std::fs::write(from.join("run"), "#!/bin/sh\necho ran\n")?;
    std::fs::set_permissions(from.join("run"), std::fs::Permissions::from_mode(0o755))?;
    symlink("deep/er/data", from.join("link"))?;
    for n in 0..9 {
        std::fs::write(from.join(format!("deep/{n}")), n.to_string())?;
    }
    agent.write_tree(&from, Path::new("trees/in"))?;
    let told = ask(
        &agent,
        "cd /home/user/trees/in; ./run; ls deep | wc -l; wc -c <link; stat -c %U run",
    )?;
    expect(told == "ran\n10\n200000\nuser\n", told)?;
    let back = here.path().join("back");
    agent.read_tree(Path::new("trees/in"), &back)?;
    let status = std::process::Command::new("diff")
        .args(["-r", "--no-dereference"])
        .args([&from, &back])
        .status()?;
    expect(status.success(), "the trees differ")?;
    let times = |path: &Path| path.metadata().and_then(|m| m.modified());
    let (old, new) = (times(&from.join("run"))?, times(&back.join("run"))?);
    expect(
        old.duration_since(new).unwrap_or_default() < Duration::from_secs(1),
        (old, new),
    )?;
    // A single file.
    agent.read_tree(Path::new("trees/in/run"), &here.path().join("single"))?;
    expect(here.path().join("single/run").exists(), "a single file")?;
    refusal(
        agent.read_tree(Path::new("trees/none"), &here.path().join("none")),
        "NotFound",
    )?;
    expect(
        !here.path().join("none").exists(),
        "nothing is made for nothing",
    )?;
    refusal(
        agent.write_tree(&from, Path::new("/etc/tree")),
        "PermissionDenied",
    )?;
    agent.remove(Path::new("trees"), true)?;
    Ok(())
}

pub fn changes() -> Result<(), Failed> {
    let agent = connect()?;
    agent.make_directory(Path::new("watched/sub"), None, true)?;
    let (sender, receiver) = channel();
    let watcher = agent.clone();
    let worker = std::thread::spawn(move || {
        watcher.watch(Path::new("watched"), true, |event| {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            let _ = sender.send((event.kind(), text(&event.path), text(&event.to)));
            event.kind() != WatchKind::Removed || event.path != b"last"
        })
    });
    let next = || receiver.recv_timeout(Duration::from_secs(20));
    expect(next()?.0 == WatchKind::Ready, "ready")?;
    ask(
        &agent,
        "cd /home/user/watched; echo a >file; mv file sub/moved; mkdir new; sleep 0.3; \
                 echo b >new/deep; chmod 600 new/deep; mv sub/moved /tmp/away; echo >last; rm last",
    )?;
    worker.join().map_err(|_| "the worker panicked")??;
    let told: Vec<_> = receiver.try_iter().collect();
    for (kind, path, to) in [
        (WatchKind::Created, "file", ""),
        (WatchKind::Modified, "file", ""),
        (WatchKind::Moved, "file", "sub/moved"),
        (WatchKind::Created, "new", ""),
        (WatchKind::Created, "new/deep", ""),
        (WatchKind::Attributes, "new/deep", ""),
        (WatchKind::Removed, "sub/moved", ""),
        (WatchKind::Removed, "last", ""),
    ] {
        let event = (kind, path.to_owned(), to.to_owned());
        expect(told.contains(&event), (event, &told))?;
    }
    refusal(
        agent.watch(Path::new("nowhere"), false, |_| true),
        "NotFound",
    )?;
    // What root made in it is root's.
    agent
        .as_user("root")
        .remove(Path::new("/home/user/watched"), true)?;
    Ok(())
}

pub fn full() -> Result<(), Failed> {
    let agent = connect()?.as_user("root");
    ask(
        &agent,
        "mkdir /mnt/small; mount -t tmpfs -o size=128k none /mnt/small",
    )?;
    let mut source = io::repeat(b'x').take(1 << 20);
    let path = Path::new("/mnt/small/file");
    refusal(
        agent.write_file(path, &mut source, WriteOptions::default()),
        "NoSpace",
    )?;
    let left = ask(&agent, "ls -A /mnt/small; umount /mnt/small")?;
    expect(left.is_empty(), left)
}

/// Bytes that do not repeat soon, and what was made of them.
struct Pattern {
    state: u64,
    left: u64,
    sum: u64,
}

impl Pattern {
    fn new(left: u64) -> Self {
        let state = 0x9e37_79b9_7f4a_7c15;
        Self {
            state,
            left,
            sum: 0,
        }
    }

    fn step(&mut self) -> [u8; 8] {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state.to_le_bytes()
    }
}

impl Read for Pattern {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let mut count = 0;
        for chunk in out.chunks_exact_mut(8) {
            if self.left < 8 {
                break;
            }
            chunk.copy_from_slice(&self.step());
            self.left -= 8;
            count += 8;
        }
        Ok(count)
    }
}

/// Compares what comes with the pattern.
impl Write for Pattern {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let chunks = data.chunks_exact(8);
        let count = data.len() - chunks.remainder().len();
        for chunk in chunks {
            self.sum += u64::from(chunk != self.step());
        }
        self.left = self.left.saturating_sub(count as u64);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub fn large() -> Result<(), Failed> {
    let mebibytes: u32 = if is_slow() { 8 } else { 100 };
    let size = u64::from(mebibytes) << 20;
    let agent = connect()?;
    let path = Path::new("/tmp/large");
    let start = Instant::now();
    agent.write_file(path, &mut Pattern::new(size), WriteOptions::default())?;
    let there = start.elapsed();
    let mut pattern = Pattern::new(size);
    let start = Instant::now();
    let count = agent.read_file(path, &mut io::BufWriter::new(&mut pattern))?;
    let back = start.elapsed();
    let rate = |time: Duration| f64::from(mebibytes) / time.as_secs_f64();
    eprintln!(
        "{mebibytes} MiB: {:.1} MiB/s in, {:.1} MiB/s out",
        rate(there),
        rate(back)
    );
    agent.remove(path, false)?;
    expect(
        count == size && pattern.left == 0 && pattern.sum == 0,
        (count, pattern.left, pattern.sum),
    )
}
