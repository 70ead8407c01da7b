//! `vmm rollback` and `vmm diff`.

use std::collections::HashSet;
use std::time::Duration;

use libtest_mimic::Failed;
use tests::sandboxes::{Host, wait_for};

use crate::children::{COUNT, IDENTITY, common, drawn};
use crate::guest::{python, read, start, wait_for_growth, words, write};

/// A child goes back to the moment at which it branched off, as often as it is told to, and lives on differently each time.
pub fn again_and_again() -> Result<(), Failed> {
    let host = Host::new()?;
    start(&host, "one")?;
    python(&host, "one", COUNT)?;
    wait_for(|| Ok(words(&host, "one", "/tmp/count")?[0] > 2))?;
    write(&host, "one", "/tmp/file", b"written before")?;
    let before = drawn(&host, "one")?.len();
    host.ok(&["branch", "one", "kid"])?;
    let pid = host.pid("kid")?;
    let mut lives: Vec<Vec<u64>> = Vec::new();
    let mut seen = HashSet::new();
    for life in 0..2 {
        wait_for_growth(&host, "kid", "/tmp/count", 2)?;
        let numbers = drawn(&host, "kid")?;
        for other in &lives {
            let parted = common(other, &numbers);
            if parted < before || parted + 1 >= numbers.len() {
                return Err(format!("life {life} parted at {parted}, not from {before} on").into());
            }
        }
        lives.push(numbers);
        let said = python(&host, "kid", IDENTITY)?;
        let mut said = said.split_whitespace();
        if said.next() != Some("kid") {
            return Err("it has lost its name".into());
        }
        if let Some(twice) = said.find(|word| !seen.insert((*word).to_owned())) {
            return Err(format!("life {life} says {twice} again").into());
        }
        write(&host, "kid", "/tmp/file", b"written late")?;
        if life == 0 {
            cut_off(&host)?;
        } else {
            host.ok(&["pause", "kid"])?;
            host.ok(&["rollback", "kid"])?;
        }
        if read(&host, "kid", "/tmp/file")? != b"written before" {
            return Err("what was written late is still there".into());
        }
    }
    if host.pid("kid")? != pid {
        return Err("it is another process".into());
    }
    let metrics = host.ok(&["metrics", "kid"])?.stdout;
    let rollbacks = metrics.lines().any(|line| {
        line.starts_with("bough_operation_seconds_count")
            && line.ends_with(r#"operation="rollback",phase="total"} 2"#)
    });
    if !rollbacks {
        return Err(format!("two rollbacks are not among the metrics:\n{metrics}").into());
    }
    // The parent has not noticed.
    wait_for_growth(&host, "one", "/tmp/count", 1)
}

/// The client of a program that never was is told so.
fn cut_off(host: &Host) -> Result<(), Failed> {
    let here = host.path().join("waits").to_string_lossy().into_owned();
    let waits = "touch /tmp/waits; sleep 1000";
    let waits = host.vmm(&["exec", "kid", "--", "sh", "-c", waits]);
    let client = std::thread::spawn(move || waits.run().map_err(|error| format!("{error:?}")));
    wait_for(|| {
        let found = host.run(&["cp", "kid:/tmp/waits", &here])?;
        Ok(found.status == Some(0))
    })?;
    host.ok(&["rollback", "kid"])?;
    let client = client.join().map_err(|_| "the client panicked")??;
    client.expect_one_line()?;
    host.run(&["cp", "kid:/tmp/waits", &here])?
        .expect_status(2)?;
    Ok(())
}

/// A sandbox goes back to any snapshot of a machine like it, and differences count from there.
pub fn to_a_snapshot() -> Result<(), Failed> {
    let host = Host::new()?;
    start(&host, "one")?;
    for number in 0..3 {
        let word = format!("{number}");
        write(&host, "one", "/tmp/file", word.as_bytes())?;
        write(&host, "one", &format!("/tmp/{number}"), &[1; 100_000])?;
        host.ok(&["snapshot", "one", &format!("s{number}")])?;
    }
    write(&host, "one", "/tmp/file", b"late")?;
    // The least of several looks: who has just been served may not be gone yet.
    let files = || -> Result<usize, Failed> {
        let dir = format!("/proc/{}/fd", host.pid("one")?);
        let mut least = usize::MAX;
        for _ in 0..10 {
            least = least.min(std::fs::read_dir(&dir)?.count());
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(least)
    };
    let mut open = Vec::new();
    for number in [1, 0, 2, 0, 2, 1] {
        host.ok(&["rollback", "one", &format!("s{number}")])?;
        let there = read(&host, "one", "/tmp/file")?;
        if there != format!("{number}").as_bytes() {
            return Err(format!("s{number} has {}", there.escape_ascii()).into());
        }
        open.push(files()?);
    }
    // As many layers, as many files.
    if open[4] > open[2] {
        return Err(format!("files stay open: {open:?}").into());
    }
    write(&host, "one", "/tmp/own", b"own")?;
    host.ok(&["snapshot", "one", "after"])?;
    let parent = |name: &str| -> Result<_, Failed> {
        let listed = host.ok(&["snap", "inspect", name])?.stdout;
        let listed: serde_json::Value = serde_json::from_str(&listed)?;
        Ok((listed["id"].clone(), listed["parent"].clone()))
    };
    if parent("after")?.1 != parent("s1")?.0 {
        return Err("the next snapshot is not a difference to what was gone back to".into());
    }
    host.ok(&["snap", "verify", "--all"])?;
    host.ok(&["restore", "after", "copy"])?;
    host.ok(&["branch", "one", "kid"])?;
    for name in ["one", "copy", "kid"] {
        python(
            &host,
            name,
            "assert open('/tmp/own').read() == 'own' and open('/tmp/file').read() == '1'
assert os.path.exists('/tmp/1') and not os.path.exists('/tmp/2')",
        )?;
    }
    // Without a name: to what it has gone back to.
    host.ok(&["rollback", "one"])?;
    python(&host, "one", "assert not os.path.exists('/tmp/own')")?;
    let refused = host.run(&["rollback", "one", "nothing"])?;
    refused.expect_status(2)?;
    refused.expect_one_line()?;
    read(&host, "one", "/tmp/1").map(drop)
}

/// Two sandboxes of one past differ where they were written to, and comparing them leaves nothing behind.
pub fn differences() -> Result<(), Failed> {
    let host = Host::new()?;
    start(&host, "one")?;
    host.ok(&["snapshot", "one", "base"])?;
    host.ok(&["branch", "one", "kid"])?;
    let differ = |a: &str, b: &str| -> Result<u64, Failed> {
        let said = host.ok(&["diff", a, b, "--json"])?.stdout;
        let told: serde_json::Value = serde_json::from_str(&said)?;
        let count = told["regions"][0]["differ"].as_u64();
        Ok(count.ok_or_else(|| format!("no regions: {said}"))?)
    };
    let before = differ("one", "kid")?;
    write(&host, "kid", "/tmp/file", &[7; 4 << 20])?;
    let after = differ("one", "kid")?;
    // The file, and what writing it took.
    if after < before + 1024 {
        return Err(format!("{after} pages differ, {before} before a file of 1024").into());
    }
    if differ("base", "kid")? < 1024 || differ("base", "base")? != 0 {
        return Err("snapshots are not compared".into());
    }
    let listed = host.ok(&["snap", "ls", "-q"])?.stdout;
    if listed.lines().count() != 1 {
        return Err(format!("left behind: {listed}").into());
    }
    let refused = host.run(&["diff", "one", "nobody"])?;
    refused.expect_status(2)?;
    refused.expect_one_line()?;
    Ok(())
}
