//! virtio-pmem: a file that the guest sees as memory (Virtio 1.2, section 5.19).
//!
//! A guest that mounts it with DAX maps the file's pages, in the host's page cache, straight into its programs: no
//! request, no copy, no page cache of its own. Who made the device has mapped the file and shown it to the guest, read-only;
//! this tells where that is, and answers flushes. Nothing was written, so there is nothing to flush.
//!
//! Not part of it: other devices cannot reach this memory. A guest's program that hands pages of the image to another
//! device as they are, such as a direct write (O_DIRECT) to a disk from a mapped file, stops that device.

mod device;
mod queue;
mod state;

pub use device::{Pmem, PmemConfig, PmemError};

#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod tests;
