//! The resets that a restored guest gets, held back until it has said something on the one connection that it kept, which may be the lane's.
//!
//! The guest's agent kills the programs of a client that goes. Before it knows that it goes on from a snapshot, it would take
//! the end of a connection for that.

use snapshot_fmt::state::virtio::VsockPorts;

use super::connection::Key;
use super::packet::{HOST_CID, Header, TYPE_STREAM, op};

/// Connections that are no more, which the guest is not told yet.
pub(super) struct Held {
    /// What it says there lets them go, and so does the end of that connection; none where that is the lane's.
    pub kept: Option<Key>,
    ended: Vec<VsockPorts>,
}

impl Held {
    /// Those that `ended`, until the guest speaks on `kept`.
    pub fn new(kept: Option<Key>, ended: &[VsockPorts]) -> Self {
        let ended = ended.to_vec();
        Self { kept, ended }
    }

    /// Those that it knows nothing of yet.
    pub fn ended(&self) -> &[VsockPorts] {
        &self.ended
    }

    /// Whether a packet from the guest is about one of them, and stays without an answer. A packet that shows the guest to be
    /// done with one lets go of it, and is dealt with like any other about a connection that is not there.
    pub fn silences(&mut self, key: Key, op: u16) -> bool {
        let ports = key.into();
        match op {
            op::REQUEST | op::SHUTDOWN | op::RST => {
                self.ended.retain(|&other| other != ports);
                false
            }
            _ => self.ended.contains(&ports),
        }
    }

    /// The resets that are due now.
    pub fn resets(self, guest_cid: u64) -> impl Iterator<Item = Header> {
        self.ended.into_iter().map(move |ports| Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: ports.host,
            dst_port: ports.guest,
            kind: TYPE_STREAM,
            op: op::RST,
            ..Header::default()
        })
    }
}
