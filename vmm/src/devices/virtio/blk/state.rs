//! What is saved of a disk: enough to refuse another one. Its contents are saved elsewhere.
//!
//! No request is ever in flight between two events of the event loop, so none has to be saved.

use snapshot_fmt::state::virtio::BlockState;

use super::{Block, BlockConfig, BlockError};

impl Block {
    /// What must be the same for this disk to be restored.
    pub fn save(&self) -> BlockState {
        BlockState {
            id: self.id.clone(),
            read_only: self.target.disk.read_only(),
            sectors: self.target.disk.sectors(),
        }
    }

    /// A device in the reset state on the disk that was saved; its transport restores the rest. The
    /// serial number is the saved one.
    pub fn restore(config: BlockConfig, state: &BlockState) -> Result<Self, BlockError> {
        let id = state.id.clone();
        let block = Self::new(BlockConfig { id, ..config })?;
        let disk = &block.target.disk;
        if disk.read_only() != state.read_only {
            return Err(BlockError::SavedMode {
                read_only: disk.read_only(),
                path: block.path,
            });
        }
        if disk.sectors() != state.sectors {
            return Err(BlockError::SavedSize {
                sectors: disk.sectors(),
                path: block.path,
                saved: state.sectors,
            });
        }
        Ok(block)
    }
}
