//! What is saved of a persistent memory device: where the guest has mapped it. Its contents are the file's.

use snapshot_fmt::state::virtio::PmemState;

use super::{Pmem, PmemConfig, PmemError};

impl Pmem {
    /// What must be the same for this device to be restored.
    pub fn save(&self) -> PmemState {
        PmemState {
            id: self.config.id.clone(),
            start: self.config.start,
            size: self.config.size,
        }
    }

    /// A device in the reset state for memory that is where the saved one was; its transport restores the rest.
    pub fn restore(config: PmemConfig, state: &PmemState) -> Result<Self, PmemError> {
        let PmemConfig { id, start, size } = config;
        if (start, size) != (state.start, state.size) {
            return Err(PmemError::SavedPlace {
                id,
                start,
                size,
                saved_start: state.start,
                saved_size: state.size,
            });
        }
        let id = state.id.clone();
        Self::new(PmemConfig { id, start, size })
    }
}
