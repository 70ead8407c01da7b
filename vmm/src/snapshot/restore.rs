//! Opens a snapshot to make a machine of it: what is in the manifest is checked before anything is made.

use std::sync::Arc;

use snapshot_fmt::chain::Chain;
use snapshot_fmt::manifest::{MEMORY, Manifest};
use snapshot_fmt::state::machine::MachineState;

use super::{SnapshotError, description};
use crate::config::{ConsoleConfig, VmConfig, VsockConfig};
use crate::pager::{Mode, Pages};
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
            working_set: match mode {
                Mode::Map => Vec::new(),
                Mode::Fault => snapshot.working_set()?.unwrap_or_default(),
            },
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
