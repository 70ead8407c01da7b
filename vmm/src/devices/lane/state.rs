//! What is saved of a lane: where its window is, and whether its stream goes on. The rings are memory.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use snapshot_fmt::state::lane::LaneState;
use vmm_sys_util::eventfd::EventFd;

use super::ring::{TO_GUEST, TO_HOST};
use super::{Lane, LaneConfig, LaneError};
use crate::devices::interrupt::Interrupt;
use crate::memory::GuestMemory;
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

    /// A device that goes on from `state`, and the host's end of its stream where that was kept: `spoken` is written to once the guest
    /// has said something on it, or it has ended. A stream that was open and not kept is lost, of which the guest is told.
    pub fn restore(
        config: LaneConfig,
        memory: Arc<GuestMemory>,
        irq: Arc<dyn Interrupt>,
        state: &LaneState,
        spoken: EventFd,
    ) -> Result<(Self, Option<UnixStream>), LaneError> {
        let mut lane = Self::new(config, memory, irq)?;
        lane.frame = state.frame;
        if lane.window().is_none() && (state.frame != 0 || state.open) {
            return Err(LaneError::Saved("its window is not in memory"));
        }
        if state.kept && !state.open {
            return Err(LaneError::Saved("it keeps a stream that is not open"));
        }
        let host = if state.kept {
            let (stream, host) = UnixStream::pair()?;
            stream.set_nonblocking(true)?;
            lane.attach(stream)?;
            lane.spoken = Some(spoken);
            Some(host)
        } else {
            lane.is_lost = state.open;
            // What it was about is in the window.
            lane.interrupts_again = !state.open && state.frame != 0;
            None
        };
        lane.ring_own_doorbell();
        Ok((lane, host))
    }
}
