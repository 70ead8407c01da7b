//! What is saved of a lane: where its window is, and whether its stream goes on. The rings are memory.

use std::os::unix::net::UnixStream;

use rustix::rand::{GetRandomFlags, getrandom};
use snapshot_fmt::state::lane::LaneState;

use super::ring::{SEED_BYTES, TO_GUEST, TO_HOST};
use super::{Lane, LaneError};
use crate::sys::unread::is_silent;

impl Lane {
    /// What a restored device goes on with. The stream does only while nothing is on its way on it; the host's end of it must be
    /// at rest, too: whoever holds it may have read half of a message.
    pub fn save(&self) -> LaneState {
        let at_rest = self.stream.as_ref().is_some_and(|stream| {
            let is_empty = self.window().is_some_and(|window| {
                [TO_GUEST, TO_HOST]
                    .iter()
                    .all(|ring| window.filled(ring) == Ok(0))
            });
            is_empty && is_silent(stream)
        });
        LaneState {
            frame: self.frame,
            open: self.stream.is_some() || self.is_lost,
            kept: at_rest,
        }
    }

    /// Goes on from `state`, whatever it was before; returns the host's end of the stream where that was kept. A stream that was open and
    /// not kept is lost, of which the guest is told.
    pub fn load(&mut self, state: &LaneState) -> Result<Option<UnixStream>, LaneError> {
        self.stream = None;
        self.is_awaited = false;
        self.frame = state.frame;
        if self.window().is_none() && (state.frame != 0 || state.open) {
            return Err(LaneError::Saved("its window is not in memory"));
        }
        if state.kept && !state.open {
            return Err(LaneError::Saved("it keeps a stream that is not open"));
        }
        let host = if state.kept {
            let (stream, host) = UnixStream::pair()?;
            stream.set_nonblocking(true)?;
            self.attach(stream)?;
            Some(host)
        } else {
            None
        };
        self.is_awaited = state.kept;
        self.is_lost = state.open && !state.kept;
        // What it was about is in the window.
        self.interrupts_again = !state.open && state.frame != 0;
        self.ring_own_doorbell();
        Ok(host)
    }

    /// Gives the guest random bytes of its own, now that its memory is there, and before it executes anything.
    pub fn give_seed(&self) -> Result<(), LaneError> {
        let Some(window) = self.window() else {
            return Ok(());
        };
        let mut seed = [0; SEED_BYTES];
        getrandom(&mut seed[..], GetRandomFlags::empty()).map_err(LaneError::NoSeed)?;
        window.put_seed(&seed);
        Ok(())
    }
}
