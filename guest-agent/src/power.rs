//! Ending the guest: in order, or at once after a panic.
//!
//! Without ACPI the kernel cannot switch the power off; it resets by the keyboard
//! controller, which the monitor takes as the end of the guest. So "power off" is a
//! reset here.

use std::time::{Duration, Instant};

use guest_agent::proto::{Shutdown, ShutdownMode};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::fs::sync;
use rustix::process::{WaitOptions, wait};
use rustix::system::{RebootCommand, reboot};

use crate::init;

/// The grace period if the client does not say, and the longest that it may ask for.
const DEFAULT_GRACE: Duration = Duration::from_millis(500);
const MAX_GRACE: Duration = Duration::from_secs(60);

/// How long the agent waits at most for the processes that it has killed.
const KILL_TIME: Duration = Duration::from_secs(2);

/// How often it looks whether they are gone.
const TICK: Duration = Duration::from_millis(20);

/// Makes every panic of PID 1 print what happened on the console and reset the guest,
/// where the kernel would otherwise panic in turn.
pub fn reset_on_panic() {
    std::panic::set_hook(Box::new(|info| {
        // Standard error is the console: the kernel opened it.
        eprintln!("guest-agent: {info}");
        let _ = reboot(RebootCommand::Restart);
    }));
}

/// Ends the guest in order: SIGTERM, the grace period, SIGKILL, file systems written out.
/// Comes back only if the kernel refuses to.
pub fn end(shutdown: &Shutdown) {
    let grace = match shutdown.grace_ms {
        0 => DEFAULT_GRACE,
        ms => Duration::from_millis(ms.into()).min(MAX_GRACE),
    };
    // Every orphan is a child of PID 1, so without children there is nobody to wait for.
    if !gone() {
        signal_all(Signal::SIGTERM);
        // A stopped process takes SIGTERM only when it goes on.
        signal_all(Signal::SIGCONT);
        if !wait_until_gone(grace) {
            signal_all(Signal::SIGKILL);
            wait_until_gone(KILL_TIME);
        }
    }
    init::close_disks();
    sync();
    let command = match shutdown.mode() {
        ShutdownMode::PowerOff | ShutdownMode::Reboot => RebootCommand::Restart,
        ShutdownMode::Halt => RebootCommand::Halt,
    };
    if let Err(errno) = reboot(command) {
        init::warn(&format!("reboot: {errno}"));
    }
}

fn signal_all(signal: Signal) {
    // Fails only when there is no process left.
    let _ = kill(Pid::from_raw(-1), signal);
}

/// Reaps what has ended; says whether nobody is left.
fn gone() -> bool {
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some(_)) => {}
            Ok(None) => return false,
            Err(_) => return true,
        }
    }
}

fn wait_until_gone(time: Duration) -> bool {
    let end = Instant::now() + time;
    while !gone() {
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(TICK);
    }
    true
}
