//! Children that a program of the guest asks for.

use std::collections::HashSet;

use libtest_mimic::Failed;
use tests::sandboxes::{Host, wait_for};

use crate::guest::{read, write};

/// Branches itself, and goes on differently in each.
const FORK: &str = "set -- $(bough branch -n 3 2>/tmp/why)
    case $1 in
    parent) shift; echo parent \"$@\" >/tmp/who;;
    child) echo child $2 $3 $(cat /tmp/before) $(hostname) >/tmp/who;;
    *) echo nobody >/tmp/who;;
    esac
    sync; cat /tmp/who";

fn words(text: &str) -> Vec<&str> {
    text.split_whitespace().collect()
}

/// Runs `bough` to its end, and expects it to fail so.
fn refused(host: &Host, name: &str, arguments: &[&str], why: &str) -> Result<(), Failed> {
    let output = host.run(&[&["exec", name, "--", "bough"], arguments].concat())?;
    if output.status == Some(1) && output.stderr.contains(why) {
        return Ok(());
    }
    Err(format!("bough in {name}: {output:?}").into())
}

/// A script of the guest's goes on in parent and children, and knows in which; no more children are made than may be.
pub fn by_a_script() -> Result<(), Failed> {
    let host = Host::new()?;
    host.ok(&["start", "one", "--guest-branch", "3"])?;
    write(&host, "one", "/tmp/before", b"before")?;
    refused(&host, "one", &["branch", "-n", "4"], "may have 3 children")?;
    let said = host.ok(&["exec", "one", "--", "sh", "-c", FORK])?.stdout;
    let parent = words(&said);
    let (Some(&"parent"), Some(kids)) = (parent.first(), parent.get(1..)) else {
        return Err(format!("the parent says {said:?}").into());
    };
    if kids.iter().collect::<HashSet<_>>().len() != 3 {
        return Err(format!("these are not three children: {said:?}").into());
    }
    for (kid, index) in kids.iter().zip(1..) {
        wait_for(|| Ok(!read(&host, kid, "/tmp/who").unwrap_or_default().is_empty()))?;
        let who = String::from_utf8(read(&host, kid, "/tmp/who")?)?;
        let expected = format!("child {index} {kid} before {kid}\n");
        if who != expected {
            return Err(format!("{kid} says {who:?}, not {expected:?}").into());
        }
        if host.inspect(kid)?["branch"]["parent_name"] != "one" {
            return Err(format!("{kid} is nobody's child").into());
        }
    }
    refused(&host, kids[0], &["branch"], "does not allow it")?;
    refused(&host, "one", &["branch"], "may have 3 children")?;
    // One that has ended leaves nothing but its place.
    host.ok(&["stop", "--force", kids[1]])?;
    wait_for(|| Ok(!host.ok(&["ls", "--quiet"])?.stdout.contains(kids[1])))?;
    let said = host.ok(&["exec", "one", "--", "bough", "branch"])?.stdout;
    if words(&said).len() != 2 {
        return Err(format!("the parent says {said:?}").into());
    }
    refused(&host, "one", &["branch"], "may have 3 children")?;
    // What the child began with is that program, which is told again.
    write(&host, kids[0], "/tmp/who", b"")?;
    host.ok(&["rollback", kids[0]])?;
    let who = || read(&host, kids[0], "/tmp/who").unwrap_or_default();
    wait_for(|| Ok(who().starts_with(b"child 1 ")))
}

/// What a guest is let make is in the file that describes it, and gets no more time than the guest has.
pub fn for_a_time() -> Result<(), Failed> {
    let host = Host::new()?;
    let file = host.path().join("vm.toml");
    std::fs::write(&file, "guest_branch = 1\ntimeout = '15s'\n")?;
    host.ok(&["start", "--config", &file.to_string_lossy(), "one"])?;
    let said = host.ok(&["exec", "one", "--", "bough", "branch"])?.stdout;
    let Some(kid) = words(&said).get(1).copied() else {
        return Err(format!("the parent says {said:?}").into());
    };
    // It would outlive its parent.
    host.ok(&["rm", "--force", "one"])?;
    host.expect_ls(&[(kid, "running")])?;
    wait_for(|| Ok(host.ok(&["ls", "--quiet"])?.stdout.is_empty()))
}

/// Asks again and again, and is told each time.
const LOOP: &str = "for i in 1 2 3; do bough branch >>/tmp/told 2>&1; echo $? >>/tmp/told; done; echo end >/tmp/end";

/// Snapshots and branches that fall upon one who waits for children leave nobody waiting for ever.
pub fn waiting() -> Result<(), Failed> {
    let host = Host::new()?;
    host.ok(&["start", "one", "--guest-branch", "9"])?;
    let script = format!("({LOOP}) </dev/null >/dev/null 2>&1 &");
    host.ok(&["exec", "one", "--", "sh", "-c", &script])?;
    for number in 0..4 {
        host.ok(&["snapshot", "one", &format!("s{number}")])?;
        host.ok(&["branch", "one", &format!("kid-{number}")])?;
    }
    host.ok(&["restore", "s1", "copy"])?;
    for name in ["one", "kid-0", "kid-1", "kid-2", "kid-3", "copy"] {
        let end = wait_for(|| Ok(read(&host, name, "/tmp/end").unwrap_or_default() == b"end\n"));
        let told = String::from_utf8(read(&host, name, "/tmp/told")?)?;
        if end.is_err() || told.lines().filter(|line| "01".contains(line)).count() != 3 {
            return Err(format!("{name} was told:\n{told}").into());
        }
    }
    Ok(())
}
