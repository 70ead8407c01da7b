//! Drives that the guest writes to, in branches: all have what was written before, and each its own.

use std::fs;
use std::path::Path;

use libtest_mimic::Failed;
use rustix::process::Signal;
use tests::sandboxes::{Host, is_alive, signal, wait_for};
use vmm::config::{DriveConfig, DriveInterface};
use vmm::drive::Drive;

use crate::guest::remove;
use crate::raw_disk::{expect, expect_file, write};

/// One guest boots, for all of it.
pub fn family() -> Result<(), Failed> {
    let host = Host::new()?;
    let disk = host.path().join("disk");
    // The last page is on the disk in part.
    fs::write(&disk, vec![0; (32 << 10) + 512])?;
    host.ok(&["start", "one", "--drive", &disk.to_string_lossy()])?;
    write(&host, "one", 0, "zero")?;
    write(&host, "one", 8, "last")?;
    host.ok(&["snapshot", "one", "base"])?;
    own_file(&host, &disk)?;
    restored(&host)?;
    expect_file(&disk, &["zero", "parent", "last"])
}

/// The parent writes to its user's file. It may be killed at any time, and the file is not free before all are gone who read it.
fn own_file(host: &Host, disk: &Path) -> Result<(), Failed> {
    host.refused(&["rollback", "one", "base"], &["drive 1 is in a file"])?;
    write(host, "one", 1, "before")?;
    host.ok(&["branch", "one", "kid", "-n", "2"])?;
    write(host, "one", 1, "parent")?;
    write(host, "kid-1", 1, "of-kid")?;
    host.ok(&["branch", "kid-1", "grandkid"])?;
    write(host, "kid-1", 0, "late")?;
    expect(host, "one", &["zero", "parent"])?;
    expect(host, "kid-1", &["late", "of-kid"])?;
    expect_file(disk, &["zero", "parent", "last"])?;
    let pid = host.pid("one")?;
    signal(pid, Signal::KILL)?;
    wait_for(|| Ok(!is_alive(pid)))?;
    remove(host, &["one", "kid-1"])?;
    // What the killed ones had changed, and what they had not.
    expect(host, "kid-2", &["zero", "before"])?;
    expect(host, "grandkid", &["zero", "of-kid"])?;
    let start = ["start", "two", "--drive", &disk.to_string_lossy()];
    let reason = "is in use by another sandbox: stop that one and its branches";
    host.refused(&start, &[reason])?;
    host.ok(&["snapshot", "grandkid", "of-grandkid"])?;
    remove(host, &["grandkid", "kid-2"])?;
    expect_file(disk, &["zero", "parent", "last"])?;
    Drive::open(&DriveConfig {
        path: disk.to_owned(),
        read_only: false,
        interface: DriveInterface::Block,
    })?;
    host.ok(&["restore", "of-grandkid", "copy"])?;
    expect(
        host,
        "copy",
        &["zero", "of-kid", "", "", "", "", "", "", "last"],
    )?;
    remove(host, &["copy"])
}

/// The parent writes over a snapshot's disk. Its children's snapshots are differences to that.
fn restored(host: &Host) -> Result<(), Failed> {
    host.ok(&["restore", "base", "one"])?;
    write(host, "one", 2, "before")?;
    host.ok(&["branch", "one", "kid"])?;
    write(host, "one", 2, "latest")?;
    write(host, "one", 3, "latest")?;
    write(host, "kid", 4, "kid")?;
    host.ok(&["branch", "kid", "grandkid"])?;
    write(host, "kid", 4, "gone")?;
    host.ok(&["snapshot", "one", "of-one"])?;
    remove(host, &["one"])?;
    write(host, "grandkid", 5, "grandkid")?;
    host.ok(&["snapshot", "grandkid", "of-grandkid-2"])?;
    // An explored branch that is kept has what its program wrote.
    let write_won = "printf won | dd of=/dev/vda bs=4096 seek=6 conv=fsync,notrunc";
    let user = ["--user", "root", "--keep", "first-success", "--name", "won"];
    let explore = [
        &["explore", "grandkid"],
        &user[..],
        &["--", "sh", "-c", write_won],
    ];
    host.ok(&explore.concat())?;
    host.ok(&["snapshot", "won", "of-won"])?;
    expect(host, "kid", &["zero", "", "before", "", "gone"])?;
    // What it goes back from, others rest on.
    host.ok(&["rollback", "kid"])?;
    expect(host, "kid", &["zero", "", "before", "", ""])?;
    expect(
        host,
        "grandkid",
        &["zero", "", "before", "", "kid", "grandkid"],
    )?;
    write(host, "kid", 4, "again")?;
    host.ok(&["snapshot", "kid", "of-kid"])?;
    host.ok(&["rollback", "kid", "base"])?;
    expect(host, "kid", &["zero", "", "", "", ""])?;
    remove(host, &["kid", "grandkid", "won"])?;
    host.ok(&["snap", "verify", "--all"])?;
    for (snapshot, third) in [
        ("of-one", ["latest", "latest", "", "", ""]),
        ("of-kid", ["before", "", "again", "", ""]),
        ("of-grandkid-2", ["before", "", "kid", "grandkid", ""]),
        ("of-won", ["before", "", "kid", "grandkid", "won"]),
    ] {
        host.ok(&["restore", snapshot, "copy"])?;
        let words = [&["zero", ""][..], &third, &["", "last"]].concat();
        expect(host, "copy", &words)?;
        remove(host, &["copy"])?;
    }
    Ok(())
}
