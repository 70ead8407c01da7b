//! Reaps processes that this one has started and that live on by themselves, so that none is left a zombie.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Child;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Builder;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, pidfd_open, waitid};

/// Stack of the thread, in bytes.
const STACK_SIZE: usize = 64 << 10;

/// A thread that waits for the ends of the processes it is given. It starts with the first.
#[derive(Default)]
pub struct Reaper(Mutex<Option<Inbox>>);

/// Processes that the thread does not know yet, and what wakes it.
struct Inbox {
    new: Arc<Mutex<Vec<OwnedFd>>>,
    wake: Arc<OwnedFd>,
}

impl Reaper {
    /// Takes over the reaping of `child`.
    pub fn adopt(&self, child: &Child) -> io::Result<()> {
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| io::Error::other("no process id"))?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        let mut started = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let inbox = match &mut *started {
            Some(inbox) => inbox,
            none => none.insert(start()?),
        };
        let mut new = inbox.new.lock().unwrap_or_else(PoisonError::into_inner);
        new.push(pidfd);
        rustix::io::write(&*inbox.wake, &1u64.to_ne_bytes())?;
        Ok(())
    }
}

fn start() -> io::Result<Inbox> {
    let new: Arc<Mutex<Vec<OwnedFd>>> = Arc::default();
    let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let inbox = Inbox {
        new: Arc::clone(&new),
        wake: Arc::clone(&wake),
    };
    Builder::new()
        .name("reaper".to_owned())
        .stack_size(STACK_SIZE)
        .spawn(move || {
            let mut living = Vec::new();
            loop {
                living.append(&mut new.lock().unwrap_or_else(PoisonError::into_inner));
                let mut fds: Vec<_> = living
                    .iter()
                    .chain([&*wake])
                    .map(|fd| PollFd::new(fd, PollFlags::IN))
                    .collect();
                // An interrupted wait is taken up again.
                let _ = poll(&mut fds, None);
                // It only counts; there may be nothing to read.
                let _ = rustix::io::read(&*wake, &mut [0; 8]);
                living.retain(|pidfd| !has_ended(pidfd));
            }
        })?;
    Ok(inbox)
}

/// Reaps the process if it has ended.
fn has_ended(pidfd: &OwnedFd) -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    match waitid(WaitId::PidFd(pidfd.as_fd()), options) {
        Ok(status) => status.is_some(),
        Err(rustix::io::Errno::INTR) => false,
        // Somebody else has reaped it.
        Err(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn none_is_left_a_zombie() {
        let reaper = Reaper::default();
        let children = ["0", "0.2", "0"].map(|seconds| {
            #[expect(clippy::zombie_processes, reason = "the reaper waits for it")]
            let child = Command::new("sleep").arg(seconds).spawn().unwrap();
            reaper.adopt(&child).unwrap();
            child.id()
        });
        let deadline = Instant::now() + Duration::from_secs(20);
        let is_there = |pid: &u32| std::path::Path::new(&format!("/proc/{pid}")).exists();
        while children.iter().any(is_there) {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
