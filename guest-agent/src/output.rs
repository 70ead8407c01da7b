//! What a connection still has to send: one buffer, kept and used again, since
//! memory that was never touched costs a page fault each.

use guest_agent::frame;
use guest_agent::proto::{FromAgent, from_agent::Kind};
use rustix::io::Errno;

use crate::wire::Wire;

/// Above this many unsent bytes a connection makes no more of its own accord: it
/// reads neither requests nor programs' output.
const HIGH_WATER: usize = 128 * 1024;

/// What a socket takes where memory is short: a kernel that finds no room for a large packet may find it for this.
const SMALL: usize = 4096;

/// Frames on their way to a client.
#[derive(Default)]
pub struct Output {
    bytes: Vec<u8>,
    sent: usize,
}

impl Output {
    /// Adds a message. Its size is ours to bound: nothing the agent says comes near a frame's limit.
    pub fn push(&mut self, request_id: u32, kind: Kind) {
        let message = FromAgent {
            request_id,
            kind: Some(kind),
        };
        if let Err(error) = frame::encode(&message, &mut self.bytes) {
            unreachable!("the agent's own message: {error}");
        }
    }

    /// Whether there is anything left to send.
    pub fn is_empty(&self) -> bool {
        self.sent == self.bytes.len()
    }

    /// Whether the client is so far behind that nothing may be added that can wait.
    pub fn is_full(&self) -> bool {
        self.bytes.len() - self.sent >= HIGH_WATER
    }

    /// Forgets all of it.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.sent = 0;
    }

    /// Sends what the stream takes now.
    ///
    /// # Errors
    /// The error of the stream: the client is gone.
    pub fn flush(&mut self, wire: &Wire) -> Result<(), Errno> {
        let mut most = usize::MAX;
        while let Some(rest @ [_, ..]) = self.bytes.get(self.sent..) {
            let (now, _) = rest.split_at(rest.len().min(most));
            match wire.write(now) {
                Ok(sent) => self.sent += sent,
                // It says nothing of the client.
                Err(Errno::NOMEM | Errno::NOBUFS) if most > SMALL => most = SMALL,
                Err(Errno::AGAIN) => {
                    self.bytes.drain(..self.sent);
                    self.sent = 0;
                    return Ok(());
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        self.clear();
        Ok(())
    }
}
