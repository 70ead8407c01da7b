//! Snapshots that rest on others, and snapshots of what is not all there yet.

use libtest_mimic::Failed;
use serde_json::Value;
use tests::sandboxes::Host;

use crate::guest::{read, remove, start, write};

fn snap_inspect(host: &Host, name: &str) -> Result<Value, Failed> {
    let output = host.ok(&["snap", "inspect", name])?;
    Ok(serde_json::from_str(&output.stdout)?)
}

fn expect_lineage(host: &Host, name: &str, len: usize) -> Result<(), Failed> {
    let inspected = snap_inspect(host, name)?;
    let lineage = inspected["stored"]["lineage"].as_array();
    match lineage {
        Some(lineage) if lineage.len() == len => Ok(()),
        _ => Err(format!("{name} rests on {lineage:?}, not on {len}").into()),
    }
}

/// What a guest has under `n`: as much as some pages hold, and nothing like another's.
fn content(n: usize) -> Vec<u8> {
    (0..5000)
        .flat_map(|line| format!("{n} {line}\n").into_bytes())
        .collect()
}

/// Fails unless a guest has what was written under 0 to before `count`.
fn expect_contents(host: &Host, name: &str, count: usize) -> Result<(), Failed> {
    for n in 0..count {
        if read(host, name, &format!("/tmp/{n}"))? != content(n) {
            return Err(format!("{name} has something else in /tmp/{n}").into());
        }
    }
    Ok(())
}

fn write_content(host: &Host, name: &str, n: usize) -> Result<(), Failed> {
    write(host, name, &format!("/tmp/{n}"), &content(n))
}

/// Each snapshot is taken of a guest that was restored from the one before, by either way.
pub fn depth() -> Result<(), Failed> {
    let host = Host::new()?;
    start(&host, "link")?;
    // Another image in the place of the guest's is none of its business.
    std::fs::remove_file(host.data().join("image"))?;
    std::fs::write(host.data().join("image"), "another")?;
    write_content(&host, "link", 0)?;
    host.ok(&["snapshot", "link", "d0"])?;
    remove(&host, &["link"])?;
    for n in 1..=4 {
        let pages = if n % 2 == 0 { "map" } else { "fault" };
        let (parent, own) = (format!("d{}", n - 1), format!("d{n}"));
        host.ok(&["restore", &parent, "link", "--pages", pages])?;
        expect_contents(&host, "link", n)?;
        write_content(&host, "link", n)?;
        host.ok(&["snapshot", "link", &own])?;
        expect_lineage(&host, &own, n)?;
        if n < 4 {
            remove(&host, &["link"])?;
        }
    }
    host.ok(&["snap", "flatten", "d4", "flat"])?;
    let regions: Value =
        serde_json::from_str(&host.ok(&["snap", "diff", "d4", "flat", "--json"])?.stdout)?;
    if regions[0]["differ"] != 0 {
        return Err(format!("a flat snapshot differs: {regions}").into());
    }
    host.ok(&["snapshot", "link", "mapped", "--full"])?;
    remove(&host, &["link"])?;
    host.ok(&["restore", "d4", "link", "--pages", "fault"])?;
    host.ok(&["snapshot", "link", "faulted", "--full"])?;
    host.refused(&["snap", "rm", "--recursive", "d0"], &["in use"])?;
    remove(&host, &["link"])?;
    host.ok(&["snap", "verify", "--all"])?;

    host.ok(&["snap", "rm", "--recursive", "d0"])?;
    for (name, pages) in [("flat", "fault"), ("mapped", "map"), ("faulted", "fault")] {
        expect_lineage(&host, name, 0)?;
        host.ok(&["restore", name, "link", "--pages", pages])?;
        expect_contents(&host, "link", 5)?;
        remove(&host, &["link"])?;
    }
    Ok(())
}

/// Nothing but what the guest's first steps want has arrived when it is saved.
pub fn missing_pages() -> Result<(), Failed> {
    let host = Host::new()?;
    start(&host, "one")?;
    write_content(&host, "one", 0)?;
    host.ok(&["snapshot", "one", "s"])?;
    remove(&host, &["one"])?;
    host.ok(&["restore", "s", "early", "--pages", "fault"])?;
    host.ok(&["snapshot", "early", "difference"])?;
    host.ok(&["snapshot", "early", "all", "--full"])?;
    host.ok(&["stop", "--rm", "early"])?;
    let pages = |name: &str| -> Result<u64, Failed> {
        let inspected = snap_inspect(&host, name)?;
        Ok(inspected["stored"]["layers"][0]["data_pages"]
            .as_u64()
            .ok_or("no pages")?)
    };
    let (all, difference) = (pages("all")?, pages("difference")?);
    if difference * 4 > all {
        return Err(format!("a difference of {difference} pages of {all}").into());
    }
    expect_lineage(&host, "all", 0)?;
    for name in ["difference", "all"] {
        host.ok(&["restore", name, name, "--pages", "fault"])?;
        expect_contents(&host, name, 1)?;
        host.ok(&["exec", name, "--", "echo", "well"])?
            .expect_stdout("well\n")?;
        remove(&host, &[name])?;
    }
    // Stopped while its pages are missing.
    host.ok(&["restore", "s", "early", "--pages", "fault"])?;
    host.ok(&["stop", "--rm", "early"])?;
    host.ok(&["snap", "verify", "--all"])?;
    Ok(())
}
