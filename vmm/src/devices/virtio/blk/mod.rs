//! virtio-blk: a disk in a file (Virtio 1.2, section 5.2).
//!
//! Requests are carried out one after the other on the event loop, straight between the file and guest
//! memory. While one waits for the host's disk, every other device waits too; that is acceptable as
//! long as images live in the page cache.

mod device;
mod queue;
mod state;

pub use device::{Block, BlockConfig, BlockError};

#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod tests;
