//! The thread of a virtual processor.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};

use kvm_ioctls::VcpuFd;

use super::exits::{Next, run_once};
use crate::devices::bus::Bus;
use crate::exit::ExitLatch;
use crate::kvm::Kick;
use crate::memory::GuestMemory;
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

/// A running processor. It stops when it is dropped.
pub struct VcpuThread {
    kick: Kick,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl VcpuThread {
    /// Starts the processor.
    pub fn start(mut vcpu: VcpuFd, context: VcpuContext) -> io::Result<Self> {
        let kick = Kick::new(&vcpu)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = Builder::new()
            .name(format!("vcpu{}", context.id))
            .stack_size(STACK_SIZE)
            .spawn(move || {
                if context.id == 0 {
                    context.timings.mark("first KVM_RUN");
                }
                while !stopped.load(Ordering::SeqCst) {
                    match run_once(&mut vcpu, &context) {
                        Next::Run | Next::Interrupted => {}
                        Next::Exit(reason) => return context.exit.set(reason),
                    }
                }
            })?;
        Ok(Self {
            kick,
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            self.kick.kick(&thread);
            // A panicking thread has reported itself; there is nothing to add here.
            let _ = thread.join();
        }
    }
}
