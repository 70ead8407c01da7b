//! Opens a snapshot to make a machine of it: what is in the manifest is checked before anything is made.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use snapshot_fmt::digest::Digest;
use snapshot_fmt::manifest::{Machine as Description, Programs, Warm};
use snapshot_fmt::snapshot::Snapshot;
use snapshot_fmt::state::machine::MachineState;

use super::chains::Chains;
use super::memory::Memory;
use super::{SnapshotError, description};
use crate::builder::{SavedDisk, SavedDisks};
use crate::config::{ConsoleConfig, VmConfig, VsockConfig};
use crate::devices::virtio::blk::stack::Backing;
use crate::devices::virtio::blk::{self, SECTOR};
use crate::pager::{Mode, Pager, Pages};
use crate::store::{Held, Store};

/// A machine to go on with: a snapshot that was found whole and fit for this host, which nobody can remove meanwhile, or a running parent's moment.
pub struct Saved {
    /// All but memory and disks.
    pub state: Arc<MachineState>,
    /// Memory.
    pub memory: Memory,
    /// What the disks that the guest may write to rest on, by the numbers of their drives.
    pub backings: BTreeMap<usize, Backing>,
    /// How memory's pages come.
    pub mode: Mode,
    /// What it is.
    pub machine: Description,
    /// How programs are run in it.
    pub programs: Programs,
    /// The interpreter that stands ready in it.
    pub warm: Option<Warm>,
    /// The pages that will be wanted first; nothing where nobody will restore it again.
    pub(super) working_set: Option<Vec<u64>>,
    /// The snapshot that memory begins with.
    pub base: Option<Base>,
    /// When it stood still, on this host, if it was a running parent: [`crate::timings::monotonic_ns`]. Its clock has gone on since.
    pub moment: Option<u64>,
}

/// A snapshot that nobody can remove, and what it holds: what others rest on.
#[derive(Clone)]
pub struct Base {
    /// It.
    pub held: Arc<Held>,
    /// Its memory and disks.
    pub chains: Chains,
}

impl Base {
    /// Its store, and its id there.
    pub fn place(&self) -> (PathBuf, Digest) {
        let snapshot = self.held.snapshot();
        // A snapshot is a directory of its store.
        let dir = snapshot.dir().parent().unwrap_or(Path::new(""));
        (dir.to_owned(), snapshot.id())
    }

    /// The snapshot of `store` that `reference` means.
    pub fn open(store: &Store, reference: &str) -> Result<Self, SnapshotError> {
        let held = store.hold(reference)?;
        Ok(Self {
            chains: Chains::open(store, held.snapshot())?,
            held: Arc::new(held),
        })
    }

    /// What disks rest on that go on from it.
    pub(super) fn backings(&self) -> BTreeMap<usize, Backing> {
        let disks = self.chains.disks.iter();
        disks
            .map(|(&drive, chain)| {
                let base = blk::stack::Base::Saved(Arc::clone(chain) as _);
                (drive, Backing::from(base))
            })
            .collect()
    }
}

impl Saved {
    /// Opens the snapshot of `store` that `reference` means.
    pub fn open(store: &Store, reference: &str, mode: Mode) -> Result<Self, SnapshotError> {
        let base = Base::open(store, reference)?;
        let snapshot = base.held.snapshot();
        description::check_cpu(&snapshot.manifest().cpu, &description::cpu())?;
        Ok(Self {
            state: Arc::new(snapshot.state()?),
            memory: Arc::clone(&base.chains.memory).into(),
            backings: base.backings(),
            mode,
            machine: snapshot.manifest().machine.clone(),
            programs: snapshot.manifest().programs.clone(),
            warm: snapshot.manifest().warm.clone(),
            working_set: Some(working_set(snapshot)),
            base: Some(base),
            moment: None,
        })
    }

    /// Its memory, for a machine that goes on. It is waited for where it is on its way.
    pub fn pages(&self) -> Result<Pages, SnapshotError> {
        Ok(Pages {
            chain: Arc::clone(self.memory.wait()?),
            mode: self.mode,
            working_set: self.working_set.clone().unwrap_or_default(),
        })
    }

    /// The disks that its guest may write to, for a machine that goes on. What that writes is kept in the directory `dir`.
    pub fn disks(&self, dir: &Path) -> SavedDisks {
        let drives = &self.machine.drives;
        let disk = |(&drive, backing): (&usize, &Backing)| {
            let sectors = drives.get(drive)?.bytes / SECTOR;
            let backing = backing.clone();
            Some((drive, SavedDisk { backing, sectors }))
        };
        SavedDisks {
            disks: self.backings.iter().filter_map(disk).collect(),
            dir: dir.to_owned(),
        }
    }

    /// Writes down what `pager` was first asked for, for the next restores, if nobody has before.
    pub fn keep_working_set(&self, pager: &Pager) {
        let (Some(base), Some([])) = (&self.base, self.working_set.as_deref()) else {
            return;
        };
        let pages = pager.working_set();
        if pages.is_empty() {
            return;
        }
        if let Err(error) = base.held.write_working_set(&pages) {
            log::warn!("the working set of the snapshot is not kept: {error}");
        }
    }

    /// The configuration that its machine goes on with.
    pub fn config(
        &self,
        vsock: Option<VsockConfig>,
        console: ConsoleConfig,
    ) -> Result<VmConfig, SnapshotError> {
        let config = description::config(&self.machine, vsock, console)?;
        if usize::try_from(config.cpus).ok() != Some(self.state.vcpus.len()) {
            return Err(SnapshotError::Description {
                what: "it has another number of processors than its state".to_owned(),
            });
        }
        Ok(config)
    }
}

/// The pages that an earlier run wanted first. They are a hint: without them the guest is as right, and slower.
fn working_set(snapshot: &Snapshot) -> Vec<u64> {
    match snapshot.working_set() {
        Ok(pages) => pages.unwrap_or_default(),
        Err(error) => {
            log::warn!("the working set cannot be used: {error}");
            Vec::new()
        }
    }
}
