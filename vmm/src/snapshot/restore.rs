//! Opens a snapshot to make a machine of it: what is in the manifest is checked before anything is made.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use snapshot_fmt::chain::Chain;
use snapshot_fmt::error::FormatError;
use snapshot_fmt::manifest::Manifest;
use snapshot_fmt::state::machine::MachineState;
use snapshot_fmt::state_file;

use super::{STATE, SnapshotError, description};
use crate::config::{ConsoleConfig, VmConfig, VsockConfig};

/// A snapshot that was found whole and fit for this host.
pub struct Saved {
    /// What it is.
    pub manifest: Manifest,
    /// All but memory.
    pub state: MachineState,
    /// Memory.
    pub chain: Arc<Chain>,
}

impl Saved {
    /// Opens the snapshot in `dir`, whose manifest and layers were read already.
    pub fn open(dir: &Path, manifest: Manifest, chain: Chain) -> Result<Self, SnapshotError> {
        description::check_cpu(&manifest.cpu, &description::cpu())?;
        let entry = manifest.file(STATE).ok_or_else(|| SnapshotError::NoFile {
            path: dir.to_owned(),
            name: STATE,
        })?;
        let path = dir.join(STATE);
        let file = File::open(&path).map_err(|source| FormatError::Io {
            file: path.clone(),
            offset: 0,
            what: "the state",
            source,
        })?;
        let (state, digest) = state_file::read(file, &path)?;
        if digest != entry.digest {
            return Err(SnapshotError::Format(FormatError::Corrupt {
                file: path,
                offset: 0,
                what: "it is not the file that the manifest names".to_owned(),
            }));
        }
        Ok(Self {
            manifest,
            state,
            chain: Arc::new(chain),
        })
    }

    /// The configuration that its machine goes on with.
    pub fn config(
        &self,
        vsock: Option<VsockConfig>,
        console: ConsoleConfig,
    ) -> Result<VmConfig, SnapshotError> {
        let config = description::config(&self.manifest.machine, vsock, console)?;
        if usize::try_from(config.cpus).ok() != Some(self.state.vcpus.len()) {
            return Err(SnapshotError::Description {
                what: "it has another number of processors than its state".to_owned(),
            });
        }
        Ok(config)
    }
}
