//! What is saved of a connection that nothing is on its way on.
//!
//! Both ends have read all that was sent, so the counts of the credit are the whole of it: with them another stream takes
//! the place of the first, and the guest does not notice.

use std::num::Wrapping;
use std::os::unix::net::UnixStream;

use snapshot_fmt::state::virtio::{VsockConnectionState, VsockPorts};

use super::{Connection, Key, Pending, State};
use crate::sys::unread::is_silent;

impl From<Key> for VsockPorts {
    fn from(key: Key) -> Self {
        Self {
            host: key.host_port,
            guest: key.guest_port,
        }
    }
}

impl From<VsockPorts> for Key {
    fn from(ports: VsockPorts) -> Self {
        Self {
            host_port: ports.host,
            guest_port: ports.guest,
        }
    }
}

impl Connection {
    /// What a restored connection goes on with. There is nothing to go on with while anything is on its way: a packet for
    /// the guest, a byte that either end has not read, the end of a direction.
    pub fn save(&self) -> Option<VsockConnectionState> {
        let open = self.state == State::Established
            && self.pending == Pending::default()
            && self.buffer.is_empty()
            && (self.guest_shutdown, self.host_shutdown) == (0, 0)
            && !self.hung_up;
        let idle = open && is_silent(&self.stream);
        idle.then(|| VsockConnectionState {
            ports: self.key.into(),
            buf_alloc: self.buf_alloc,
            forwarded: self.forwarded.0,
            forwarded_told: self.forwarded_told.0,
            sent: self.sent.0,
            peer_fwd_cnt: self.peer_fwd_cnt.0,
            peer_buf_alloc: self.peer_buf_alloc,
        })
    }

    /// One that was saved, on a stream that is non-blocking.
    pub fn restored(
        id: u64,
        stream: UnixStream,
        guest_cid: u64,
        state: &VsockConnectionState,
    ) -> Self {
        let mut this = Self::new(id, stream, state.ports.into(), guest_cid, state.buf_alloc);
        this.state = State::Established;
        this.forwarded = Wrapping(state.forwarded);
        this.forwarded_told = Wrapping(state.forwarded_told);
        this.sent = Wrapping(state.sent);
        this.peer_fwd_cnt = Wrapping(state.peer_fwd_cnt);
        this.peer_buf_alloc = state.peer_buf_alloc;
        this
    }
}
