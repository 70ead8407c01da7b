//! The window: two rings with one producer and one consumer each, and the words that either side writes.
//!
//! Indices count bytes, wrap at 2^32 and never stop; a ring's size divides that. Both are read from the window each time, the host's own too: a guest
//! that changes that one has spoilt its own stream. Nothing here reads or writes outside the window, whatever the indices say.

use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::devices::virtio::GuestSlice;
use crate::memory::GuestMemory;

/// Bytes of the window.
pub const WINDOW_BYTES: usize = 64 << 10;
/// Bits of a window's address that a frame number does not have.
const PAGE_SHIFT: u32 = 12;

/// The host's word: what it waits for.
pub const HOST_WANTS: usize = 0x08;
/// The host's word: whether the stream is open, and how it has ended.
pub const HOST_STATE: usize = 0x0c;
/// The guest's word: what it waits for.
pub const GUEST_WANTS: usize = 0x48;
/// Bytes of the window with a stream's words in them.
const HEAD_BYTES: usize = 0x80;

/// The host's word, until the guest's kernel has taken the seed: whether it is there.
const SEED_STATE: usize = 0x80;
/// The seed is there, in [`SEED_STATE`].
const SEED_NEW: u32 = 1;
/// Where the seed is.
const SEED: usize = 0xc0;
/// Bytes of the seed.
pub const SEED_BYTES: usize = 64;

/// Wanted: bytes.
pub const WANTS_DATA: u32 = 1;
/// Wanted: room for bytes.
pub const WANTS_ROOM: u32 = 2;

/// How a stream is over, in [`HOST_STATE`], where 0 says that it goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// The host's end is closed.
    Ended = 1,
    /// The guest goes on from a snapshot, and the stream does not.
    Lost = 2,
}

/// A ring.
pub struct Ring {
    /// Where its bytes are in the window.
    data: usize,
    /// How many it has room for: a power of two.
    pub bytes: u32,
    /// The word with how many were ever put in.
    head: usize,
    /// The word with how many were ever taken out.
    tail: usize,
}

/// From the host to the guest.
pub const TO_GUEST: Ring = Ring {
    data: 0x4000,
    bytes: 16 << 10,
    head: 0x00,
    tail: 0x44,
};
/// From the guest to the host.
pub const TO_HOST: Ring = Ring {
    data: 0x8000,
    bytes: 32 << 10,
    head: 0x40,
    tail: 0x04,
};

/// More is in a ring than fits.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("a ring of {bytes} bytes with {head:#x} put in and {tail:#x} taken out")]
pub struct RingError {
    bytes: u32,
    head: u32,
    tail: u32,
}

/// The window of a lane.
pub struct Window<'a>(GuestSlice<'a>);

impl<'a> Window<'a> {
    /// The window at page `frame`, if all of it is in one range of RAM.
    pub fn new(memory: &'a GuestMemory, frame: u32) -> Option<Self> {
        let start = GuestAddress(u64::from(frame) << PAGE_SHIFT);
        let slice = memory.get_slice(start, WINDOW_BYTES).ok()?;
        Some(Self(slice))
    }

    /// A stream begins: nothing is in the rings, nobody waits.
    pub fn clear(&self) {
        for word in (0..HEAD_BYTES).step_by(4) {
            self.set(word, 0);
        }
    }

    /// A word. What lies outside the window reads as 0, and nothing does.
    pub fn get(&self, word: usize) -> u32 {
        self.0.load(word, Ordering::Acquire).unwrap_or(0)
    }

    /// Writes a word, behind everything that was written before.
    pub fn set(&self, word: usize, value: u32) {
        // Every word is within the window.
        let _ = self.0.store(value, word, Ordering::Release);
    }

    /// Gives the guest random bytes that no copy of it has. It executes nothing meanwhile.
    pub fn put_seed(&self, seed: &[u8; SEED_BYTES]) {
        // All of it is within the window.
        let _ = self.0.write_slice(seed, SEED);
        self.set(SEED_STATE, SEED_NEW);
    }

    /// Says what the host waits for; what it looks at after that, the guest's doorbell need not tell.
    pub fn wait_for(&self, wants: u32) {
        self.set(HOST_WANTS, wants);
        fence(Ordering::SeqCst);
    }

    /// Whether the guest waits for one of `news`, which were written before this is asked.
    pub fn guest_wants(&self, news: u32) -> bool {
        fence(Ordering::SeqCst);
        self.get(GUEST_WANTS) & news != 0
    }

    /// How many bytes are in `ring`.
    pub fn filled(&self, ring: &Ring) -> Result<u32, RingError> {
        let (head, tail) = (self.get(ring.head), self.get(ring.tail));
        let filled = head.wrapping_sub(tail);
        if filled > ring.bytes {
            let bytes = ring.bytes;
            return Err(RingError { bytes, head, tail });
        }
        Ok(filled)
    }

    /// The bytes that can be taken out of `ring` in one piece, if there are any.
    pub fn taken_next(&self, ring: &Ring) -> Result<Option<GuestSlice<'a>>, RingError> {
        let filled = self.filled(ring)?;
        Ok(self.piece(ring, self.get(ring.tail), filled))
    }

    /// The room in `ring` that can be filled in one piece, if there is any.
    pub fn filled_next(&self, ring: &Ring) -> Result<Option<GuestSlice<'a>>, RingError> {
        let free = ring.bytes - self.filled(ring)?;
        Ok(self.piece(ring, self.get(ring.head), free))
    }

    /// Up to `len` bytes of `ring` from `index` on, in one piece; never more than the ring has.
    fn piece(&self, ring: &Ring, index: u32, len: u32) -> Option<GuestSlice<'a>> {
        let at = index & (ring.bytes - 1);
        let len = len.min(ring.bytes - at);
        let start = ring.data + usize::try_from(at).ok()?;
        let piece = self.0.subslice(start, usize::try_from(len).ok()?).ok()?;
        (len > 0).then_some(piece)
    }

    /// So many bytes more were taken out of `ring`.
    pub fn take(&self, ring: &Ring, bytes: u32) {
        self.set(ring.tail, self.get(ring.tail).wrapping_add(bytes));
    }

    /// So many bytes more were put into `ring`.
    pub fn put(&self, ring: &Ring, bytes: u32) {
        self.set(ring.head, self.get(ring.head).wrapping_add(bytes));
    }
}
