//! A virtual machine's life: it runs, with pauses, from when it is started until its end or its drop.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuFd, VmFd};

use crate::devices::live::LiveDevices;
use crate::devices::serial::ConsoleTail;
use crate::event_loop::{EventLoop, EventLoopError, Subscriber};
use crate::exit::ExitLatch;
use crate::memory::GuestMemory;
use crate::sys::file_mapping::FileMapping;
use crate::vcpu::{VcpuContext, VcpuThread};

/// How long a processor may take to leave the guest. It does so at once, unless the host has no time for its thread.
const PAUSE_DEADLINE: Duration = Duration::from_secs(5);

/// Whether a machine's processors run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// They do.
    Running,
    /// They wait outside the guest.
    Paused,
}

/// A processor did not leave the guest.
#[derive(Debug, thiserror::Error)]
#[error("vCPU {0} did not stop within {PAUSE_DEADLINE:?}: the host is overloaded; the VM runs on")]
pub struct PauseError(usize);

/// A machine that is built and has not run yet: what the builder hands over.
pub struct Parts {
    /// The VM, on which memory and processors hang.
    pub vm: VmFd,
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// Files that the guest sees as memory, with their guest physical addresses.
    pub files: Vec<(u64, FileMapping)>,
    /// The processors, set up for boot.
    pub vcpus: Vec<VcpuFd>,
    /// What the processors' threads share; `id` is filled in for each.
    pub context: VcpuContext,
    /// What the event loop serves.
    pub subscribers: Vec<Subscriber>,
    /// The devices that are saved with the machine.
    pub devices: LiveDevices,
    /// The console's last lines.
    pub console: ConsoleTail,
}

/// A running virtual machine.
///
/// Fields are dropped in this order: the processors stop, then the devices, then KVM lets go of the memory, then it is unmapped.
#[expect(
    dead_code,
    reason = "most fields are held for the order of their drops"
)]
pub struct Machine {
    vcpus: Vec<VcpuThread>,
    state: Mutex<RunState>,
    event_loop: EventLoop,
    devices: LiveDevices,
    exit: ExitLatch,
    console: ConsoleTail,
    vm: VmFd,
    memory: Arc<GuestMemory>,
    files: Vec<(u64, FileMapping)>,
}

impl Machine {
    /// Starts the event loop and the processors.
    pub fn start(parts: Parts) -> Result<Self, EventLoopError> {
        let Parts {
            vm,
            memory,
            files,
            vcpus,
            context,
            subscribers,
            devices,
            console,
        } = parts;
        let exit = context.exit.clone();
        let event_loop = EventLoop::start(subscribers, exit.clone())?;
        let vcpus = (0u8..)
            .zip(vcpus)
            .map(|(id, vcpu)| {
                VcpuThread::start(
                    vcpu,
                    VcpuContext {
                        id,
                        ..context.clone()
                    },
                )
            })
            .collect::<io::Result<_>>()?;
        Ok(Self {
            vcpus,
            state: Mutex::new(RunState::Running),
            event_loop,
            devices,
            exit,
            console,
            vm,
            memory,
            files,
        })
    }

    /// Where the end of the machine is written, by whoever sees it first.
    pub fn exit(&self) -> &ExitLatch {
        &self.exit
    }

    /// The last of what the guest printed.
    pub fn console(&self) -> &ConsoleTail {
        &self.console
    }

    /// Whether the processors run.
    pub fn state(&self) -> RunState {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes all processors out of the guest; comes back when they are. A machine that is paused stays so.
    pub fn pause(&self) -> Result<(), PauseError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let deadline = Instant::now() + PAUSE_DEADLINE;
        self.vcpus.iter().for_each(VcpuThread::pause);
        for (id, vcpu) in self.vcpus.iter().enumerate() {
            if !vcpu.wait_paused(deadline) {
                self.vcpus.iter().for_each(VcpuThread::resume);
                *state = RunState::Running;
                return Err(PauseError(id));
            }
        }
        *state = RunState::Paused;
        Ok(())
    }

    /// Lets the processors run on. A machine that runs is left alone.
    pub fn resume(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.vcpus.iter().for_each(VcpuThread::resume);
        *state = RunState::Running;
    }
}
