//! Taking requests from a virtqueue and giving them back (Virtio 1.2, section 2.7).
//!
//! Two things that every device needs: [`Buffers`], a descriptor chain as checked pieces of guest
//! memory whatever its framing (section 2.7.4: a device must not depend on it), and [`serve`], which
//! takes what is available with one interrupt for the whole batch. An interrupt is the most costly
//! thing that a device can do to a guest on a software KVM.
//!
//! Work is bounded: in descriptors per chain, and one call of [`serve`] takes at most as many chains as
//! its queue holds. Devices do not offer indirect descriptors, which cost a driver an allocation per
//! request; a driver that uses them all the same gains nothing by it.

use std::sync::atomic::Ordering;

use thiserror::Error;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, GuestMemoryError, Permissions};

use super::signal::Signal;
use super::{GuestMemory, GuestSlice};

/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (section 2.7.6).
const AVAIL_F_NO_INTERRUPT: u16 = 1;

/// Most descriptors in one chain: as many as the largest queue of our devices, and room to spare.
const MAX_DESCRIPTORS: usize = 256;

/// A chain whose descriptors and buffers have not been looked at.
pub type Chain<'m> = DescriptorChain<&'m GuestMemory>;

/// How a driver broke the rules of its rings. The device cannot go on.
#[derive(Debug, Error)]
pub enum QueueError {
    /// The rings themselves are unusable.
    #[error("bad virtqueue: {0}")]
    Queue(virtio_queue::Error),
    /// The rings are outside of guest memory.
    #[error("bad virtqueue: {0}")]
    Memory(#[from] GuestMemoryError),
    /// A chain with no descriptor that can be read.
    #[error("descriptor chain {head} is empty")]
    EmptyChain {
        /// Index of the first descriptor.
        head: u16,
    },
    /// A chain that loops, that leaves its table, or that is longer than 4 GiB.
    #[error("descriptor chain {head} does not end")]
    EndlessChain {
        /// Index of the first descriptor.
        head: u16,
    },
    /// A chain of more descriptors than any queue of ours has.
    #[error("descriptor chain {head} has more than {MAX_DESCRIPTORS} descriptors")]
    LongChain {
        /// Index of the first descriptor.
        head: u16,
    },
    /// A buffer that the device reads after one that it writes (section 2.7.4.2).
    #[error("descriptor chain {head} has a readable buffer after a writable one")]
    Order {
        /// Index of the first descriptor.
        head: u16,
    },
    /// A buffer outside of guest memory.
    #[error("descriptor chain {head} has a buffer outside of memory, {addr:#x}+{len:#x}")]
    Buffer {
        /// Index of the first descriptor.
        head: u16,
        /// Guest physical address.
        addr: u64,
        /// Length in bytes.
        len: u32,
    },
    /// A request that the device cannot even answer.
    #[error("descriptor chain {head}: {reason}")]
    Request {
        /// Index of the first descriptor.
        head: u16,
        /// What is wrong with it.
        reason: String,
    },
}

impl From<virtio_queue::Error> for QueueError {
    fn from(error: virtio_queue::Error) -> Self {
        Self::Queue(error)
    }
}

/// The buffers of one chain, all within guest memory; empty ones are left out.
#[derive(Debug, Default)]
pub struct Buffers<'m> {
    /// What the device may read, in order.
    pub readable: Vec<GuestSlice<'m>>,
    /// What the device may write, in order.
    pub writable: Vec<GuestSlice<'m>>,
}

impl<'m> Buffers<'m> {
    /// Checks `chain` and collects its buffers.
    pub fn collect(memory: &'m GuestMemory, mut chain: Chain<'m>) -> Result<Self, QueueError> {
        let head = chain.head_index();
        let mut buffers = Self::default();
        let mut last = None;
        for (count, desc) in (&mut chain).enumerate() {
            if count == MAX_DESCRIPTORS {
                return Err(QueueError::LongChain { head });
            }
            last = Some(desc);
            let list = if desc.is_write_only() {
                &mut buffers.writable
            } else if buffers.writable.is_empty() {
                &mut buffers.readable
            } else {
                return Err(QueueError::Order { head });
            };
            let (addr, len) = (desc.addr(), desc.len());
            let outside = |_| QueueError::Buffer {
                head,
                addr: addr.0,
                len,
            };
            if len == 0 {
                continue;
            }
            let size = usize::try_from(len).unwrap_or(usize::MAX);
            let access = if desc.is_write_only() {
                Permissions::Write
            } else {
                Permissions::Read
            };
            for slice in memory.get_slices(addr, size, access).map_err(outside)? {
                list.push(slice.map_err(outside)?);
            }
        }
        match last {
            None => Err(QueueError::EmptyChain { head }),
            Some(desc) if desc.has_next() => Err(QueueError::EndlessChain { head }),
            Some(_) => Ok(buffers),
        }
    }
}

/// Length of `slices` together.
pub fn total_len(slices: &[GuestSlice]) -> u64 {
    // At most 32768 buffers of less than 4 GiB: the sum fits.
    slices.iter().map(|slice| slice.len() as u64).sum()
}

/// Takes up to `len` bytes off the front of `slices`.
pub fn split_front<'m>(slices: &mut Vec<GuestSlice<'m>>, len: usize) -> Vec<GuestSlice<'m>> {
    let mut front = Vec::new();
    let mut left = len;
    let mut whole = 0;
    for slice in slices.iter_mut() {
        if left == 0 {
            break;
        }
        if slice.len() <= left {
            left -= slice.len();
            front.push(*slice);
            whole += 1;
        } else if let Ok((head, tail)) = slice.split_at(left) {
            front.push(head);
            *slice = tail;
            left = 0;
        }
    }
    slices.drain(..whole);
    front
}

/// Copies from the front of `slices`; returns how many bytes there were.
pub fn copy_from(slices: &[GuestSlice], bytes: &mut [u8]) -> usize {
    let mut done = 0;
    for slice in slices {
        done += slice.copy_to(&mut bytes[done..]);
    }
    done
}

/// Copies to the front of `slices`; returns how many bytes fitted.
pub fn copy_to(slices: &[GuestSlice], bytes: &[u8]) -> usize {
    let mut done = 0;
    for slice in slices {
        let len = slice.len().min(bytes.len() - done);
        slice.copy_from(&bytes[done..done + len]);
        done += len;
    }
    done
}

/// Whether [`serve`] took all there was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// The queue is empty: the driver's next notification will tell.
    All,
    /// There is more, and no notification will come for it: notify the queue yourself.
    More,
}

/// What a device did with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Return it to the driver with so many bytes written.
    Used(u32),
    /// Put it back: the device can take no more for now.
    Later,
}

/// Gives each available chain to `request`, returns it to the driver, and interrupts at most once.
///
/// Takes at most one queue's worth of chains, so that a driver which keeps adding cannot keep the
/// event loop to itself. A queue that the driver has not enabled is empty.
pub fn serve<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemory,
    signal: &Signal,
    request: impl FnMut(Chain<'m>) -> Result<Outcome, QueueError>,
) -> Result<Served, QueueError> {
    let mut interrupt = false;
    let result = serve_quietly(queue, memory, &mut interrupt, request);
    if interrupt {
        signal.used_buffer();
    }
    result
}

/// As [`serve`], but sets `interrupt` instead, so that several queues can share one.
pub fn serve_quietly<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemory,
    interrupt: &mut bool,
    request: impl FnMut(Chain<'m>) -> Result<Outcome, QueueError>,
) -> Result<Served, QueueError> {
    if !queue.ready() {
        return Ok(Served::All);
    }
    let mut used = false;
    let result = take_all(queue, memory, &mut used, request);
    // What was used before an error is still the driver's.
    *interrupt |= used && wants_interrupt(queue, memory)?;
    result
}

fn take_all<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemory,
    used: &mut bool,
    mut request: impl FnMut(Chain<'m>) -> Result<Outcome, QueueError>,
) -> Result<Served, QueueError> {
    // One turn more than there are chains finds the queue empty.
    let mut budget = queue.size().saturating_add(1);
    loop {
        let chain = match next(queue, memory, &mut budget)? {
            Next::Chain(chain) => chain,
            Next::Stop(served) => return Ok(served),
        };
        let head = chain.head_index();
        match request(chain)? {
            Outcome::Used(len) => {
                queue.add_used(memory, head, len)?;
                *used = true;
            }
            Outcome::Later => {
                queue.go_to_previous_position();
                return Ok(Served::All);
            }
        }
    }
}

enum Next<'m> {
    Chain(Chain<'m>),
    Stop(Served),
}

fn next<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemory,
    budget: &mut u16,
) -> Result<Next<'m>, QueueError> {
    loop {
        // Counted on every turn: a driver may also move its index to and fro between the two checks.
        *budget = match budget.checked_sub(1) {
            Some(left) => left,
            None => return Ok(Next::Stop(Served::More)),
        };
        if let Some(chain) = queue.iter(memory)?.next() {
            return Ok(Next::Chain(chain));
        }
        if !queue.enable_notification(memory)? {
            return Ok(Next::Stop(Served::All));
        }
    }
}

/// Whether the driver wants to hear of what was used (sections 2.7.7 and 2.7.10).
pub fn wants_interrupt(queue: &mut Queue, memory: &GuestMemory) -> Result<bool, QueueError> {
    if queue.event_idx_enabled() {
        return Ok(queue.needs_notification(memory)?);
    }
    std::sync::atomic::fence(Ordering::SeqCst);
    let flags: u16 = memory.load(GuestAddress(queue.avail_ring()), Ordering::Relaxed)?;
    Ok(u16::from_le(flags) & AVAIL_F_NO_INTERRUPT == 0)
}
