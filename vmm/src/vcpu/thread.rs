//! The thread of a virtual processor.

use std::io;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

use kvm_ioctls::VcpuFd;

use super::exits::{Next, run_once};
use crate::devices::bus::Bus;
use crate::exit::ExitLatch;
use crate::gate::{Gate, Wanted};
use crate::kvm::Kick;
use crate::memory::GuestMemory;
use crate::sys::slice;
use crate::timings::Timings;

/// Stack of a processor's thread, in bytes: its deepest path is a device's register access.
const STACK_SIZE: usize = 128 << 10;

/// What a processor's thread works with.
#[derive(Clone)]
pub struct VcpuContext {
    /// Index of the processor, and its APIC id.
    pub id: u8,
    /// Port I/O.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// Guest memory, to say what instruction failed.
    pub memory: Arc<GuestMemory>,
    /// Where the end of the VM is written.
    pub exit: ExitLatch,
    /// It is a software KVM.
    pub software: bool,
    /// Told when the first processor enters the guest.
    pub timings: Arc<Timings>,
}

/// What a processor's thread and its owner share. At the gate the thread is outside KVM_RUN with no access half done: KVM finishes the access
/// that the last exit was for before it looks at `immediate_exit`.
struct Shared {
    gate: Gate<VcpuFd>,
    kick: Kick,
}

impl Shared {
    /// Called by the thread where KVM_RUN was interrupted.
    fn pass(&self, vcpu: &VcpuFd) -> bool {
        self.gate.pass(vcpu, || self.kick.clear())
    }
}

/// A running processor. It stops when it is dropped.
pub struct VcpuThread {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl VcpuThread {
    /// Starts the processor.
    pub fn start(mut vcpu: VcpuFd, context: VcpuContext) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            gate: Gate::default(),
            kick: Kick::new(&vcpu)?,
        });
        let own = Arc::clone(&shared);
        let thread = Builder::new()
            .name(format!("vcpu{}", context.id))
            .stack_size(STACK_SIZE)
            .spawn(move || {
                if context.software {
                    slice::lengthen();
                } else {
                    slice::reset();
                }
                if context.id == 0 {
                    context.timings.mark("first KVM_RUN");
                }
                loop {
                    match run_once(&mut vcpu, &context) {
                        Next::Run => {}
                        Next::Interrupted if own.pass(&vcpu) => {}
                        Next::Interrupted => break,
                        Next::Exit(reason) => {
                            context.exit.set(reason);
                            break;
                        }
                    }
                }
                own.gate.end();
            })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Asks the processor to leave the guest and wait.
    pub fn pause(&self) {
        self.want(Wanted::Pause);
    }

    /// Waits until a pause that was asked for is there. False where it is not by `deadline`.
    pub fn wait_paused(&self, deadline: Instant) -> bool {
        self.shared.gate.wait_parked(deadline)
    }

    /// Has the thread of a processor that is paused do `task` with it, without waiting for its end. A processor that runs
    /// again, or has ended, drops the task undone.
    pub fn when_paused(&self, task: impl FnOnce(&VcpuFd) + Send + 'static) {
        self.shared.gate.when_parked(task);
    }

    /// Lets the processor run on.
    pub fn resume(&self) {
        self.want(Wanted::Run);
    }

    /// Asks the processor to end.
    pub fn stop(&self) {
        self.want(Wanted::Stop);
    }

    /// Whether its thread has ended.
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Leaves the thread to itself: it has been asked to end and cannot. It keeps what it works with.
    pub fn abandon(&mut self) {
        self.thread = None;
    }

    fn want(&self, wanted: Wanted) {
        self.shared.gate.want(wanted, || {
            if wanted != Wanted::Run
                && let Some(thread) = &self.thread
            {
                self.shared.kick.kick(thread);
            }
        });
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.want(Wanted::Stop);
        if let Some(thread) = self.thread.take() {
            // A panicking thread has reported itself; there is nothing to add here.
            let _ = thread.join();
        }
    }
}
