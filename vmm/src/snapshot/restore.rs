//! Opens a snapshot to make a machine of it: what is in the manifest is checked before anything is made.

use std::sync::Arc;

use snapshot_fmt::chain::Chain;
use snapshot_fmt::manifest::{MEMORY, Manifest};
use snapshot_fmt::snapshot::Snapshot;
use snapshot_fmt::state::machine::MachineState;

use super::{SnapshotError, description};
use crate::config::{ConsoleConfig, VmConfig, VsockConfig};
use crate::pager::{Mode, Pager, Pages};
use crate::store::{Held, Store};

/// A snapshot that was found whole and fit for this host. Nobody can remove it meanwhile.
pub struct Saved {
    /// All but memory.
    pub state: MachineState,
    /// Memory.
    pub chain: Arc<Chain>,
    /// How its pages come.
    pub mode: Mode,
    working_set: Vec<u64>,
    held: Arc<Held>,
}

impl Saved {
    /// Opens the snapshot of `store` that `reference` means.
    pub fn open(store: &Store, reference: &str, mode: Mode) -> Result<Self, SnapshotError> {
        let held = store.hold(reference)?;
        let snapshot = held.snapshot();
        description::check_cpu(&snapshot.manifest().cpu, &description::cpu())?;
        Ok(Self {
            state: snapshot.state()?,
            chain: Arc::new(store.chain(snapshot, MEMORY)?),
            mode,
            working_set: working_set(snapshot),
            held: Arc::new(held),
        })
    }

    /// What it is.
    pub fn manifest(&self) -> &Manifest {
        self.held.snapshot().manifest()
    }

    /// Its memory, for a machine that goes on.
    pub fn pages(&self) -> Pages {
        Pages {
            chain: Arc::clone(&self.chain),
            mode: self.mode,
            working_set: self.working_set.clone(),
        }
    }

    /// Writes down what `pager` was first asked for, for the next restores, if nobody has before.
    pub fn keep_working_set(&self, pager: &Pager) {
        let pages = pager.working_set();
        if !self.working_set.is_empty() || pages.is_empty() {
            return;
        }
        if let Err(error) = self.held.write_working_set(&pages) {
            log::warn!("the working set of the snapshot is not kept: {error}");
        }
    }

    /// What keeps it from being removed.
    pub fn held(&self) -> &Arc<Held> {
        &self.held
    }

    /// The configuration that its machine goes on with.
    pub fn config(
        &self,
        vsock: Option<VsockConfig>,
        console: ConsoleConfig,
    ) -> Result<VmConfig, SnapshotError> {
        let config = description::config(&self.manifest().machine, vsock, console)?;
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
