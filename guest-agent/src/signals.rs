//! Signals as something to poll for.
//!
//! A signalfd wants its signals blocked, and a blocked signal stays blocked in children:
//! they let it through themselves (`sys::usual_signals`).

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::epoll::Watched;
use crate::failure::Failure;

/// The signals that the agent waits for.
pub struct Signals {
    fd: Watched<SignalFd>,
}

/// What the signals that came say.
#[derive(Default)]
pub struct Tidings {
    /// A child may have ended.
    pub child: bool,
    /// PID 1 was asked to end the guest: by `kill 1`, or Ctrl-Alt-Del.
    pub end: bool,
}

impl Signals {
    /// Blocks the agent's signals from here on. An ordinary process can still be terminated.
    ///
    /// # Errors
    /// A failure that names the system call.
    pub fn new(is_init: bool) -> Result<Self, Failure> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        if is_init {
            mask.add(Signal::SIGTERM);
            mask.add(Signal::SIGINT);
        }
        mask.thread_block()
            .map_err(|errno| Failure::internal("sigprocmask", errno))?;
        let fd = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map_err(|errno| Failure::internal("signalfd", errno))?;
        Ok(Self { fd: fd.into() })
    }

    /// Readable when a signal has come.
    pub fn fd(&self) -> &Watched<SignalFd> {
        &self.fd
    }

    /// Takes the signals that have come.
    pub fn take(&self) -> Tidings {
        let mut tidings = Tidings::default();
        // One SIGCHLD stands for any number of children, so one read mostly empties the queue;
        // what is left makes the descriptor readable again.
        if let Ok(Some(info)) = self.fd.read_signal() {
            tidings.child = i32::try_from(info.ssi_signo) == Ok(Signal::SIGCHLD as i32);
            tidings.end = !tidings.child;
        }
        tidings
    }
}
