//! What is saved of a guest's sockets: one connection at most, the agent's where that has no lane, and only while nothing is on its way on it.
//!
//! The others end. Where one is kept, each of them ends with a reset of its own, but not before the guest has said something
//! on the one that is kept: until then its agent may not know that it goes on from a snapshot, and would take a reset for the
//! end of a client, whose programs end as well. Otherwise the guest learns from the event queue that all are gone (Virtio 1.2,
//! section 5.10.6.7), which spares none.

use std::os::unix::net::UnixStream;

use snapshot_fmt::state::virtio::VsockState;
use vmm_sys_util::eventfd::EventFd;

use super::held::Held;
use super::muxer::{BUFFER_SIZE, MAX_ENDED};
use super::queue::Reset;
use super::{Vsock, VsockError};

impl Vsock {
    /// What a restored device goes on with. The host's end of the connection that is kept must be at rest, too: whoever
    /// holds it may have read half of a message.
    pub fn save(&self) -> VsockState {
        let (kept, mut ended) = self.muxer.save(self.kept_port);
        // One event ends any number, and it is still to come where the guest has not dealt with the last one.
        let reset = ended.len() > MAX_ENDED || self.reset != Reset::Over;
        let kept = kept.filter(|_| !reset);
        if reset {
            ended.clear();
        }
        VsockState {
            cid: self.cid,
            next_host_port: self.muxer.next_host_port,
            kept,
            ended,
            reset,
        }
    }

    /// Makes a device in the reset state, whose transport is to restore the rest, go on from `state`; returns the host's end of the connection that was
    /// kept. None was, and all connections end, where `state` has none, or where the context id is not the saved one: the
    /// guest reads that again when it is told that its connections are gone. New clients wait until it has dealt with that, or
    /// has said something on the kept connection.
    pub fn load(&mut self, state: &VsockState) -> Result<Option<UnixStream>, VsockError> {
        // A port that the guest has not just seen, before the moment or after it; a number out of range starts again.
        self.muxer.next_host_port = self.muxer.next_host_port.max(state.next_host_port);
        let Some(kept) = state.kept.as_ref().filter(|_| state.cid == self.cid) else {
            self.reset = Reset::Due;
            return Ok(None);
        };
        let wrong = if kept.ports.host != self.kept_port {
            Some("the connection that it keeps is not the guest agent's")
        } else if kept.buf_alloc > BUFFER_SIZE {
            Some("its connection has more room than a connection can have")
        } else if state.ended.len() > MAX_ENDED {
            Some("it has more connections than it can have")
        } else if state.ended.contains(&kept.ports) {
            Some("it both ends and keeps a connection")
        } else {
            None
        };
        if let Some(wrong) = wrong {
            return Err(VsockError::Saved(wrong));
        }
        let host = self.muxer.restore(kept, &state.ended);
        Ok(Some(host.map_err(VsockError::Stream)?))
    }

    /// [Loads](Self::load) `state` in a device of a machine whose lane has kept `link`, or nothing: returns the agent's connection, which is on one of the two at most.
    pub fn load_beside(
        &mut self,
        state: &VsockState,
        link: Option<UnixStream>,
    ) -> Result<Option<UnixStream>, VsockError> {
        let own = self.load(state)?;
        if link.is_some() {
            self.hold_back(state);
        }
        Ok(link.or(own))
    }

    /// In a device that was just restored from `state` and keeps no connection, while the lane keeps the agent's: until the lane says that the
    /// guest has spoken there, the resets of those that have ended, and new clients, wait.
    pub fn hold_back(&mut self, state: &VsockState) {
        let is_bounded = state.ended.len() <= MAX_ENDED;
        if state.cid == self.cid && state.kept.is_none() && !state.reset && is_bounded {
            self.reset = Reset::Over;
            self.muxer.hold_back(Held::new(None, &state.ended));
            // What was said before the moment does not count.
            let _ = self.spoken.as_ref().map(EventFd::read);
        }
    }
}
