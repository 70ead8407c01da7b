//! What is saved of a guest's sockets: no connection. They end with a reset, which the guest learns
//! from the event queue when it is restored (Virtio 1.2, section 5.10.6.7).

use snapshot_fmt::state::virtio::VsockState;

use super::muxer::FIRST_HOST_PORT;
use super::queue::Reset;
use super::{Vsock, VsockConfig, VsockError};

impl Vsock {
    /// What a restored device goes on with.
    pub fn save(&self) -> VsockState {
        VsockState {
            cid: self.cid,
            next_host_port: self.muxer.next_host_port,
        }
    }

    /// A device in the reset state that will tell its guest of lost connections once its transport is
    /// restored; new clients wait until the guest has dealt with that. The context id may differ from
    /// the saved one: the guest reads it again on that event.
    pub fn restore(config: VsockConfig, state: &VsockState) -> Result<Self, VsockError> {
        let mut vsock = Self::new(config)?;
        vsock.reset = Reset::Due;
        // A port that the guest has not just seen; a number out of range starts again.
        vsock.muxer.next_host_port = state.next_host_port.max(FIRST_HOST_PORT);
        Ok(vsock)
    }
}
