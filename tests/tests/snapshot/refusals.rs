//! What cannot be saved or restored, and what turns out to be broken only when it is wanted.

use std::fs;
use std::os::unix::fs::FileExt;

use libtest_mimic::Failed;
use snapshot_fmt::PAGE_SIZE;
use snapshot_fmt::manifest::{MEMORY, Manifest, STATE};
use tests::sandboxes::{Host, wait_for};
use vmm::store::Store;

use crate::guest::{remove, start, write};

/// Puts a snapshot into the store that differs from `of` in its manifest. Returns its id.
fn doctored(store: &Store, of: &str, change: fn(&mut Manifest)) -> Result<String, Failed> {
    let held = store.hold(of)?;
    let draft = store.begin()?;
    for name in [STATE, MEMORY] {
        fs::copy(held.snapshot().path(name), draft.path().join(name))?;
    }
    let mut manifest = held.snapshot().manifest().clone();
    change(&mut manifest);
    Ok(draft.publish(manifest)?.snapshot().id().to_string())
}

fn store(host: &Host) -> Store {
    Store::at(&host.data().join("snapshots"))
}

/// Each refusal is one line that says what differs.
pub fn not_as_it_was() -> Result<(), Failed> {
    let host = Host::new()?;
    start(&host, "one")?;
    let first = host.ok(&["snapshot", "one", "first"])?.stdout;
    let first = first.trim();
    remove(&host, &["one"])?;
    let store = store(&host);
    type Change = (fn(&mut Manifest), &'static [&'static str]);
    let changes: [Change; 5] = [
        (
            |manifest| manifest.cpu.vendor = "AnotherVendr".to_owned(),
            &["another processor", "AnotherVendr instead of"],
        ),
        (
            |manifest| {
                manifest
                    .cpu
                    .features
                    .push("00000007.0.ebx=ffffffff".to_owned())
            },
            &["another processor", "lacks CPUID bits"],
        ),
        (
            |manifest| manifest.machine.drives[0].bytes += 4096,
            &["image", "bytes instead of", "since the snapshot was taken"],
        ),
        (
            |manifest| manifest.machine.drives[0].mtime_ns += 1,
            &["image", "was written to", "since the snapshot was taken"],
        ),
        (
            |manifest| manifest.machine.cpus = 3,
            &["another number of processors"],
        ),
    ];
    for (change, parts) in changes {
        let id = doctored(&store, first, change)?;
        host.refused(&["restore", &id], parts)?;
    }
    host.refused(
        &["restore", "frist"],
        &["no snapshot is called \"frist\"", "did you mean \"first\"?"],
    )?;
    host.refused(&["snapshot", "none"], &["no sandbox is called \"none\""])?;
    host.expect_ls(&[])
}

/// A page of a file, whose byte on the disk has changed, is wanted by a program.
pub fn corrupt_page() -> Result<(), Failed> {
    const MARK: &[u8] = b"here it is";
    let host = Host::new()?;
    start(&host, "one")?;
    let page = MARK.repeat(409);
    write(&host, "one", "/tmp/file", &page)?;
    let id = host.ok(&["snapshot", "one", "s"])?.stdout;
    remove(&host, &["one"])?;

    let path = store(&host).dir().join(id.trim()).join(MEMORY);
    let bytes = fs::read(&path)?;
    let pages = bytes.chunks(PAGE_SIZE);
    let found: Vec<usize> = pages
        .enumerate()
        .filter(|(_, bytes)| bytes.starts_with(&page))
        .map(|(index, _)| index * PAGE_SIZE)
        .collect();
    if found.is_empty() {
        return Err("the file's page is not in the layer".into());
    }
    let layer = fs::File::options().write(true).open(&path)?;
    for at in found {
        layer.write_at(b"X", at as u64 + 7)?;
    }
    let verified = host.run(&["snap", "verify", "s"])?;
    verified
        .expect_status(2)?
        .expect_stderr(&["memory.layer", "is corrupt"])?;

    host.ok(&["restore", "s", "broken", "--pages", "fault"])?;
    let read = host.run(&[
        "exec",
        "broken",
        "--lang",
        "python",
        "-c",
        "print(open('/tmp/file').read())",
    ])?;
    if read.status == Some(0) {
        return Err(format!("it was read: {read:#?}").into());
    }
    let reason = lost_page(&host, "broken")?;
    if !reason.contains("is corrupt") {
        return Err(format!("it ended so: {reason}").into());
    }
    // The same page is named by who looks for it.
    let page = reason
        .split_whitespace()
        .skip_while(|word| *word != "page")
        .nth(1)
        .unwrap_or("?");
    verified.expect_stderr(&[&format!("page {page} is corrupt")])?;
    Ok(())
}

/// The reason for which a sandbox ends that has lost a page.
fn lost_page(host: &Host, name: &str) -> Result<String, Failed> {
    wait_for(|| Ok(host.inspect(name)?["state"] == "ended"))?;
    let exit = host.inspect(name)?["exit"].clone();
    let reason = exit["reason"].as_str().unwrap_or_default();
    let parts = ["page ", "of the guest's memory cannot be had", MEMORY];
    if exit["status"] != 125 || !parts.iter().all(|part| reason.contains(part)) {
        return Err(format!("it ended so: {exit}").into());
    }
    Ok(reason.to_owned())
}

/// A layer loses its end while its pages are mapped: all of them, or half. What the guest has written there is gone as well, so it cannot be saved.
pub fn cut_layer() -> Result<(), Failed> {
    let host = Host::new()?;
    start(&host, "one")?;
    let id = host.ok(&["snapshot", "one", "s"])?.stdout;
    remove(&host, &["one"])?;
    let path = store(&host).dir().join(id.trim()).join(MEMORY);
    let whole = fs::read(&path)?;
    for len in [PAGE_SIZE, whole.len() / 2] {
        host.ok(&["restore", "s", "copy", "--pages", "map"])?;
        host.ok(&["pause", "copy"])?;
        let layer = fs::File::options().write(true).open(&path)?;
        layer.set_len(len as u64)?;
        let saved = host.run(&["snapshot", "copy"])?;
        saved
            .expect_status(125)?
            .expect_stderr(&[MEMORY, "cut short"])?;
        host.ok(&["resume", "copy"])?;
        // It may end before it can be asked.
        let _ = host.run(&["exec", "copy", "--", "cat", "/etc/passwd"])?;
        let reason = lost_page(&host, "copy")?;
        if !reason.contains("cut short") {
            return Err(format!("it ended so: {reason}").into());
        }
        remove(&host, &["copy"])?;
        fs::write(&path, &whole)?;
    }
    host.ok(&["restore", "s", "copy"])?;
    Ok(())
}
