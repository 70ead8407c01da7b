//! Filling buffers with entropy.
//!
//! A request is answered with at most [`MAX_REQUEST`] bytes however large its buffers are: what a guest
//! asks for costs the host time.

use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::devices::virtio::GuestMemory;
use crate::devices::virtio::queue::{Buffers, Chain, QueueError, copy_to, split_front};

/// Most bytes that one request gets.
pub(super) const MAX_REQUEST: usize = 64 * 1024;

/// Fills the chain's writable buffers; returns how many bytes were written, at least one
/// (section 5.4.6.2).
pub(super) fn fill<'m>(memory: &'m GuestMemory, chain: Chain<'m>) -> Result<u32, QueueError> {
    let head = chain.head_index();
    let mut buffers = Buffers::collect(memory, chain)?;
    let wrong = |reason: &str| QueueError::Request {
        head,
        reason: reason.into(),
    };
    if buffers.writable.is_empty() {
        return Err(wrong("no buffer for entropy"));
    }
    let mut written = 0;
    let mut block = [0; 1024];
    while written < MAX_REQUEST {
        let part = split_front(&mut buffers.writable, block.len());
        if part.is_empty() {
            break;
        }
        // Up to 256 bytes come whole; the source is seeded long before any guest runs.
        for bytes in block.chunks_mut(256) {
            while let Err(error) = getrandom(&mut *bytes, GetRandomFlags::empty()) {
                if error != Errno::INTR {
                    return Err(wrong(&format!("the host has no entropy: {error}")));
                }
            }
        }
        written += copy_to(&part, &block);
    }
    u32::try_from(written).map_err(|_| wrong("too long"))
}
