//! A virtual machine's life: it runs, with pauses, from when it is started until its end or its drop.

mod rewind;
#[cfg(test)]
mod rewind_tests;

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuFd, VmFd};
use snapshot_fmt::state::machine::MachineState;
use snapshot_fmt::state::vcpu::VcpuState;

use crate::devices::live::{Disks, LiveDevices};
use crate::devices::serial::ConsoleTail;
use crate::event_loop::{EventLoop, EventLoopError, QuiesceError, Subscriber};
use crate::exit::ExitLatch;
use crate::kvm::decoy::Decoy;
use crate::kvm::{self, KvmError, platform};
use crate::memory::GuestMemory;
use crate::pager::Pager;
use crate::sys::file_mapping::FileMapping;
use crate::vcpu::state::{self, SaveContext, VcpuStateError};
use crate::vcpu::{VcpuContext, VcpuThread};

pub use self::rewind::{Moment, RewindError, Rewound};

/// How long a processor may take to leave the guest. It does so at once, unless the host has no time for its thread.
const PAUSE_DEADLINE: Duration = Duration::from_secs(5);

/// How long a thread may take to end once a page cannot be had. One that does not wait for that page ends at once.
const STUCK_AFTER: Duration = Duration::from_millis(200);

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

/// Processors and devices did not stand still. They run on.
#[derive(Debug, thiserror::Error)]
pub enum StandStillError {
    /// A processor did not stop.
    #[error(transparent)]
    Pause(#[from] PauseError),
    /// The devices did not come to rest.
    #[error(transparent)]
    Quiesce(#[from] QuiesceError),
}

/// Why a machine could not be saved. It runs on as before.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// It did not stand still.
    #[error(transparent)]
    StandStill(#[from] StandStillError),
    /// A processor's state cannot be had.
    #[error(transparent)]
    Vcpu(#[from] VcpuStateError),
    /// The state of what they share cannot be had.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Its end has come: what it is need not be what it seems.
    #[error("the sandbox is ending")]
    Over,
    /// A processor's thread is gone.
    #[error("vCPU {0} has ended: there is no state to save")]
    Ended(usize),
}

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
    /// Where memory comes from that is not there yet.
    pub pager: Option<Pager>,
    /// The host's end of the agent's connection, where a restored guest has kept it.
    pub agent_link: Option<UnixStream>,
    /// The console's last lines.
    pub console: ConsoleTail,
}

/// A running virtual machine.
///
/// Fields are dropped in this order: the processors stop, then the devices, then KVM lets go of the memory, then it is unmapped.
/// The pager outlives whoever may wait for a page.
pub struct Machine {
    vcpus: Vec<VcpuThread>,
    software: bool,
    state: Mutex<RunState>,
    save_context: Mutex<Option<Arc<SaveContext>>>,
    event_loop: EventLoop,
    devices: LiveDevices,
    exit: ExitLatch,
    console: ConsoleTail,
    vm: VmFd,
    memory: Arc<GuestMemory>,
    files: Vec<(u64, FileMapping)>,
    decoy: Mutex<Option<Decoy>>,
    pager: Mutex<Option<Arc<Pager>>>,
    agent_link: Mutex<Option<UnixStream>>,
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
            pager,
            agent_link,
            console,
        } = parts;
        let exit = context.exit.clone();
        let software = context.software;
        // First, for the guest has something to do before it asks for anything; what it asks for waits.
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
        let event_loop = EventLoop::start(subscribers, exit.clone())?;
        Ok(Self {
            vcpus,
            software,
            state: Mutex::new(RunState::Running),
            save_context: Mutex::default(),
            event_loop,
            devices,
            exit,
            console,
            vm,
            memory,
            files,
            decoy: Mutex::default(),
            pager: Mutex::new(pager.map(Arc::new)),
            agent_link: Mutex::new(agent_link),
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
        *self.lock()
    }

    /// Takes all processors out of the guest; comes back when they are. A machine that is paused stays so.
    pub fn pause(&self) -> Result<(), PauseError> {
        self.stop(&mut self.lock())
    }

    /// Lets the processors run on. A machine that runs is left alone, and so is one whose end has come.
    pub fn resume(&self) {
        let mut state = self.lock();
        if self.exit.get().is_none() {
            self.run_on(&mut state);
        }
    }

    fn lock(&self) -> MutexGuard<'_, RunState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(&self, state: &mut RunState) -> Result<(), PauseError> {
        let deadline = Instant::now() + PAUSE_DEADLINE;
        self.vcpus.iter().for_each(VcpuThread::pause);
        for (id, vcpu) in self.vcpus.iter().enumerate() {
            if !vcpu.wait_paused(deadline) {
                self.run_on(state);
                return Err(PauseError(id));
            }
        }
        *state = RunState::Paused;
        Ok(())
    }

    /// Has processors and devices stand still, side by side: what the ones still ask of the others waits. Where it fails the devices go on; the processors
    /// are the caller's.
    fn stand_still(&self, state: &mut RunState) -> Result<(), StandStillError> {
        self.event_loop.ask_to_pause();
        let deadline = Instant::now() + PAUSE_DEADLINE;
        let stopped = self.stop(state).map_err(StandStillError::from);
        let result = stopped.and_then(|()| Ok(self.event_loop.wait_paused(deadline)?));
        if result.is_err() {
            self.event_loop.resume();
        }
        result
    }

    fn run_on(&self, state: &mut RunState) {
        self.vcpus.iter().for_each(VcpuThread::resume);
        *state = RunState::Running;
    }

    /// The host's end of the connection that the agent had when the machine was saved, once. None where that did not survive:
    /// the agent then calls again.
    pub fn take_agent_link(&self) -> Option<UnixStream> {
        self.lock_agent_link().take()
    }

    fn lock_agent_link(&self) -> MutexGuard<'_, Option<UnixStream>> {
        let link = self.agent_link.lock();
        link.unwrap_or_else(PoisonError::into_inner)
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The disks that its guest may write to.
    pub fn disks(&self) -> &Disks {
        &self.devices.disks
    }

    /// What brings its memory, where it was saved before.
    pub fn pager(&self) -> Option<Arc<Pager>> {
        self.lock_pager().clone()
    }

    fn lock_pager(&self) -> MutexGuard<'_, Option<Arc<Pager>>> {
        self.pager.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops everything, and has `during` see the state of this moment, in which memory stands still as well; then goes on,
    /// unless the machine was paused before. Nobody else pauses or resumes it meanwhile.
    pub fn freeze<T>(&self, during: impl FnOnce(MachineState) -> T) -> Result<T, SaveError> {
        let context = self.save_context()?;
        let mut state = self.lock();
        if self.exit.get().is_some() {
            return Err(SaveError::Over);
        }
        let before = *state;
        let result = self.frozen(&mut state, &context, during);
        self.event_loop.resume();
        if before == RunState::Running {
            self.run_on(&mut state);
        }
        result
    }

    fn frozen<T>(
        &self,
        state: &mut RunState,
        context: &Arc<SaveContext>,
        during: impl FnOnce(MachineState) -> T,
    ) -> Result<T, SaveError> {
        self.stand_still(state)?;
        let vcpus = self.save_vcpus(context)?;
        Ok(during(MachineState {
            vcpus,
            platform: platform::save(&self.vm)?,
            devices: self.devices.save(),
            agent: None,
        }))
    }

    /// What saving asks of KVM, which answers the same each time.
    fn save_context(&self) -> Result<Arc<SaveContext>, KvmError> {
        let known = self.save_context.lock();
        let mut known = known.unwrap_or_else(PoisonError::into_inner);
        if let Some(context) = &*known {
            return Ok(Arc::clone(context));
        }
        let context = SaveContext::new(&kvm::open()?, self.cpus(), self.software)?;
        Ok(Arc::clone(known.insert(Arc::new(context))))
    }

    fn cpus(&self) -> u8 {
        u8::try_from(self.vcpus.len()).unwrap_or(u8::MAX)
    }

    fn save_vcpus(&self, context: &Arc<SaveContext>) -> Result<Vec<VcpuState>, SaveError> {
        let answers: Vec<_> = (0..)
            .zip(&self.vcpus)
            .map(|(id, vcpu)| {
                let (sender, answer) = sync_channel(1);
                let context = Arc::clone(context);
                vcpu.when_paused(move |vcpu| {
                    // Nobody waits any more only where saving has failed elsewhere.
                    let _ = sender.send(state::save(vcpu, id, &context));
                });
                answer
            })
            .collect();
        answers
            .into_iter()
            .enumerate()
            .map(|(id, answer)| Ok(answer.recv().map_err(|_| SaveError::Ended(id))??))
            .collect()
    }
}

/// A thread that waits for a page that cannot be had never ends. It is left to itself, with all that it may still use, until the process
/// ends: it sees nothing else of that page.
impl Drop for Machine {
    fn drop(&mut self) {
        let Some(pager) = self.pager() else {
            return;
        };
        self.vcpus.iter().for_each(VcpuThread::stop);
        let ended = wait_unless_failed(&pager, || self.vcpus.iter().all(VcpuThread::has_ended));
        self.event_loop.stop();
        if wait_unless_failed(&pager, || self.event_loop.has_ended()) && ended {
            return;
        }
        self.vcpus.iter_mut().for_each(VcpuThread::abandon);
        self.event_loop.abandon();
        std::mem::forget(std::mem::take(&mut self.files));
    }
}

/// Waits until `ended`. False where a page cannot be had, and that does not come for it.
fn wait_unless_failed(pager: &Pager, ended: impl Fn() -> bool) -> bool {
    let mut failed_at = None;
    while !ended() {
        if pager.has_failed() {
            let failed_at: &Instant = failed_at.get_or_insert_with(Instant::now);
            if failed_at.elapsed() > STUCK_AFTER {
                return false;
            }
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    true
}
