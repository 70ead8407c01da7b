//! The host's boot processor, on which grace periods of its kernel end soonest: whoever waits for several of them goes there.
//!
//! Sleepable RCU (Linux, kernel/rcu/srcutree.c) serves those that few wait for from the processor that the host has booted on. From another one, each costs a wake-up of that
//! one and one back.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// The number of the boot processor on x86-64.
const BOOT: usize = 0;

/// This thread is on the boot processor until this is dropped.
pub struct OnBootProcessor {
    before: CpuSet,
}

impl OnBootProcessor {
    /// Goes there. Where this process may not, or cannot tell, the thread stays where it is.
    pub fn go() -> Option<Self> {
        let before = sched_getaffinity(None).ok()?;
        if !before.is_set(BOOT) {
            return None;
        }
        let mut boot = CpuSet::new();
        boot.set(BOOT);
        sched_setaffinity(None, &boot).ok()?;
        Some(Self { before })
    }
}

impl Drop for OnBootProcessor {
    fn drop(&mut self) {
        // What was allowed before is allowed again.
        let _ = sched_setaffinity(None, &self.before);
    }
}
