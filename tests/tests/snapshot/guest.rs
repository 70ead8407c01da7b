//! The guest of these tests: two processors, and a Python that stands ready. On a software KVM one that has to start takes seconds, and
//! so does the next that stands ready: each guest gets one piece of Python, and files come and go by `vmm cp`, which starts nothing.

use std::fs;

use libtest_mimic::Failed;
use tests::sandboxes::{Host, wait_for};

/// What every sandbox of these tests is started with.
pub const SHAPE: [&str; 4] = ["--cpus", "2", "--warm", "python:mmap,random,uuid"];

/// What a program begins with that goes on after whoever started it, which has mapped a file: so it works without any system call, and shows how. It maps that
/// before it goes on, so that the file is there when whoever started it is told.
pub const GOES_ON: &str = "
import mmap, os, time
def words(path, pages):
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, pages * 4096)
    return memoryview(mmap.mmap(file, pages * 4096)).cast('Q')
def go_on(work):
    if os.fork() == 0:
        os.setsid()
        for fd in range(3): os.close(fd)
        os.nice(19)
        work()
";

/// Starts the sandbox `name`.
pub fn start(host: &Host, name: &str) -> Result<(), Failed> {
    host.ok(&[&["start", name], &SHAPE[..]].concat())?;
    Ok(())
}

/// What Python prints in the sandbox `name`.
pub fn python(host: &Host, name: &str, code: &str) -> Result<String, Failed> {
    let code = format!("{GOES_ON}{code}");
    let output = host.ok(&["exec", name, "--lang", "python", "-c", &code])?;
    Ok(output.stdout)
}

/// The content of a file in the sandbox `name`.
pub fn read(host: &Host, name: &str, path: &str) -> Result<Vec<u8>, Failed> {
    let file = host.path().join("read");
    host.ok(&["cp", &format!("{name}:{path}"), &file.to_string_lossy()])?;
    Ok(fs::read(file)?)
}

/// Writes a file in the sandbox `name`.
pub fn write(host: &Host, name: &str, path: &str, content: &[u8]) -> Result<(), Failed> {
    let file = host.path().join("written");
    fs::write(&file, content)?;
    host.ok(&["cp", &file.to_string_lossy(), &format!("{name}:{path}")])?;
    Ok(())
}

/// The first two words of a file that a program of [`GOES_ON`] has mapped.
pub fn words(host: &Host, name: &str, path: &str) -> Result<[u64; 2], Failed> {
    let bytes = read(host, name, path)?;
    let word = |at: usize| {
        bytes
            .get(at..)
            .and_then(|bytes| bytes.first_chunk().copied())
    };
    let both = word(0).zip(word(8)).ok_or("a file without words")?;
    Ok([both.0, both.1].map(u64::from_ne_bytes))
}

/// Waits until the first word of such a file has grown by `more`.
pub fn wait_for_growth(host: &Host, name: &str, path: &str, more: u64) -> Result<(), Failed> {
    let [first, _] = words(host, name, path)?;
    wait_for(|| Ok(words(host, name, path)?[0] >= first + more))
}

/// Ends sandboxes, and removes them.
pub fn remove(host: &Host, names: &[&str]) -> Result<(), Failed> {
    host.ok(&[&["rm", "--force"], names].concat())?;
    Ok(())
}
