//! How a VM ends, and who is told.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

/// Why a VM stopped running. The first reason stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest pulled the reset line: a reboot, a power-off (there is no ACPI), or a panic.
    Reset,
    /// A processor met a fault while it delivered a double fault.
    TripleFault {
        /// Index of the processor.
        vcpu: u8,
        /// Its instruction pointer, if KVM told.
        rip: Option<u64>,
    },
    /// KVM could not run an instruction.
    Emulation {
        /// Index of the processor.
        vcpu: u8,
        /// Its instruction pointer, if KVM told.
        rip: Option<u64>,
        /// The bytes at the instruction pointer, as many as KVM gave.
        bytes: Vec<u8>,
        /// It is a software KVM.
        software: bool,
    },
    /// KVM_RUN failed or gave up for a reason that has no name here.
    VcpuDied {
        /// Index of the processor.
        vcpu: u8,
        /// What KVM said.
        why: String,
    },
    /// The guest was asked to end and did not in time, or was not asked.
    Stopped,
    /// A thread of the monitor ended though it should not have.
    Monitor(String),
}

impl ExitReason {
    /// Whether it is what a guest comes to that has another's, or no, memory.
    fn is_the_guests(&self) -> bool {
        !matches!(self, Self::Stopped | Self::Monitor(_))
    }
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = |rip: &Option<u64>| rip.map_or(String::new(), |rip| format!(" at RIP {rip:#x}"));
        match self {
            Self::Reset => write!(f, "the guest reset or powered itself off"),
            Self::TripleFault { vcpu, rip } => write!(
                f,
                "triple fault on vCPU {vcpu}{}: the guest kernel broke its own exception handling",
                at(rip)
            ),
            Self::Emulation {
                vcpu,
                rip,
                bytes,
                software,
            } => {
                let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
                let name = crate::vcpu::instruction_name(bytes).unwrap_or("an instruction");
                write!(
                    f,
                    "KVM cannot emulate {name} on vCPU {vcpu}{} (bytes: {}): ",
                    at(rip),
                    if hex.is_empty() {
                        "unknown".to_owned()
                    } else {
                        hex.join(" ")
                    }
                )?;
                if *software {
                    write!(
                        f,
                        "this is a software KVM, which runs guest-kernel code in an emulator; use the kernel of tools/build-kernel, or a host with hardware virtualization"
                    )
                } else {
                    write!(
                        f,
                        "the guest kernel ran code from device memory, or it is damaged"
                    )
                }
            }
            Self::VcpuDied { vcpu, why } => write!(f, "vCPU {vcpu} died: {why}"),
            Self::Stopped => write!(f, "stopped by force"),
            Self::Monitor(why) => write!(f, "the monitor failed: {why}"),
        }
    }
}

/// What knows of failures that nobody can report who meets them, or that show as something else.
pub trait Witness: Send + Sync {
    /// What was met by a thread that cannot go on, after it has made the latch's event readable.
    fn reported(&self) -> Option<String>;

    /// What is behind an end that seems to be the guest's.
    fn behind(&self) -> Option<String>;
}

struct Inner {
    reason: Mutex<Option<ExitReason>>,
    event: OwnedFd,
    witness: Mutex<Option<Arc<dyn Witness>>>,
}

/// Where the end of a VM is written by whoever sees it first.
#[derive(Clone)]
pub struct ExitLatch(Arc<Inner>);

impl ExitLatch {
    /// A latch that nothing has been written to.
    pub fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(Inner {
            reason: Mutex::new(None),
            event,
            witness: Mutex::default(),
        })))
    }

    /// Has `witness` be asked from now on, in place of any before it.
    pub fn ask(&self, witness: Arc<dyn Witness>) {
        *self.lock_witness() = Some(witness);
    }

    fn lock_witness(&self) -> MutexGuard<'_, Option<Arc<dyn Witness>>> {
        let witness = self.0.witness.lock();
        witness.unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes `reason` unless there is one already. What the witness says is behind an end of the guest's own is written instead.
    pub fn set(&self, reason: ExitReason) {
        let mut slot = self.0.reason.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none() {
            let witness = self.lock_witness().clone();
            let witness = witness.filter(|_| reason.is_the_guests());
            let behind = witness.and_then(|witness| witness.behind());
            *slot = Some(behind.map_or(reason, ExitReason::Monitor));
            // It fails only where the counter is full, and then it is readable already.
            let _ = rustix::io::write(&self.0.event, &1u64.to_ne_bytes());
        }
    }

    /// The reason, once there is one.
    pub fn get(&self) -> Option<ExitReason> {
        let mut slot = self.0.reason.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none()
            && let Some(witness) = self.lock_witness().clone()
        {
            *slot = witness.reported().map(ExitReason::Monitor);
        }
        slot.clone()
    }

    /// Readable once there is a reason, and from then on.
    pub fn event(&self) -> &OwnedFd {
        &self.0.event
    }
}

/// The keyboard controller's reset line.
impl vm_superio::Trigger for ExitLatch {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.set(ExitReason::Reset);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_stands() {
        let latch = ExitLatch::new().unwrap();
        assert_eq!(latch.get(), None);
        latch.set(ExitReason::Reset);
        latch.set(ExitReason::Monitor(String::new()));
        assert_eq!(latch.get(), Some(ExitReason::Reset));
        assert_eq!(rustix::io::read(latch.event(), &mut [0; 8]), Ok(8));
    }

    #[test]
    fn an_emulation_failure_says_what_where_and_what_to_do() {
        let reason = |software| ExitReason::Emulation {
            vcpu: 1,
            rip: Some(0xffff_ffff_8100_0000),
            bytes: vec![0xcc, 0x90],
            software,
        };
        let message = reason(true).to_string();
        for part in [
            "int3",
            "vCPU 1",
            "0xffffffff81000000",
            "cc 90",
            "tools/build-kernel",
        ] {
            assert!(message.contains(part), "{part}: {message}");
        }
        assert!(!reason(false).to_string().contains("software"));
    }
}
