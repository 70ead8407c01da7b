//! How a connection ends: by a breach of the protocol, with its client, or as one that was lost.
//!
//! The programs of one that was lost are those of a guest that goes on from a snapshot, whose clients are another guest's.

use guest_agent::proto::from_agent::Kind;
use rustix::io::Errno;

use super::{Connection, State};
use crate::failure::Failure;

impl Connection {
    /// The client hung up.
    pub(super) fn hung_up(&mut self) {
        self.end_programs();
        self.leave();
    }

    /// The connection is no more, through no doing of the client's: its programs run on, and nobody hears of them. Work on
    /// files, and interpreters that are to stand ready, are given up.
    pub fn lose(&mut self) {
        self.programs.retain_mut(|program| {
            if program.is_helper() {
                program.kill();
            } else {
                program.orphan();
            }
            !program.is_helper()
        });
        self.warming.clear();
        self.leave();
    }

    fn leave(&mut self) {
        self.wire = None;
        self.output.clear();
        self.state = State::Gone;
    }

    /// The stream has failed: the client hung up, or the connection was lost. The kernel says `ECONNRESET` where a guest goes on
    /// without its connections (Virtio 1.2, section 5.10.6.7), and elsewhere an end that is a client's own reads as one.
    pub fn broken(&mut self, error: Option<Errno>) {
        let Some(wire) = &self.wire else { return };
        if error == Some(Errno::CONNRESET) || wire.is_lost() {
            self.lose();
        } else {
            self.hung_up();
        }
    }

    /// Ends the connection for a breach of the protocol.
    pub fn fail(&mut self, failure: Failure) {
        self.end_programs();
        self.output.push(0, Kind::Error(failure.into()));
        self.state = State::Failed;
    }

    fn end_programs(&mut self) {
        for mut program in self.programs.drain(..) {
            program.kill();
            self.remains.extend(program.cgroup.take());
        }
        self.warming.clear();
    }

    /// Whether this was the connection to the host, which has ended without a breach of the protocol; says so once. Who has
    /// hung up without an answer does not want another.
    pub fn take_lost_link(&mut self) -> bool {
        let is_lost = self.is_link && self.is_greeted && matches!(self.state, State::Gone);
        self.is_link &= !is_lost;
        is_lost
    }
}
