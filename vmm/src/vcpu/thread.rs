//! The thread of a virtual processor.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

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

/// What a processor is wanted to do, and what it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Run,
    Pause,
    Stop,
}

/// Something to do with a processor that waits.
type Task = Box<dyn FnOnce(&VcpuFd) + Send>;

struct Gate {
    wanted: Wanted,
    /// The thread is outside KVM_RUN with no access half done, and stays there until `wanted` changes.
    parked: bool,
    /// The thread has ended.
    ended: bool,
    /// What it is to do while it is parked.
    task: Option<Task>,
}

struct Shared {
    gate: Mutex<Gate>,
    changed: Condvar,
    kick: Kick,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Called by the thread where KVM_RUN was interrupted: waits while a pause is wanted. False where the thread shall end.
    ///
    /// KVM finishes the access that the last exit was for before it looks at `immediate_exit`, so the state is whole here.
    fn pass(&self, vcpu: &VcpuFd) -> bool {
        let mut gate = self.lock();
        while gate.wanted == Wanted::Pause {
            gate.parked = true;
            if let Some(task) = gate.task.take() {
                drop(gate);
                task(vcpu);
                gate = self.lock();
                continue;
            }
            self.changed.notify_all();
            gate = self
                .changed
                .wait(gate)
                .unwrap_or_else(PoisonError::into_inner);
        }
        gate.parked = false;
        if gate.wanted == Wanted::Run {
            self.kick.clear();
        }
        gate.wanted == Wanted::Run
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
            gate: Mutex::new(Gate {
                wanted: Wanted::Run,
                parked: false,
                ended: false,
                task: None,
            }),
            changed: Condvar::new(),
            kick: Kick::new(&vcpu)?,
        });
        let own = Arc::clone(&shared);
        let thread = Builder::new()
            .name(format!("vcpu{}", context.id))
            .stack_size(STACK_SIZE)
            .spawn(move || {
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
                let mut gate = own.lock();
                gate.ended = true;
                // Whoever waits for its answer learns that there is none.
                gate.task = None;
                own.changed.notify_all();
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
        let mut gate = self.shared.lock();
        while !gate.parked && !gate.ended {
            let Some(rest) = deadline.checked_duration_since(Instant::now()) else {
                return false;
            };
            let waited = self.shared.changed.wait_timeout(gate, rest);
            gate = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Has the thread of a processor that is paused do `task` with it, without waiting for its end. A processor that runs
    /// again, or has ended, drops the task undone.
    pub fn when_paused(&self, task: impl FnOnce(&VcpuFd) + Send + 'static) {
        let mut gate = self.shared.lock();
        if gate.parked && !gate.ended {
            gate.task = Some(Box::new(task));
        }
        self.shared.changed.notify_all();
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
        let mut gate = self.shared.lock();
        gate.wanted = wanted;
        if wanted != Wanted::Pause {
            gate.task = None;
        }
        if wanted == Wanted::Run {
            // A thread that is not parked yet finds in `pass` that it may run on.
            gate.parked = false;
        } else if let Some(thread) = &self.thread {
            self.shared.kick.kick(thread);
        }
        self.shared.changed.notify_all();
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
