//! Takes a machine back to a moment at which it, or one like it, was saved, in place: the same process, the same KVM objects, the same sockets.
//!
//! Everything stands still meanwhile. Memory goes back by dropping the copies that writing has made of its pages, where it began with that moment; otherwise the moment's pages are
//! mapped anew. A machine that could not be taken all the way ends: it is neither what it was nor what it was to be.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use snapshot_fmt::state::machine::MachineState;
use thiserror::Error;
use vm_memory::GuestMemoryBackend;

use super::{Machine, RunState, StandStillError};
use crate::devices::live::RewindDevicesError;
use crate::devices::virtio::blk::Disk;
use crate::devices::virtio::blk::stack::Backing;
use crate::exit::{ExitLatch, ExitReason};
use crate::kvm::{KvmError, boot_processor::OnBootProcessor, decoy::Decoy, platform};
use crate::memory::{self, GuestMemory};
use crate::pager::{self, Pager, PagerError, Pages};
use crate::vcpu::VcpuThread;
use crate::vcpu::state::{self, VcpuStateError};

/// Where a machine is to go back to.
pub struct Moment {
    /// Processors and devices.
    pub state: Arc<MachineState>,
    /// Memory; none where it is what the machine's own began with.
    pub pages: Option<Pages>,
    /// What the disks that the guest may write to are, by the numbers of their drives.
    pub backings: BTreeMap<usize, Backing>,
    /// A directory for what is written to them from then on.
    pub dir: PathBuf,
}

/// How that went.
#[derive(Debug, Clone, Copy)]
pub struct Rewound {
    /// How many pages had been written to, and are what they were. All that are had otherwise count as well.
    pub pages: u64,
    /// How long it stood still.
    pub pause: Duration,
}

/// Why a machine was not taken back.
#[derive(Debug, Error)]
pub enum RewindError {
    /// It did not stand still.
    #[error(transparent)]
    StandStill(#[from] StandStillError),
    /// Its end has come.
    #[error("the sandbox is ending")]
    Over,
    /// A processor's thread is gone.
    #[error("vCPU {0} has ended: the sandbox ends")]
    Ended(usize),
    /// The moment is another machine's.
    #[error("{saved} processors were saved, and there are {here}")]
    Cpus {
        /// How many were saved.
        saved: usize,
        /// How many there are.
        here: usize,
    },
    /// Its memory began with zeros.
    #[error("its memory began with nothing: only memory that was saved can be gone back to")]
    NoOrigin,
    /// A disk does not go back.
    #[error(
        "what its guest writes to drive {0} is in a file of its user's, which does not go back: start it from a snapshot, whose drives do"
    )]
    UsersFile(usize),
    /// Its memory is not of the kind.
    #[error(transparent)]
    Pager(PagerError),
    /// It was begun and not finished.
    #[error("cannot go back: {0}; the sandbox has ended")]
    Broken(#[from] Failure),
}

/// What kept a machine from going all the way back.
#[derive(Debug, Error)]
pub enum Failure {
    /// Memory.
    #[error(transparent)]
    Pager(#[from] PagerError),
    /// Memory, again.
    #[error("memory: {0}")]
    Memory(#[from] io::Error),
    /// Devices.
    #[error(transparent)]
    Devices(#[from] RewindDevicesError),
    /// What processors share.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A processor.
    #[error(transparent)]
    Vcpu(#[from] VcpuStateError),
    /// A processor's thread is gone.
    #[error("vCPU {0} has ended")]
    Ended(usize),
    /// The devices' thread is gone.
    #[error("the event loop has ended")]
    NoEventLoop,
}

/// How many pages have changed, and what brings them from then on.
type Memory = (u64, Option<Arc<Pager>>);

impl Machine {
    /// Takes the machine back to `moment`, and has it run from there, whether it was paused or not.
    pub fn rewind(&self, moment: Moment) -> Result<Rewound, RewindError> {
        let (saved, here) = (moment.state.vcpus.len(), self.vcpus.len());
        if saved != here {
            return Err(RewindError::Cpus { saved, here });
        }
        match (&moment.pages, self.pager()) {
            (None, None) => return Err(RewindError::NoOrigin),
            (None, Some(pager)) => pager.can_rewind().map_err(RewindError::Pager)?,
            (Some(_), _) => {}
        }
        let users_file = |(_, disk): &(&usize, &Arc<Disk>)| disk.is_users_file();
        if let Some((&drive, _)) = self.devices.disks.iter().find(users_file) {
            return Err(RewindError::UsersFile(drive));
        }
        // For what `forget_shadows` waits for. To get there is no part of the pause.
        let _there = self.software.then(OnBootProcessor::go);
        let mut state = self.lock();
        if self.exit.get().is_some() {
            return Err(RewindError::Over);
        }
        let start = Instant::now();
        let before = *state;
        if let Err(error) = self.stand_still(&mut state) {
            if before == RunState::Running {
                self.run_on(&mut state);
            }
            return Err(error.into());
        }
        let ended = self.vcpus.iter().position(|vcpu| vcpu.has_ended());
        let result = match ended {
            Some(id) => Err(RewindError::Ended(id)),
            None => self.go_back(moment).map_err(RewindError::from),
        };
        if let Err(RewindError::Broken(failure)) = &result {
            // It stands still until it is dropped.
            let why = format!("it cannot go back: {failure}");
            self.exit.set(ExitReason::Monitor(why));
            return Err(result.err().unwrap_or(RewindError::Over));
        }
        self.event_loop.resume();
        self.run_on(&mut state);
        Ok(Rewound {
            pages: result?,
            pause: start.elapsed(),
        })
    }

    /// Everything stands still. Returns how many pages have changed.
    fn go_back(&self, moment: Moment) -> Result<u64, Failure> {
        let Moment {
            state,
            pages,
            backings,
            dir,
        } = moment;
        platform::restore(&self.vm, &state.platform)?;
        let vcpus = self.begin_vcpus(&state);
        let mut pager = self.lock_pager();
        let memory = self.begin_memory(pages, pager.take());
        if self.software {
            self.forget_shadows()?;
        }
        let (changed, now) = memory.recv().map_err(|_| Failure::NoEventLoop)??;
        *pager = now;
        drop(pager);
        // Before the devices: what they interrupt again must not be lost to a local APIC that is loaded after it.
        for (id, vcpu) in vcpus.into_iter().enumerate() {
            vcpu.recv().map_err(|_| Failure::Ended(id))??;
        }
        let link = self.devices.rewind(&state.devices, &backings, &dir)?;
        *self.lock_agent_link() = link;
        self.devices.give_seed().map_err(RewindDevicesError::from)?;
        platform::restore_clock(&self.vm, &state.platform, None)?;
        Ok(changed)
    }

    /// Has the devices' thread, which has nothing else to do, take memory back, or have it be what `pages` are.
    fn begin_memory(
        &self,
        pages: Option<Pages>,
        pager: Option<Arc<Pager>>,
    ) -> Receiver<Result<Memory, Failure>> {
        let (sender, answer) = sync_channel(1);
        let (memory, exit) = (Arc::clone(&self.memory), self.exit.clone());
        self.event_loop.when_paused(move || {
            let back = || match pages {
                None => {
                    let changed = pager.as_ref().map(|pager| pager.rewind(&memory));
                    Ok((changed.unwrap_or(Ok(0))?, pager))
                }
                Some(pages) => {
                    // What watches the pages that it brought has nothing to watch any more.
                    drop(pager);
                    let pager = begin_again(pages, &memory, &exit)?;
                    Ok((memory::total_pages(&memory), Some(Arc::new(pager))))
                }
            };
            // Nobody waits any more only where something else has failed.
            let _ = sender.send(back());
        });
        answer
    }

    /// A KVM that shadows the guest's page tables takes its shadows for true as long as the guest itself writes to nothing that they were made of. Nobody tells it of
    /// what is put back here.
    fn forget_shadows(&self) -> Result<(), KvmError> {
        let mut decoy = self.decoy.lock().unwrap_or_else(|error| error.into_inner());
        match &mut *decoy {
            Some(decoy) => decoy.forget_shadows(&self.vm),
            None => {
                let first = self.memory.num_regions() + self.files.len();
                let slot = u32::try_from(first).unwrap_or(u32::MAX);
                *decoy = Some(Decoy::new(&self.vm, slot)?);
                decoy
                    .as_mut()
                    .map_or(Ok(()), |decoy| decoy.forget_shadows(&self.vm))
            }
        }
    }

    /// Has the processors' threads load `state`, each its own.
    fn begin_vcpus(&self, state: &Arc<MachineState>) -> Vec<Receiver<Result<(), VcpuStateError>>> {
        let begin = |(id, vcpu): (usize, &VcpuThread)| {
            let (sender, answer) = sync_channel(1);
            let state = Arc::clone(state);
            vcpu.when_paused(move |vcpu| {
                let result = state.vcpus.get(id).map(|to| state::rewind(vcpu, to));
                // Nobody waits any more only where another has failed.
                let _ = sender.send(result.unwrap_or(Ok(())));
            });
            answer
        };
        self.vcpus.iter().enumerate().map(begin).collect()
    }
}

/// Has `memory` be what `pages` are.
fn begin_again(pages: Pages, memory: &GuestMemory, exit: &ExitLatch) -> Result<Pager, Failure> {
    pager::clear(memory)?;
    let pager = Pager::start(pages, memory, exit)?;
    pager.guest_starts()?;
    Ok(pager)
}
