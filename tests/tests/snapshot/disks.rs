//! Disks that the guest writes to, in snapshots: each is what it was when memory was, and each copy has its own.

use std::fs;

use libtest_mimic::Failed;
use tests::sandboxes::{Host, wait_for};

use crate::guest::{SHAPE, python, remove, wait_for_growth, words};
use crate::raw_disk::{expect, expect_file, write};

/// Copies have what was written before, and what they write is neither the others' nor the file's.
pub fn copies() -> Result<(), Failed> {
    let host = Host::new()?;
    let disk = host.path().join("disk");
    // The last page is on the disk in part.
    fs::write(&disk, vec![0; (64 << 10) + 512])?;
    host.ok(&["start", "one", "--drive", &disk.to_string_lossy()])?;
    write(&host, "one", 0, "zero")?;
    write(&host, "one", 16, "last")?;
    host.ok(&["snapshot", "one", "s"])?;
    write(&host, "one", 0, "other")?;
    host.ok(&["snapshot", "one", "t"])?;
    write(&host, "one", 1, "late")?;
    remove(&host, &["one"])?;
    expect_file(&disk, &["other", "late", "last"])?;

    host.ok(&["restore", "s", "a"])?;
    host.ok(&["restore", "s", "b", "--pages", "fault"])?;
    write(&host, "a", 2, "of-a")?;
    write(&host, "b", 0, "of-b")?;
    expect(&host, "a", &["zero", "", "of-a"])?;
    expect(&host, "b", &["of-b", "", ""])?;
    host.ok(&["snapshot", "a", "of-a"])?;
    write(&host, "a", 2, "gone")?;
    host.ok(&["snapshot", "a", "all", "--full"])?;
    host.ok(&["stop", "--rm", "a"])?;
    host.ok(&["stop", "--rm", "b"])?;
    expect_file(&disk, &["other", "late", "last"])?;
    // It is not needed any more.
    fs::remove_file(&disk)?;

    host.ok(&["snap", "verify", "--all"])?;
    host.ok(&["snap", "rebase", "of-a", "t", "rebased"])?;
    for (snapshot, third) in [("of-a", "of-a"), ("rebased", "of-a"), ("all", "gone")] {
        host.ok(&["restore", snapshot, "copy"])?;
        let words = [&["zero", "", third][..], &[""; 13], &["last"]].concat();
        expect(&host, "copy", &words)?;
        remove(&host, &["copy"])?;
    }
    Ok(())
}

/// A program writes to the disk without a pause, past its kernel's cache. Each page has the pass that wrote it last, which the next pass expects: a disk of
/// another moment than memory would be wrong.
pub fn one_moment() -> Result<(), Failed> {
    let host = Host::new()?;
    let disk = host.path().join("disk");
    fs::write(&disk, vec![0; 64 << 10])?;
    let drive = ["--drive", &disk.to_string_lossy()];
    host.ok(&[&["start", "one"], &SHAPE[..], &drive].concat())?;
    host.ok(&[
        &["exec", "one", "--user", "root", "--"][..],
        &["chmod", "666", "/dev/vda"],
    ]
    .concat())?;
    let writer = "
PAGES = 16
shown = words('/tmp/passes', 1)
def write():
    disk = os.open('/dev/vda', os.O_RDWR | os.O_DIRECT)
    page = mmap.mmap(-1, 4096)
    word = memoryview(page).cast('Q')
    passes = 0
    while True:
        passes += 1
        for at in range(0, PAGES * 4096, 4096):
            os.preadv(disk, [page], at)
            if word[0] != passes - 1 or word[511] != passes - 1: shown[1] += 1
            word[0] = word[511] = passes
            os.pwritev(disk, [page], at)
        shown[0] = passes
go_on(write)
";
    python(&host, "one", writer)?;
    wait_for(|| Ok(words(&host, "one", "/tmp/passes")?[0] > 1))?;
    // The second is a difference to the first.
    for name in ["first", "second"] {
        host.ok(&["snapshot", "one", name])?;
        wait_for_growth(&host, "one", "/tmp/passes", 1)?;
    }
    let right = |name: &str| -> Result<(), Failed> {
        // The pass of the moment, and a whole one.
        wait_for_growth(&host, name, "/tmp/passes", 2)?;
        match words(&host, name, "/tmp/passes")? {
            [_, 0] => Ok(()),
            [passes, wrong] => {
                Err(format!("{name}: pages were wrong {wrong} times in {passes}").into())
            }
        }
    };
    host.ok(&["branch", "one", "child"])?;
    right("one")?;
    right("child")?;
    remove(&host, &["one", "child"])?;
    let left = fs::read(&disk)?;
    for (snapshot, pages) in [("first", "fault"), ("second", "map"), ("third", "map")] {
        host.ok(&["restore", snapshot, "copy", "--pages", pages])?;
        if snapshot == "second" {
            host.ok(&["snapshot", "copy", "third"])?;
        }
        if snapshot == "third" {
            host.ok(&["branch", "copy", "child"])?;
            right("child")?;
            remove(&host, &["child"])?;
        }
        right("copy")?;
        remove(&host, &["copy"])?;
    }
    if fs::read(&disk)? != left {
        return Err("a copy has written to the file".into());
    }
    Ok(())
}
