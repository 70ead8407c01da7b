//! virtio-blk: a disk (Virtio 1.2, section 5.2).
//!
//! Requests are carried out one after the other on the event loop, straight between the disk's files and guest
//! memory. While one waits for the host's disk, every other device waits too; that is acceptable as
//! long as images live in the page cache.
//!
//! A [`Disk`] is content, whatever it is kept in: a file, or what a snapshot or another sandbox had with an overlay on it ([`stack`]). It can be read as it was at a
//! moment while the guest writes on, in the same process ([`backup`]) and in others ([`share`], [`frozen`]).

pub mod allowance;
pub mod backup;
pub mod block_map;
mod device;
mod disk;
mod error;
pub mod frozen;
mod queue;
pub mod share;
pub mod stack;
mod state;

pub use device::{Block, BlockConfig};
pub use disk::Disk;
pub use error::BlockError;
pub use queue::SECTOR;

#[cfg(test)]
mod disk_tests;
#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod share_tests;
#[cfg(test)]
mod tests;
