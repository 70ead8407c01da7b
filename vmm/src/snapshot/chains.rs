//! The layers that a snapshot's machine consists of, with those below them.

use std::sync::Arc;

use snapshot_fmt::chain::Chain;
use snapshot_fmt::manifest::{MEMORY, disk_layer};
use snapshot_fmt::snapshot::Snapshot;

use super::disk_layer::DiskChains;
use crate::store::{Store, StoreError};

/// Chains of one snapshot.
#[derive(Debug, Clone)]
pub struct Chains {
    /// Memory.
    pub memory: Arc<Chain>,
    /// The disks that the guest may write to.
    pub disks: DiskChains,
}

impl Chains {
    /// Opens those of a snapshot of `store`.
    pub fn open(store: &Store, snapshot: &Snapshot) -> Result<Self, StoreError> {
        let chain = |layer: &str| store.chain(snapshot, layer).map(Arc::new);
        let drives = snapshot.manifest().machine.writable_drives();
        Ok(Self {
            memory: chain(MEMORY)?,
            disks: drives
                .map(|drive| Ok((drive, chain(&disk_layer(drive))?)))
                .collect::<Result<_, StoreError>>()?,
        })
    }
}
