//! The lane: a stream of bytes between one program of the guest and the host, in memory that both see.
//!
//! `docs/lane.md` describes it as a device. The window, 64 KiB of the guest's own RAM that its driver names, has two rings and their
//! indices; an ioeventfd is the guest's doorbell, an irqfd the host's. So the window is saved, restored and branched with memory, and the
//! device keeps next to nothing. On the host's side it is what a vsock connection to the same port of the host would be: a stream to
//! whoever listens there.
//!
//! The guest is hostile: every index is checked each time it is used, bytes are copied once and never looked at, the work of an event is bounded.
//! A ring that cannot be ends the stream, and the guest may open another.

mod device;
mod ring;
mod state;

#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use device::{DOORBELL, Lane, LaneConfig, LaneError, WINDOW_SIZE};
