//! Watches over a VM while its agent is waited for and worked with.
//!
//! Whatever cuts the work short, the VM's end, a signal or the time being over, shuts the agent's connection, so
//! that nothing ever waits for a guest that cannot answer. What blocks on the host's side all the same, for
//! example a standard output that nobody reads, is ended by force a moment later; and a second signal kills.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};

use crate::exit::{ExitLatch, ExitReason};

/// Stack of the watching thread, in bytes.
const STACK_SIZE: usize = 64 << 10;
/// How long the process may take to end by itself once there is nothing left to do.
const FORCE_AFTER: Duration = Duration::from_secs(2);

/// What cut the work short.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// The VM ended.
    Vm(ExitReason),
    /// The monitor was told to end by this signal.
    Signal(u8),
    /// The time was over.
    TimedOut,
}

/// SIGINT, SIGTERM and SIGHUP, as something that can be polled.
pub struct Signals {
    last: Arc<AtomicUsize>,
    pipe: UnixStream,
}

impl Signals {
    /// Catches the signals from now on.
    pub fn catch() -> io::Result<Self> {
        let (pipe, sender) = UnixStream::pair()?;
        let last = Arc::new(AtomicUsize::new(0));
        let armed = Arc::new(AtomicBool::new(false));
        for (signal, number) in [(SIGHUP, 1), (SIGINT, 2), (SIGTERM, 15)] {
            // Actions run in the order of their registration. The second signal kills; the first is
            // noted before the pipe is readable.
            signal_hook::flag::register_conditional_default(signal, Arc::clone(&armed))?;
            signal_hook::flag::register(signal, Arc::clone(&armed))?;
            signal_hook::flag::register_usize(signal, Arc::clone(&last), number)?;
            signal_hook::low_level::pipe::register(signal, sender.try_clone()?)?;
        }
        // A file that may grow no more is an error to report, not a death.
        signal_hook::flag::register(SIGXFSZ, Arc::default())?;
        Ok(Self { last, pipe })
    }

    /// Readable when one has come.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }

    fn last(&self) -> u8 {
        u8::try_from(self.last.load(Ordering::SeqCst)).unwrap_or(0)
    }
}

/// Waits for the end of a VM and for what else may cut its work short.
#[derive(Clone)]
pub struct Supervisor {
    /// Where the VM's end is written.
    pub exit: ExitLatch,
    /// The signals that end the monitor.
    pub signals: Arc<Signals>,
    /// When the time is over.
    pub deadline: Option<Instant>,
    /// What to remove where the process has to be ended by force.
    pub leftover: Option<PathBuf>,
    /// The process's exit status for an ending.
    pub status: fn(&Ending) -> u8,
    /// Whether a watch ends the process by force; if not, that is somebody else's.
    pub forces: bool,
}

/// Ends the process with `status` in two seconds, whatever its threads are blocked in, and removes `leftover` before.
pub fn end_by_force(status: u8, leftover: Option<&Path>) {
    let leftover = leftover.map(Path::to_owned);
    let reaper = move || {
        std::thread::sleep(FORCE_AFTER);
        if let Some(path) = leftover {
            let _ = crate::sandbox::discard(&path);
        }
        signal_hook::low_level::exit(status.into());
    };
    // Without a thread the process ends by itself or by a second signal.
    let _ = Builder::new()
        .name("reaper".to_owned())
        .stack_size(STACK_SIZE)
        .spawn(reaper);
}

impl Supervisor {
    /// Waits until `fd` is readable or something cuts that short.
    pub fn wait(&self, fd: BorrowedFd, deadline: Option<Instant>) -> Result<(), Ending> {
        loop {
            let mut fds = [
                PollFd::from_borrowed_fd(fd, PollFlags::IN),
                PollFd::new(self.exit.event(), PollFlags::IN),
                PollFd::new(&self.signals.pipe, PollFlags::IN),
            ];
            let rest = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let timeout = rest.and_then(|rest| Timespec::try_from(rest).ok());
            let ready = match poll(&mut fds, timeout.as_ref()) {
                Ok(ready) => ready,
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => {
                    let why = format!("cannot wait for the VM: {}", io::Error::from(errno));
                    return Err(Ending::Vm(ExitReason::Monitor(why)));
                }
            };
            if let Some(reason) = self.exit.get() {
                return Err(Ending::Vm(reason));
            }
            if !fds[2].revents().is_empty() {
                return Err(Ending::Signal(self.signals.last()));
            }
            if !fds[0].revents().is_empty() {
                return Ok(());
            }
            if ready == 0 && rest.is_some_and(|rest| rest.is_zero()) {
                return Err(Ending::TimedOut);
            }
        }
    }

    /// Waits for a connection, until `deadline` or the supervisor's own, whichever is earlier.
    pub fn accept(&self, listener: &UnixListener, deadline: Instant) -> Result<UnixStream, Ending> {
        let deadline = self.deadline.map_or(deadline, |own| own.min(deadline));
        self.wait(listener.as_fd(), Some(deadline))?;
        let accepted = listener.accept().map(|(stream, _)| stream);
        accepted.map_err(|error| {
            Ending::Vm(ExitReason::Monitor(format!(
                "cannot accept the agent's connection: {error}"
            )))
        })
    }

    /// Waits for the VM's end, a signal, or the end of the time.
    pub fn wait_for_end(&self) -> Ending {
        // The latch's event stands for a descriptor that never brings anything else.
        match self.wait(self.exit.event().as_fd(), self.deadline) {
            Err(ending) => ending,
            Ok(()) => Ending::Vm(ExitReason::Monitor("the VM's end has no reason".to_owned())),
        }
    }

    /// Watches in a thread of its own, and shuts `stream` when something cuts the work short.
    pub fn watch(self, stream: &UnixStream) -> io::Result<Watch> {
        let stream = stream.try_clone()?;
        let done = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let watched = Arc::clone(&done);
        let thread = Builder::new()
            .name("supervisor".to_owned())
            .stack_size(STACK_SIZE)
            .spawn(move || {
                let ending = self.wait(watched.as_fd(), self.deadline).err();
                if let Some(ending) = &ending {
                    if self.forces {
                        end_by_force((self.status)(ending), self.leftover.as_deref());
                    }
                    // It fails only where the connection is gone already.
                    let _ = stream.shutdown(Shutdown::Both);
                }
                ending
            })?;
        Ok(Watch { done, thread })
    }
}

/// A watch that is being kept.
pub struct Watch {
    done: Arc<OwnedFd>,
    thread: JoinHandle<Option<Ending>>,
}

impl Watch {
    /// Ends the watch, and says what has cut the work short, if anything has.
    pub fn end(self) -> Option<Ending> {
        let written = rustix::io::write(&self.done, &1u64.to_ne_bytes());
        debug_assert!(written.is_ok());
        self.thread.join().unwrap_or(None)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::time::Duration;

    use super::*;

    fn supervisor(deadline: Option<Instant>) -> Supervisor {
        let signals = Arc::new(Signals::catch().unwrap());
        Supervisor {
            exit: ExitLatch::new().unwrap(),
            signals,
            deadline,
            leftover: None,
            status: |_| 1,
            forces: false,
        }
    }

    #[test]
    fn the_end_of_the_vm_shuts_the_connection() {
        let supervisor = supervisor(None);
        let exit = supervisor.exit.clone();
        let (mut ours, _theirs) = UnixStream::pair().unwrap();
        let watch = supervisor.watch(&ours).unwrap();
        exit.set(ExitReason::Reset);
        assert_eq!(ours.read(&mut [0]).unwrap(), 0);
        assert_eq!(watch.end(), Some(Ending::Vm(ExitReason::Reset)));
    }

    #[test]
    fn a_watch_that_nothing_disturbs_leaves_the_connection_alone() {
        use std::io::Write;
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let watch = supervisor(None).watch(&ours).unwrap();
        assert_eq!(watch.end(), None);
        theirs.write_all(b"x").unwrap();
        assert_eq!(ours.read(&mut [0]).unwrap(), 1);
    }

    #[test]
    fn time_that_is_over_ends_the_wait() {
        let ending = supervisor(Some(Instant::now() + Duration::from_millis(20))).wait_for_end();
        assert_eq!(ending, Ending::TimedOut);
    }
}
