//! `vmm pool`.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::Child;

use libtest_mimic::Failed;
use rustix::process::Signal;
use tests::sandboxes::{Host, signal, wait_for};

use crate::guest::{SHAPE, python, read, remove, start, write};

/// Starts a pool of two for machines like those of these tests.
fn pool(host: &Host) -> Result<Child, Failed> {
    let mut pool = host
        .vmm(&["pool", "--size", "2", "--cpus", SHAPE[1]])
        .spawn()?;
    let mut line = String::new();
    BufReader::new(pool.stdout.take().ok_or("no standard output")?).read_line(&mut line)?;
    match &*line {
        "ready\n" => Ok(pool),
        line => Err(format!("the pool says {line:?}").into()),
    }
}

/// The processes that `parent` has started.
fn children(parent: u64) -> Result<Vec<u64>, Failed> {
    let tasks = format!("/proc/{parent}/task");
    let mut found = Vec::new();
    for task in fs::read_dir(tasks)?.flatten() {
        let text = fs::read_to_string(task.path().join("children"))?;
        let pids = text.split_whitespace().map(str::parse);
        found.extend(pids.collect::<Result<Vec<u64>, _>>()?);
    }
    Ok(found)
}

/// Whether the shell has made all that it can, its processors last: it waits for what it is to be.
fn is_made(pid: u64) -> bool {
    let Ok(fds) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return false;
    };
    let is_vcpu = |fd: fs::DirEntry| {
        fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().contains("kvm-vcpu"))
    };
    fds.flatten().any(is_vcpu)
}

/// Waits until the pool has two shells besides those that it had, and were `taken`; returns them all.
fn wait_for_shells(pool: u64, taken: &[u64]) -> Result<Vec<u64>, Failed> {
    wait_for(|| {
        let shells = children(pool)?;
        let made = shells.iter().filter(|pid| !taken.contains(pid));
        Ok(made.filter(|&&pid| is_made(pid)).count() >= 2)
    })?;
    // A moment for the last to have said so.
    std::thread::sleep(std::time::Duration::from_millis(300));
    children(pool)
}

/// That the process may do no more than a monitor has to, and how many filters its system calls pass.
fn filters(pid: u64) -> Result<u64, Failed> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| -> Result<u64, Failed> {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        Ok(line.ok_or(format!("no {name}"))?.trim().parse()?)
    };
    // SECCOMP_MODE_FILTER (Linux, include/uapi/linux/seccomp.h).
    if (field("NoNewPrivs:")?, field("Seccomp:")?) != (1, 2) {
        return Err(format!("process {pid} is not confined: {status}").into());
    }
    field("Seccomp_filters:")
}

/// Children and restores take its processes over and outlive it; what it does not have is started.
pub fn serves() -> Result<(), Failed> {
    let host = Host::new()?;
    start(&host, "one")?;
    write(&host, "one", "/tmp/file", b"before")?;
    host.ok(&["snapshot", "one", "s"])?;
    let mut pool = pool(&host)?;
    let pid = u64::from(pool.id());
    host.refused(&["pool"], &["a pool is running already"])?;
    let shells = wait_for_shells(pid, &[])?;
    let confined = filters(host.pid("one")?)?;
    host.ok(&["branch", "one", "kid", "-n", "3"])?;
    // One of them was started by another that is confined; a chain of such is not slower for it.
    for pid in (1..=3).map(|number| host.pid(&format!("kid-{number}"))) {
        if filters(pid?)? != confined {
            return Err("a child passes more filters than its parent".into());
        }
    }
    for shell in &shells {
        filters(*shell)?;
    }
    let mut taken = (1..=3)
        .map(|number| host.pid(&format!("kid-{number}")))
        .collect::<Result<Vec<_>, _>>()?;
    if taken.iter().filter(|pid| shells.contains(pid)).count() != 2 {
        return Err(format!("the children are {taken:?}, the pool had {shells:?}").into());
    }
    // The next have what their parent began with over their memory, which is right for its children, and not for a snapshot's.
    let shells = wait_for_shells(pid, &taken)?;
    for shell in shells.iter().filter(|pid| !taken.contains(pid)) {
        if !fs::read_to_string(format!("/proc/{shell}/maps"))?.contains("memory.layer") {
            return Err("a shell has nothing of what was asked for last".into());
        }
    }
    host.ok(&["branch", "one", "kid-4"])?;
    taken.push(host.pid("kid-4")?);
    if !shells.contains(&host.pid("kid-4")?) {
        return Err("the fourth child is no process of the pool".into());
    }
    let shells = wait_for_shells(pid, &taken)?;
    host.ok(&["restore", "s", "copy"])?;
    taken.push(host.pid("copy")?);
    if !shells.contains(&host.pid("copy")?) {
        return Err("the restore did not take a process of the pool".into());
    }
    host.refused(&["restore", "s", "copy"], &["\"copy\" is running"])?;
    // A shell that is killed is replaced; the pool's death ends those that nobody has.
    let shells = wait_for_shells(pid, &taken)?;
    let idle = |pid: &&u64| !taken.contains(pid);
    signal(*shells.iter().rfind(idle).ok_or("no shells")?, Signal::KILL)?;
    let shells = wait_for_shells(pid, &taken)?;
    signal(pid, Signal::KILL)?;
    pool.wait()?;
    wait_for(|| {
        let idle = shells.iter().filter(|pid| !taken.contains(pid));
        Ok(!idle.into_iter().any(|pid| is_made(*pid)))
    })?;
    for name in ["kid-1", "kid-2", "kid-3", "kid-4", "copy"] {
        if read(&host, name, "/tmp/file")? != b"before" {
            return Err(format!("{name} has another file").into());
        }
    }
    for name in ["kid-1", "kid-4"] {
        python(&host, name, "print(1)")?;
    }
    // What a killed pool has left is in nobody's way.
    host.ok(&["branch", "one", "late"])?;
    let mut again = self::pool(&host)?;
    signal(again.id().into(), Signal::TERM)?;
    if !again.wait()?.success() {
        return Err("a pool that is told to end does not end well".into());
    }
    let all = ["one", "kid-1", "kid-2", "kid-3", "kid-4", "copy", "late"];
    remove(&host, &all)
}
