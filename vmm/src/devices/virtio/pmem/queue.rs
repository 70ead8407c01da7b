//! Requests of virtio-pmem: there is one kind, a flush (Virtio 1.2, section 5.19.6).

use crate::devices::virtio::GuestMemory;
use crate::devices::virtio::queue::{
    Buffers, Chain, QueueError, copy_from, copy_to, split_front, total_len,
};

/// `VIRTIO_PMEM_REQ_TYPE_FLUSH`.
const FLUSH: u32 = 0;

/// Bytes of `struct virtio_pmem_req` and of `struct virtio_pmem_resp`.
const WORD: usize = 4;

/// `ret` of a flush that was done.
const OK: u32 = 0;
/// `ret` of a request that failed; the driver makes an I/O error of it.
const FAILED: u32 = 1;

/// Answers one request; returns how many bytes were written.
pub(super) fn request<'m>(memory: &'m GuestMemory, chain: Chain<'m>) -> Result<u32, QueueError> {
    let head = chain.head_index();
    let mut buffers = Buffers::collect(memory, chain)?;
    if total_len(&buffers.writable) < WORD as u64 {
        return Err(QueueError::Request {
            head,
            reason: "no room for the answer".into(),
        });
    }
    let mut kind = [0; WORD];
    let known = copy_from(&split_front(&mut buffers.readable, WORD), &mut kind) == WORD
        && u32::from_le_bytes(kind) == FLUSH;
    let answer = if known { OK } else { FAILED };
    copy_to(&buffers.writable, &answer.to_le_bytes());
    Ok(4)
}
